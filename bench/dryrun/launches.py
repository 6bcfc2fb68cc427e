"""Every launch of our kernels that dry runs meet, with what the compiler is given of it."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from bench import kernel_calls
from bench.dryrun.device import DEVICE, why_not
from bench.dryrun.gpus import Gpu
from bench.dryrun.record import DryRun, dry_run
from bench.dryrun.ways import generate
from bench.families import FAMILIES
from bench.intercept import KernelLaunch
from bench.warm import compiler_key, every_launch
from fastsd.kernels.advance import advance

RUNS = [("sd15", "text"), ("sd15", "image"), ("sd21", "text"), ("sdxl", "text"), ("sdxl", "image"), ("sd15", "taesd")]


def met(run: DryRun, case: str) -> Iterator[KernelLaunch]:
    """What a run launched of our kernels, each as often as it did."""
    for section in run.sections:
        for launch in section.launches:
            if launch.kernel is not None:
                kernel, arguments = launch.kernel
                yield KernelLaunch(f"{case}: {launch.layer or section.name}: {launch.name}", kernel, arguments)


def distinct(launches: Iterable[KernelLaunch]) -> list[KernelLaunch]:
    """The first of those that are the same to the compiler."""
    found: dict[str, KernelLaunch] = {}
    for launch in launches:
        found.setdefault(compiler_key(launch.kernel, launch.arguments), launch)
    return list(found.values())


def launches(sm: int) -> list[KernelLaunch]:
    """What the models and the samplers launch on sm_`sm`, by every way of a first use; then the compile report's.

    Where there is no dry run, pipelines are left out: what remains are their networks, at these sizes.
    """
    found: list[KernelLaunch] = []
    if why_not() is None:
        for name, way in RUNS:
            with dry_run(gpu_of(sm)) as run:
                generate(run, FAMILIES[name], way)
            found += met(run, f"{name} {way}")
        found += of_steps(sm)
    return distinct([*found, *every_launch(sm, fp8=sm >= kernel_calls.FP8), *of_report(sm)])


def of_report(sm: int) -> list[KernelLaunch]:
    """The launches of the compile report, the same in fp32, and those of training."""
    dtypes = (torch.float16, *((torch.bfloat16,) if sm >= 80 else ()), torch.float32)
    named = ((dtype, launch) for dtype in dtypes for launch in kernel_calls.launches(sm, dtype))
    found = [replace(launch, case=f"{launch.case} {dtype}") for dtype, launch in named]
    return [*found, *kernel_calls.training_launches(sm)]


def of_steps(sm: int) -> list[KernelLaunch]:
    """The sampler's update without guidance, and with each way of giving it."""
    with dry_run(gpu_of(sm)) as run:
        _every_update()
    return list(met(run, "update"))


def gpu_of(sm: int) -> Gpu:
    """A GPU of which nothing but its compute capability is said."""
    return Gpu(f"sm_{sm}", divmod(sm, 10), 1.0, 1.0, 1, 1.0, 80, "")


@torch.inference_mode()
def _every_update() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    number, one, shape = empty(1, dtype=torch.int64), empty(1), (1, 64, 64, 4)
    plain = ((1, 1.0), (2, 7.5), (2, one))
    ways: list[tuple[int, Any, Any, Any]] = [
        *((parts, guidance, rescale, None) for parts, guidance in plain for rescale in (None, one)),
        *((3, guidance, None, guidance) for guidance in (7.5, one)),
    ]
    for parts, guidance, rescale, image in ways:
        half = {"dtype": torch.float16}
        buffers = empty(*shape), empty(*shape, **half), empty(parts, *shape[1:], **half), empty(31, 16), number
        advance(*buffers, empty(*shape), empty(3, *shape), empty(2, *shape), guidance, rescale, image)


class _KernelPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return (value.fn.__module__, value.fn.__name__) if isinstance(value, triton.JITFunction) else None


class _KernelUnpickler(pickle.Unpickler):
    def persistent_load(self, name: Any) -> Any:
        __import__(name[0])
        return vars(sys.modules[name[0]])[name[1]]


def dumps(found: list[KernelLaunch]) -> bytes:
    """Launches for another process of this code, which may have another version of Triton."""
    file = io.BytesIO()
    _KernelPickler(file).dump(found)
    return file.getvalue()


def loads(data: bytes) -> list[KernelLaunch]:
    """What `dumps` wrote."""
    return list(_KernelUnpickler(io.BytesIO(data)).load())
