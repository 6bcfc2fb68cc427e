"""One cold process to its first picture, in its parts; then what a new prompt, batch or size costs, and the memory.

    python -m bench.cold FOLDER --candidate fastsd|diffusers|diffusers-channels-last --dtype bf16 --steps 4 [--grow]

Prints one JSON object. `bench_cold.py` starts it and adds what only a parent can see: when the process was started.
For a caller the last step ends with the picture, so these two are one part.
"""

from __future__ import annotations

import time

STARTED = time.time()  # before the imports, which are part of what is measured

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
    parser.add_argument("--others", type=int, default=0, help="bytes that other processes hold on the GPU")
    parser.add_argument("--grow", action="store_true", help="also new prompts, batches, sizes, and memory over five")
    parser.add_argument("--output", type=Path, help="where the first picture's pixels go (.npy)")
    arguments = parser.parse_args()

    import torch

    driver = DriverPeak(arguments.others)
    if torch.cuda.is_available():
        driver.start()
    imported, loaded, draw = _fastsd(arguments) if arguments.candidate == "fastsd" else _diffusers(arguments)
    cuda = torch.cuda.is_available()
    ticks: list[float] = []

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.time()

    def picture(prompt: str = PROMPT, size: int = arguments.size, batch: int = 1) -> tuple[float, Any]:
        ticks.clear()
        start = clock()
        images = draw(prompt, size, batch, lambda: ticks.append(clock()))
        return clock() - start, images

    began = clock()
    _, images = picture()
    done = clock()
    peak = _peak(cuda, driver)
    steps = [b - a for a, b in zip([began, *ticks], ticks)]
    steady = sorted(steps[1:])[len(steps[1:]) // 2] if len(steps) > 1 else steps[0]
    found: dict[str, Any] = {
        "process_started": STARTED,
        "finished": done,
        "split": {
            "import": imported - STARTED,
            "weights": loaded - imported,
            "text, kernels, capture, first step": steps[0],
            "other steps but the last": sum(steps[1:]),
            "last step, decode": done - ticks[-1],
        },
        "steady_step": steady,
        "peak": peak,
    }
    if arguments.output:
        import numpy as np

        np.save(arguments.output, np.stack([np.asarray(image) for image in images]))
    if arguments.grow:
        found["again"] = {name: picture(**change)[0] for name, change in _changes(arguments.size).items()}
        growth = []
        unit = max(8, arguments.size // 64 * 8)
        for k in range(5):
            picture(size=arguments.size + unit * (k - 2))
            growth.append(_peak(cuda, driver))
        found["growth"] = growth
    print(json.dumps(found))


def _changes(size: int) -> dict[str, dict[str, Any]]:
    """What is drawn after the first picture; each is the first of its kind, but for the first and the last."""
    return {
        "same again": {},
        "new prompt": {"prompt": OTHER_PROMPT},
        "new resolution": {"size": size + 64},
        "new batch": {"batch": 2},
        "back to the first": {},
    }


def _noise(size: int, batch: int, downscale: int, channels: int) -> Any:
    import torch

    shape = (batch, channels, size // downscale, size // downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


Draw = Callable[[str, int, int, Callable[[], None]], Any]


def _fastsd(arguments: argparse.Namespace) -> tuple[float, float, Draw]:
    from fastsd.pipeline import Pipeline

    imported = time.time()
    pipeline = Pipeline.from_pretrained(arguments.folder, dtype=arguments.dtype)
    vae = pipeline.components.vae.config

    def draw(prompt: str, size: int, batch: int, tick: Callable[[], None]) -> Any:
        settings: dict[str, Any] = {
            "num_inference_steps": arguments.steps,
            "guidance_scale": GUIDANCE,
            "width": size,
            "height": size,
            "latents": _noise(size, batch, vae.downscale, vae.latent_channels),
        }
        images = None
        for step in pipeline.stream([prompt] * batch, **settings):
            if step.result is None:
                tick()
            else:
                images = step.result.images
        return images

    return imported, time.time(), draw


def dtype_argument(kind: Any, dtype: Any) -> dict[str, Any]:
    """The dtype by the name that this diffusers' `from_pretrained` gives it: `torch_dtype` of old, now `dtype`."""
    said = kind.from_pretrained.__doc__ or ""
    return {"dtype" if re.search(r"^ +dtype \(", said, re.M) else "torch_dtype": dtype}


def _diffusers(arguments: argparse.Namespace) -> tuple[float, float, Draw]:
    import torch
    from diffusers import DiffusionPipeline

    from fastsd.runtime.devices import DTYPES

    imported = time.time()
    named = dtype_argument(DiffusionPipeline, DTYPES[arguments.dtype])
    pipeline = DiffusionPipeline.from_pretrained(arguments.folder, safety_checker=None, **named)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.candidate == "diffusers-channels-last":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)

    def draw(prompt: str, size: int, batch: int, tick: Callable[[], None]) -> Any:
        def ended(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index < arguments.steps - 1:
                tick()
            return tensors

        latents = _noise(size, batch, pipeline.vae_scale_factor, 4).to(pipeline.device, DTYPES[arguments.dtype])
        return pipeline(
            [prompt] * batch,
            num_inference_steps=arguments.steps,
            guidance_scale=GUIDANCE,
            width=size,
            height=size,
            latents=latents,
            callback_on_step_end=ended,
        ).images

    return imported, time.time(), draw


def _peak(cuda: bool, driver: DriverPeak) -> dict[str, int]:
    """Bytes at the peak: resident memory of the process; on a GPU as torch's allocator and as the driver see it (the
    driver's since the last call)."""
    found = {"resident": resident_peak()}
    if cuda:
        import torch

        found["allocator"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
        most = driver.take()
        if most is not None:
            found["driver"] = most
    return found


def resident_peak() -> int:
    """Bytes. Not `ru_maxrss` where it can be avoided: Linux hands a child its parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
