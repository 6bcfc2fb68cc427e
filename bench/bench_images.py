"""Complete generations: from a prompt to a PIL image."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import models
from bench.bench_parts import COMPILE_SECONDS
from bench.cold import dtype_argument
from bench.families import family_of
from bench.measure import Candidate, image_limit
from bench.options import COMPILED
from bench.roofline import Work, decode_work, encode_work, step_work, text_work
from bench.session import Session
from fastsd.bundled import BUNDLED
from fastsd.components import Components
from fastsd.kernels import dispatch
from fastsd.pipeline import Pipeline

PROMPT = "a lighthouse at dusk"
GUIDANCE = 7.5


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """`[N, H, W, 3]` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) / 255.0 for image in images]))


def initial_latents(components: Components, batch: int, size: int, count: int = 3) -> list[torch.Tensor]:
    """`count` initial latents, `[batch, C, h, w]`."""
    side, channels = size // components.vae.config.downscale, components.vae.config.latent_channels
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, channels, side, side, generator=generator) for _ in range(count)]


def image_work(components: Components, batch: int, size: int, steps: int, encodes: int = 0) -> list[Work]:
    """The work of `batch` images: two texts, guided steps, a decode per image, and the encodes of input images."""
    family = family_of(components)
    work = text_work(family, 2) + step_work(family, batch, size) * steps
    return work + decode_work(family, 1, size) * batch + encode_work(family, 1, size) * encodes


def load_diffusers(bench: Session, model: str, components: Components, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with the same weights."""
    folder = bench.options.model or (BUNDLED["digits"] if model == "digits" else None)
    if folder is None:
        return models.peer_pipeline(components)
    import diffusers

    kind = diffusers.DiffusionPipeline
    pipeline = kind.from_pretrained(folder, safety_checker=None, **dtype_argument(kind, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(bench.options.device)


def peers(
    bench: Session, model: str, components: Components, dtype: torch.dtype, arguments: dict[str, Any], batch: int,
    latents: list[torch.Tensor],
) -> tuple[list[Candidate], dict[str, str]]:  # fmt: skip
    """diffusers' candidates for complete images, with the scheduler of the checkpoint, which fastsd uses, too."""
    names = [name for name in bench.options.peers if name.startswith("diffusers")]
    if not names:
        return [], {}
    try:
        pipeline = load_diffusers(bench, model, components, dtype)
    except Exception as error:
        reason = f"missing: {type(error).__name__}: {str(error)[:120].partition(chr(10))[0]}"
        return [], dict.fromkeys(names, reason)
    eager = pipeline.unet
    compiled: list[Any] = []

    def candidate(name: str) -> Candidate:
        def prepare() -> None:
            models.channels_last(pipeline.vae, name != "diffusers")
            if name != COMPILED:
                models.channels_last(eager, name != "diffusers")
                pipeline.unet = eager
                return
            if not compiled:  # a separate network, since its CUDA graphs hold the addresses of the weights
                unet = copy.deepcopy(eager)
                models.channels_last(unet, True)
                compiled.append(torch.compile(unet, mode="max-autotune", fullgraph=True))
            pipeline.unet = compiled[0]

        compiles = name == COMPILED and bench.options.device.type == "cuda"

        def generate(i: int) -> Any:
            start = latents[i % len(latents)].to(bench.options.device, dtype)
            return pipeline([PROMPT] * batch, latents=start, **arguments).images

        return Candidate(name, generate, prepare, pixels, min_seconds=COMPILE_SECONDS if compiles else 0.0)

    return [candidate(name) for name in names], {}


def forced(generate: Any, backend: str) -> Any:
    """`generate` on another backend."""

    def run(i: int) -> Any:
        with dispatch.forced(backend):
            return generate(i)

    return run


def bench_image(bench: Session, publish: Any, model: str, batch: int, steps: int, dtype: torch.dtype) -> None:
    components = bench.components(model, dtype)
    size, device = bench.size(model, components), bench.options.device
    pipeline, eager = (models.pipeline_of(components, device, dtype, captured) for captured in (True, False))
    arguments: dict[str, Any] = {
        "num_inference_steps": steps, "guidance_scale": GUIDANCE, "width": size, "height": size,
    }  # fmt: skip
    latents = initial_latents(components, batch, size)

    def generate(i: int, pipe: Pipeline = pipeline) -> Any:
        prompts = [PROMPT] * batch
        return pipe(prompts, latents=latents[i % len(latents)], batch_size=batch, **arguments).images

    def generate_eagerly(i: int) -> Any:
        return generate(i, eager)

    own = [Candidate("fastsd", generate, read=pixels)]
    if device.type == "cuda":
        own.append(Candidate("fastsd, no graphs", generate_eagerly, read=pixels))
    if "pytorch" in bench.options.peers:
        own.append(Candidate("pytorch", forced(generate_eagerly, "torch"), read=pixels))
    others, missing = peers(bench, model, components, dtype, arguments, batch, latents)
    outcomes = bench.run_benchmark(
        "image", lambda: pixels(forced(generate_eagerly, "reference")(0)), own + others, dtype, 0,
        image_work(components, batch, size, steps), missing=missing,
        limit=image_limit(dtype, GUIDANCE, models.vae_dtype(components)), psnr=True,
        model=model, size=size, batch=batch, steps=steps,
    )  # fmt: skip
    publish(outcomes)
