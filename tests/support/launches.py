"""Every launch of our kernels on sm_90, compiled by the Triton that comes first on the path.

    python -m tests.support.launches     prints as JSON: its version, how many launches it compiled, and what is wrong

The models tell what they launch: they run here on tensors that have shapes but no memory. The launches of the compile
report come after them. Many are the same to the compiler, and compiled once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import nn
from torch.overrides import TorchFunctionMode

from bench import compile_report
from bench.compile_report import KernelLaunch
from bench.compiled import SHARED, source_of
from fastsd import config
from fastsd.kernels import advance, dispatch
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.model.vae import AutoencoderKL

SM = 90
UNETS = [  # sides of the latent; blocks of keys divide those of the first, not all of those of the second
    ("SD1.5", config.SD15_UNET, ((64, 64), (65, 65))),
    ("SD2.1", config.SD21_UNET, ((96, 96), (64, 65))),
    ("SDXL", config.SDXL_UNET, ((128, 128), (104, 152))),
]
ENCODERS = {"CLIP": config.CLIP_L, "OpenCLIP H": config.OPENCLIP_H, "OpenCLIP bigG": config.OPENCLIP_BIGG}

Calls = Iterator[tuple[str, Callable[[], Any]]]

EVERY: list[KernelLaunch] = []  # what processes that are forked from this one find here: kernels cannot be sent to them


class ChannelsLast(TorchFunctionMode):
    """Inside this context convolutions answer as on CUDA, where their weights' channels come last."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y.contiguous(memory_format=torch.channels_last) if func in (torch.conv2d, F.interpolate) else y


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def built(kind: Callable[..., nn.Module], settings: Any, dtype: torch.dtype = torch.float16) -> Any:
    with torch.device("meta"):
        return kind(settings).to(dtype).to(memory_format=torch.channels_last).eval()


def models() -> Calls:
    """Each model's name and a call of it."""
    for name, settings, sizes in UNETS:
        unet, time = built(UNet, settings), empty(2, dtype=torch.float32)
        added = AddedConditioning(empty(2, 1280), empty(2, 6)) if settings.addition_time_embed_dim else None
        for size in sizes:
            inputs = empty(2, *size, 4), time, empty(2, 77, settings.cross_attention_dim), added
            yield f"{name} {size[0]}x{size[1]}", lambda unet=unet, inputs=inputs: unet(*inputs)
    for name, settings in ENCODERS.items():
        encoder = built(TextEncoder, settings)
        yield name, lambda encoder=encoder: encoder(empty(1, 77, dtype=torch.int64))
    for dtype, side in ((torch.float16, 64), (torch.float16, 128), (torch.bfloat16, 128), (torch.float32, 128)):
        vae, like = built(AutoencoderKL, config.SD_VAE, dtype), {"dtype": dtype}
        latent, image = empty(1, side, side, 4, **like), empty(1, 8 * side, 8 * side, 3, **like)
        name = f"VAE {str(dtype)[6:]} {side}x{side}"
        yield name + " decode", lambda vae=vae, latent=latent: vae.decode(latent)
        yield name + " encode", lambda vae=vae, image=image: vae.encode(image)


def steps() -> Calls:
    """The sampler's step without guidance, and with each way of giving it."""
    number, wide = empty(1, dtype=torch.int64), {"dtype": torch.float32}
    shape = (1, 64, 64, 4)
    for batch, guidance in ((1, 1.0), (2, 7.5), (2, empty(1, **wide))):
        for rescale in (None, empty(1, **wide)):
            buffers = empty(*shape, **wide), empty(*shape), empty(batch, *shape[1:]), empty(31, 16, **wide), number
            rest = empty(*shape, **wide), empty(3, *shape, **wide), empty(2, *shape, **wide), guidance, rescale
            yield "step", lambda given=(*buffers, *rest): advance.advance(*given)
    for guidance in (7.5, empty(1, **wide)):  # of a text and an image
        buffers = empty(*shape, **wide), empty(*shape), empty(3, *shape[1:]), empty(31, 16, **wide), number
        rest = empty(*shape, **wide), empty(3, *shape, **wide), empty(2, *shape, **wide), guidance, None, guidance
        yield "step", lambda given=(*buffers, *rest): advance.advance(*given)


def launches(sm: int = SM) -> list[KernelLaunch]:
    """What all of that launches on sm_`sm`, the models first; one of those that are the same to the compiler."""
    found: list[KernelLaunch] = []
    for calls in (models(), steps()) if sm >= 80 else (steps(),):  # our attention refuses sm_75
        for name, call in calls:

            def tell(kernel: Any, arguments: dict[str, Any], name: str = name) -> None:
                found.append(KernelLaunch(f"{name}: {kernel.fn.__name__}", kernel, arguments))

            with (
                compile_report.intercepted_launches(sm, tell),
                dispatch.forced("triton"),
                torch.no_grad(),
                ChannelsLast(),
            ):
                call()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found += [replace(launch, case=f"{launch.case} {dtype}") for launch in compile_report.launches(sm, dtype)]
    return list({key_of(launch): launch for launch in reversed(found)}.values())[::-1]


def key_of(launch: KernelLaunch) -> tuple[Any, ...]:
    """What the compiler is given."""
    options = (launch.arguments.get(name) for name in ("num_warps", "num_stages", "maxnreg"))
    return (source_of(launch.kernel, launch.arguments).hash(), *options)


def wrong(launch: KernelLaunch) -> str | None:
    """Why this launch is not as it should be."""
    try:
        made = compile_report.compiled(launch, SM)
    except Exception as error:  # of any kind: the compiler's own, and those of the tools that it calls
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"{launch.case}: {type(error).__name__}: {(str(cause).strip().splitlines() or ['no message'])[-1]}"
    # Exact fp32 attention has no tensor cores to wait for: there the assembler may prefer one more program, and keep a
    # number or two in memory outside the loop.
    spills = made.spills if launch.arguments.get("q_ptr") != torch.float32 else 0
    if spills or made.shared > SHARED[SM]:
        return f"{launch.case}: {made.spills} bytes spilled, {made.shared} bytes of shared memory"
    return None


def wrong_of(i: int) -> str | None:
    return wrong(EVERY[i])


def main() -> None:
    EVERY.extend(launches())
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        answers = pool.map(wrong_of, range(len(EVERY)), chunksize=1)
    told = {"triton": triton.__version__, "compiled": len(answers), "wrong": [x for x in answers if x is not None]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
