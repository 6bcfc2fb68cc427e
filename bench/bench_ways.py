"""Other ways to a picture: from a picture, around a mask, and with the step counts of distilled models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import models
from bench.bench_images import GUIDANCE, PROMPT, forced, picture_work, pixels, theirs
from bench.measure import Candidate, image_limit
from bench.session import Session
from fastsd.components import Components
from fastsd.generate.latents import FEATHER
from fastsd.pipeline import Pipeline

# Distilled models: the sampler, diffusers' name for it, steps; without guidance.
FEW = {"turbo": ("euler", "EulerDiscreteScheduler", 1), "lcm": ("lcm", "LCMScheduler", 4)}
SEEDS = (7, 8, 9)  # taken in turn


@dataclass(frozen=True)
class Way:
    """One kind of picture: the arguments that both sides take, and how many UNet calls and encodings it is."""

    kind: str
    arguments: dict[str, Any]  # by fastsd's names, which are diffusers' own here
    sampler: str | None
    runs: int
    encodes: int
    inside: slice | None  # of both axes: the pixels that are compared, where not all are

    def read(self, images: list[Image.Image]) -> torch.Tensor:
        found = pixels(images)
        return found if self.inside is None else found[:, self.inside, self.inside]


def way(kind: str, size: int, steps: int) -> Way:
    """What is drawn for each of the kinds, at `size` pixels."""
    if kind in FEW:
        sampler, _, runs = FEW[kind]
        arguments = {"guidance_scale": 1.0, "num_inference_steps": runs, "width": size, "height": size}
        return Way(kind, arguments, sampler, runs, 0, None)
    noise = np.random.RandomState(0).randint(0, 256, (size, size, 3), dtype=np.uint8)
    arguments = {"image": Image.fromarray(noise), "guidance_scale": GUIDANCE, "num_inference_steps": steps}
    if kind == "img2img":
        return Way(kind, arguments | {"strength": 0.5}, None, max(1, steps // 2), 1, None)
    # On the latent's edges. Outside, and faded into at its rim, fastsd gives the picture back as it was; diffusers
    # gives it decoded anew.
    area = np.zeros((size, size), dtype=np.uint8)
    area[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
    arguments |= {"mask_image": Image.fromarray(area), "strength": 1.0}
    return Way(kind, arguments, None, steps, 1, slice(size // 4 + 2 * FEATHER, 3 * size // 4 - 2 * FEATHER))


def noise_of(seed: int, components: Components, size: int, skip: int = 0) -> torch.Tensor:
    """The start noise that fastsd draws from a seed, after `skip` other ones; `[1, C, h, w]`."""
    side, channels = size // components.vae.config.downscale, components.vae.config.latent_channels
    generator = torch.Generator().manual_seed(seed)
    for _ in range(skip):
        torch.randn(1, channels, side, side, generator=generator)
    return torch.randn(1, channels, side, side, generator=generator)


def encoded(vae: Any, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sampled, scaled latent, its noise drawn in fp32: diffusers draws in 16 bits, which gives other numbers."""
    spread = vae.encode(image).latent_dist
    noise = torch.randn(spread.mean.shape, generator=generator).to(image.device, image.dtype)
    return (spread.mean + spread.std * noise) * vae.config.scaling_factor


