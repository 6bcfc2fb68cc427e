"""Pictures from end to end: a prompt to a PIL image, and what a step of that costs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import models
from bench.bench_parts import COMPILING
from bench.cold import dtype_argument
from bench.families import family_of
from bench.measure import Candidate, image_limit
from bench.roofline import Work, decode_work, encode_work, step_work, text_work
from bench.session import Session
from fastsd.components import Components
from fastsd.kernels import dispatch
from fastsd.pipeline import BUNDLED, Pipeline

PROMPT = "a lighthouse at dusk"
GUIDANCE = 7.5


def pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images]))


def noises(components: Components, batch: int, size: int, count: int = 3) -> list[torch.Tensor]:
    side, channels = size // components.vae.config.downscale, components.vae.config.latent_channels
    make = torch.Generator().manual_seed(7)
    return [torch.randn(batch, channels, side, side, generator=make) for _ in range(count)]


def picture_work(components: Components, batch: int, size: int, steps: int, encodes: int = 0) -> list[Work]:
    """All that `batch` pictures take: two texts, guided steps, decoding one by one, encoding where there is one."""
    family = family_of(components)
    work = text_work(family, 2) + step_work(family, batch, size) * steps
    return work + decode_work(family, 1, size) * batch + encode_work(family, 1, size) * encodes


def theirs(bench: Session, model: str, components: Components, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with the same weights."""
    folder = bench.options.model or (BUNDLED if model == "digits" else None)
    if folder is None:
        return models.peer_pipeline(components)
    import diffusers

    kind = diffusers.DiffusionPipeline
    found = kind.from_pretrained(folder, safety_checker=None, **dtype_argument(kind, dtype))
    found.set_progress_bar_config(disable=True)
    return found.to(bench.options.device)


def peers(
    bench: Session, model: str, components: Components, dtype: torch.dtype, arguments: dict[str, Any], batch: int,
    latents: list[torch.Tensor],
) -> tuple[list[Candidate], dict[str, str]]:  # fmt: skip
    """diffusers' candidates for pictures; its scheduler is the checkpoint's own, like ours."""
    wanted = [name for name in bench.options.peers if name.startswith("diffusers")]
    if not wanted:
        return [], {}
    try:
        other = theirs(bench, model, components, dtype)
    except Exception as error:
        return [], {
            name: f"missing: {type(error).__name__}: {str(error)[:120].partition(chr(10))[0]}" for name in wanted
        }
    eager = other.unet
    compiled: list[Any] = []

    def candidate(name: str) -> Candidate:
        def prepare() -> None:
            models.channels_last(other.vae, name != "diffusers")
            if name != "diffusers-compiled":
                models.channels_last(eager, name != "diffusers")
                other.unet = eager
                return
            if not compiled:  # of its own: the CUDA graphs in it know its weights by their addresses
                own = copy.deepcopy(eager)
                models.channels_last(own, True)
                compiled.append(torch.compile(own, mode="max-autotune", fullgraph=True))
            other.unet = compiled[0]

        needs = COMPILING if name == "diffusers-compiled" and bench.options.device.type == "cuda" else 0.0

        def draw(i: int) -> Any:
            start = latents[i % len(latents)].to(bench.options.device, dtype)
            return other([PROMPT] * batch, latents=start, **arguments).images

        return Candidate(name, draw, prepare, pixels, needs=needs)

    return [candidate(name) for name in wanted], {}


def forced(draw: Any, name: str) -> Any:
    def run(i: int) -> Any:
        with dispatch.forced(name):
            return draw(i)

    return run


def bench_image(bench: Session, replay: Any, model: str, batch: int, steps: int, dtype: torch.dtype) -> None:
    components = bench.components(model, dtype)
    size, device = bench.size(model, components), bench.options.device
    pipeline, eager = (models.pipeline_of(components, device, dtype, captured) for captured in (True, False))
    arguments: dict[str, Any] = {
        "num_inference_steps": steps, "guidance_scale": GUIDANCE, "width": size, "height": size,
    }  # fmt: skip
    latents = noises(components, batch, size)

    def draw(i: int, by: Pipeline = pipeline) -> Any:
        prompts = [PROMPT] * batch
        return by(prompts, latents=latents[i % len(latents)], batch_size=batch, **arguments).images

    def draw_eagerly(i: int) -> Any:
        return draw(i, eager)

    mine = [Candidate("fastsd", draw, read=pixels)]
    if device.type == "cuda":
        mine.append(Candidate("fastsd, no graphs", draw_eagerly, read=pixels))
    if "pytorch" in bench.options.peers:
        mine.append(Candidate("pytorch", forced(draw_eagerly, "torch"), read=pixels))
    others, missing = peers(bench, model, components, dtype, arguments, batch, latents)
    outcomes = bench.contest(
        "image", lambda: pixels(forced(draw_eagerly, "reference")(0)), mine + others, dtype, 0,
        picture_work(components, batch, size, steps), limit=image_limit(dtype, GUIDANCE), psnr=True, missing=missing,
        model=model, size=size, batch=batch, steps=steps,
    )  # fmt: skip
    replay(outcomes)
