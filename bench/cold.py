"""A cold process up to its first image, by phases; then the times of a new prompt, batch and size, and the memory.

    python -m bench.cold FOLDER --candidate fastsd|diffusers|diffusers-channels-last --dtype bf16 --steps 4 [--grow]

Prints one JSON object. `bench_cold.py` starts it, and adds the start time of the process, which only a parent can know.
The caller of a pipeline cannot see the end of the last step, so the last step and the decode are one phase.
"""

from __future__ import annotations

import time

STARTED = time.time()  # before the imports, whose time is a phase

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from bench.memory import DriverPeak  # noqa: E402

PROMPT, OTHER_PROMPT = "a lighthouse at dusk", "a red door in a white wall"
GUIDANCE = 7.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--candidate", default="fastsd")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--steps", type=int, default=4, help="at least 2")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--others", type=int, default=0, help="bytes in use on the GPU by other processes")
    parser.add_argument(
        "--grow", action="store_true", help="also measure a new prompt, batch and size, and the memory over five sizes"
    )
    parser.add_argument("--output", type=Path, help="file for the pixels of the first image (.npy)")
    print(json.dumps(measure(parser.parse_args())))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate the first image and, with `--grow`, the ones after it; returns the times and the memory."""
    import torch

    torch_imported = time.time()
    driver = DriverPeak(arguments.others)
    cuda = torch.cuda.is_available()
    if cuda:
        driver.start()
    imported, loaded, generate = _fastsd(arguments) if arguments.candidate == "fastsd" else _diffusers(arguments)
    ticks: list[float] = []

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.time()

    def image(prompt: str = PROMPT, size: int = arguments.size, batch: int = 1) -> tuple[float, Any]:
        ticks.clear()
        start = clock()
        images = generate(prompt, size, batch, lambda: ticks.append(clock()))
        return clock() - start, images

    began = clock()
    _, images = image()
    finished = clock()
    peak = _peak(cuda, driver)
    steps = [b - a for a, b in zip([began, *ticks], ticks)]
    result: dict[str, Any] = {
        "process_started": STARTED,
        "finished": finished,
        "split": {
            "import torch": torch_imported - STARTED,
            "other imports": imported - torch_imported,
            "weights": loaded - imported,
            "text, kernels, capture, first step": steps[0],
            "other steps but the last": sum(steps[1:]),
            "last step, decode": finished - ticks[-1],
        },
        "steady_step": sorted(steps[1:])[len(steps[1:]) // 2] if len(steps) > 1 else steps[0],
        "peak": peak,
    }
    if arguments.output:
        import numpy as np

        np.save(arguments.output, np.stack([np.asarray(image) for image in images]))
    if arguments.grow:
        result["again"] = {name: image(**change)[0] for name, change in _changes(arguments.size).items()}
        growth = []
        unit = max(8, arguments.size // 64 * 8)
        for k in range(5):
            image(size=arguments.size + unit * (k - 2))
            growth.append(_peak(cuda, driver))
        result["growth"] = growth
    return result


def _changes(size: int) -> dict[str, dict[str, Any]]:
    """The images after the first one. Those in the middle change something for the first time."""
    return {
        "same again": {},
        "new prompt": {"prompt": OTHER_PROMPT},
        "new resolution": {"size": size + 64},
        "new batch": {"batch": 2},
        "back to the first": {},
    }


def _initial_latents(size: int, batch: int, downscale: int, channels: int) -> Any:
    import torch

    shape = (batch, channels, size // downscale, size // downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


# Takes the prompt, the size, the batch and a function to call after each step but the last; returns the images.
Generate = Callable[[str, int, int, Callable[[], None]], Any]


def _fastsd(arguments: argparse.Namespace) -> tuple[float, float, Generate]:
    """Load fastsd; returns when its import and its loading ended, and the function that generates."""
    from fastsd.pipeline import Pipeline

    imported = time.time()
    pipeline = Pipeline.from_pretrained(arguments.folder, dtype=arguments.dtype)
    vae = pipeline.components.vae.config

    def generate(prompt: str, size: int, batch: int, tick: Callable[[], None]) -> Any:
        settings: dict[str, Any] = {
            "num_inference_steps": arguments.steps,
            "guidance_scale": GUIDANCE,
            "width": size,
            "height": size,
            "latents": _initial_latents(size, batch, vae.downscale, vae.latent_channels),
        }
        images = None
        for step in pipeline.stream([prompt] * batch, **settings):
            if step.result is None:
                tick()
            else:
                images = step.result.images
        return images

    return imported, time.time(), generate


def dtype_argument(kind: Any, dtype: Any) -> dict[str, Any]:
    """The dtype argument of this diffusers' `from_pretrained`: `torch_dtype` in older versions, now `dtype`."""
    documentation = kind.from_pretrained.__doc__ or ""
    return {"dtype" if re.search(r"^ *dtype \(", documentation, re.M) else "torch_dtype": dtype}


def _diffusers(arguments: argparse.Namespace) -> tuple[float, float, Generate]:
    """Load diffusers; as `_fastsd`."""
    import torch
    from diffusers import DiffusionPipeline

    from fastsd.runtime.devices import DTYPES

    imported = time.time()
    dtype = dtype_argument(DiffusionPipeline, DTYPES[arguments.dtype])
    pipeline = DiffusionPipeline.from_pretrained(arguments.folder, safety_checker=None, **dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.candidate == "diffusers-channels-last":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)

    def generate(prompt: str, size: int, batch: int, tick: Callable[[], None]) -> Any:
        def on_step_end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index < arguments.steps - 1:
                tick()
            return tensors

        latents = _initial_latents(size, batch, pipeline.vae_scale_factor, 4)
        latents = latents.to(pipeline.device, DTYPES[arguments.dtype])
        return pipeline(
            [prompt] * batch,
            num_inference_steps=arguments.steps,
            guidance_scale=GUIDANCE,
            width=size,
            height=size,
            latents=latents,
            callback_on_step_end=on_step_end,
        ).images

    return imported, time.time(), generate


def _peak(cuda: bool, driver: DriverPeak) -> dict[str, int]:
    """Peak memory in bytes: resident; on a GPU also by PyTorch's allocator and, since the last call, by the driver."""
    peaks = {"resident": resident_peak()}
    if cuda:
        import torch

        peaks["allocator"] = torch.cuda.max_memory_allocated()
        peaks["reserved"] = torch.cuda.max_memory_reserved()
        driver_peak = driver.take()
        if driver_peak is not None:
            peaks["driver"] = driver_peak
    return peaks


def resident_peak() -> int:
    """The peak resident memory in bytes. On Linux not from `ru_maxrss`, which a child inherits from its parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