def peer_of(kind: str, other: Any) -> Any:
    """diffusers' pipeline for a kind, of the parts of its text-to-image pipeline; given the noise that fastsd has."""
    import diffusers

    class FromPicture(diffusers.StableDiffusionImg2ImgPipeline):  # type: ignore[misc, name-defined]
        def prepare_latents(
            self, image: Any, timestep: Any, batch_size: int, num_images_per_prompt: int, dtype: Any, device: Any,
            generator: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            latent = encoded(self.vae, image.to(device, dtype), generator)
            noise = torch.randn(latent.shape, generator=generator).to(device, dtype)
            return self.scheduler.add_noise(latent, noise, timestep)

    class AroundMask(diffusers.StableDiffusionInpaintPipeline):  # type: ignore[misc, name-defined]
        def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
            return encoded(self.vae, image, generator)

    made = other
    if kind in FEW:
        made.scheduler = getattr(diffusers, FEW[kind][1]).from_config(other.scheduler.config)
    else:
        parts = {name: part for name, part in other.components.items() if name != "image_encoder"}
        made = (FromPicture if kind == "img2img" else AroundMask)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def incomparable(way: Way, components: Components, dtype: torch.dtype) -> str:
    """Why diffusers' picture could not be the same one; "" where it can."""
    if way.encodes and len(components.text_encoders) > 1:
        return "not compared: only Stable Diffusion 1 and 2 from a picture"
    if way.kind == "lcm" and dtype != torch.float32:
        return "not comparable: LCMScheduler draws its noise in 16 bits, which gives other numbers"
    return ""


def peers(
    bench: Session, model: str, components: Components, way: Way, size: int, dtype: torch.dtype
) -> tuple[list[Candidate], dict[str, str]]:
    """diffusers' candidates, and those that cannot take part with the reason."""
    wanted = [name for name in bench.options.peers if name.startswith("diffusers")]
    missing = {name: "not run: its UNet is that of the step and of text to image" for name in wanted if "comp" in name}
    wanted = [name for name in wanted if name not in missing]
    if not wanted:
        return [], missing
    if why := incomparable(way, components, dtype):
        return [], dict.fromkeys(wanted, why) | missing
    try:
        other = peer_of(way.kind, theirs(bench, model, components, dtype))
    except Exception as error:
        said = f"missing: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        return [], dict.fromkeys(wanted, said) | missing

    def candidate(name: str) -> Candidate:
        def prepare() -> None:
            for module in (other.unet, other.vae):
                models.channels_last(module, name != "diffusers")

        def draw(i: int) -> Any:
            seed = SEEDS[i % len(SEEDS)]
            arguments = way.arguments | {"generator": torch.Generator().manual_seed(seed)}
            if way.kind in FEW:  # the generator's first; LCM goes on drawing
                start = torch.randn(shape, generator=arguments["generator"])
                arguments["latents"] = start.to(bench.options.device, dtype)
            elif way.kind == "inpaint":
                arguments["latents"] = noise_of(seed, components, size, skip=1).to(bench.options.device, dtype)
                arguments |= {"width": size, "height": size}
            return other(PROMPT, **arguments).images

        return Candidate(name, draw, prepare, way.read)

    shape = noise_of(0, components, size).shape
    return [candidate(name) for name in wanted], missing


@pytest.mark.parametrize("kind", ["img2img", "inpaint", *FEW])
def bench_ways(bench: Session, replay: Any, model: str, kind: str, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    size = bench.size(model, components)
    pipeline, eager = (models.pipeline_of(components, device, dtype, captured) for captured in (True, False))
    how = way(kind, size, min(bench.options.steps))
    arguments = how.arguments | ({"sampler": how.sampler} if how.sampler else {})

    def draw(i: int, by: Pipeline = pipeline) -> Any:
        return by(PROMPT, **arguments, seed=SEEDS[i % len(SEEDS)]).images

    reference: Callable[[int], Any] = forced(lambda i: draw(i, eager), "reference")
    guidance = how.arguments["guidance_scale"]
    work = picture_work(components, 1, size, how.runs, how.encodes) if guidance != 1.0 else None
    others, missing = peers(bench, model, components, how, size, dtype)
    outcomes = bench.contest(
        kind, lambda: how.read(reference(0)), [Candidate("fastsd", draw, read=how.read), *others], dtype, 0, work,
        limit=image_limit(dtype, guidance), psnr=True, missing=missing,
        model=model, size=size, batch=1, steps=how.runs,
    )  # fmt: skip
    replay(outcomes)
