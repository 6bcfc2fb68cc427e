"""Other generation modes: img2img, inpainting, and the step counts of distilled models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench import models
from bench.bench_images import GUIDANCE, PROMPT, forced, image_work, load_diffusers, pixels
from bench.measure import Candidate, image_limit
from bench.session import Session
from fastsd.components import Components
from fastsd.pipeline import Pipeline

# Distilled models: the sampler, diffusers' name for it, steps. Without guidance.
FEW_STEP = {"turbo": ("euler", "EulerDiscreteScheduler", 1), "lcm": ("lcm", "LCMScheduler", 4)}
MODES = ("img2img", "inpaint", *FEW_STEP)
SEEDS = (7, 8, 9)


@dataclass(frozen=True)
class Mode:
    """A generation mode: the arguments of both sides, and the numbers of UNet calls and VAE encodes."""

    name: str
    arguments: dict[str, Any]  # the names are the same in fastsd and diffusers
    sampler: str | None
    unet_calls: int
    encodes: int
    compared: slice | None  # of both axes: the pixels that are compared; None: all

    def read(self, images: list[Image.Image]) -> torch.Tensor:
        """The compared pixels."""
        image = pixels(images)
        return image if self.compared is None else image[:, self.compared, self.compared]


def make_mode(name: str, size: int, steps: int) -> Mode:
    """A mode by name, at `size` pixels."""
    if name in FEW_STEP:
        sampler, _, few_steps = FEW_STEP[name]
        arguments = {"guidance_scale": 1.0, "num_inference_steps": few_steps, "width": size, "height": size}
        return Mode(name, arguments, sampler, few_steps, 0, None)
    noise = np.random.RandomState(0).randint(0, 256, (size, size, 3), dtype=np.uint8)
    arguments = {"image": Image.fromarray(noise), "guidance_scale": GUIDANCE, "num_inference_steps": steps}
    if name == "img2img":
        return Mode(name, arguments | {"strength": 0.5}, None, max(1, steps // 2), 1, None)
    # The mask ends at latent boundaries. Outside, fastsd keeps the input image, while diffusers returns a
    # decoded copy. So only the inside is compared.
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
    arguments |= {"mask_image": Image.fromarray(mask), "strength": 1.0}
    inside = slice(size // 4, 3 * size // 4)
    return Mode(name, arguments, None, steps, 1, inside)


def sample_noise(seed: int, components: Components, size: int, skip: int = 0) -> torch.Tensor:
    """The noise that fastsd samples from a seed, after `skip` earlier samples; `[1, C, h, w]`."""
    side, channels = size // components.vae.config.downscale, components.vae.config.latent_channels
    generator = torch.Generator().manual_seed(seed)
    for _ in range(skip):
        torch.randn(1, channels, side, side, generator=generator)
    return torch.randn(1, channels, side, side, generator=generator)


def encode(vae: Any, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sampled, scaled latent, with noise in fp32 as in fastsd; diffusers' noise in 16 bits has other values."""
    posterior = vae.encode(image).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(image.device, image.dtype)
    return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor


def peer_pipeline(mode: str, text_to_image: Any) -> Any:
    """diffusers' pipeline for a mode, from the components of its text-to-image pipeline, with the noise of fastsd."""
    import diffusers

    class Img2Img(diffusers.StableDiffusionImg2ImgPipeline):  # type: ignore[misc, name-defined]
        def prepare_latents(
            self, image: Any, timestep: Any, batch_size: int, num_images_per_prompt: int, dtype: Any, device: Any,
            generator: Any = None,
        ) -> torch.Tensor:  # fmt: skip
            latent = encode(self.vae, image.to(device, dtype), generator)
            noise = torch.randn(latent.shape, generator=generator).to(device, dtype)
            return self.scheduler.add_noise(latent, noise, timestep)

    class Inpaint(diffusers.StableDiffusionInpaintPipeline):  # type: ignore[misc, name-defined]
        def _encode_vae_image(self, image: torch.Tensor, generator: Any) -> torch.Tensor:
            return encode(self.vae, image, generator)

    pipeline = text_to_image
    if mode in FEW_STEP:
        pipeline.scheduler = getattr(diffusers, FEW_STEP[mode][1]).from_config(text_to_image.scheduler.config)
    else:
        parts = {name: part for name, part in text_to_image.components.items() if name != "image_encoder"}
        pipeline = (Img2Img if mode == "img2img" else Inpaint)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def why_not_comparable(mode: Mode, components: Components, dtype: torch.dtype) -> str:
    """Why diffusers' image cannot match; "" if it can."""
    if mode.encodes and len(components.text_encoders) > 1:
        return "not compared: modes with an input image are compared for Stable Diffusion 1 and 2 only"
    if mode.name == "lcm" and dtype != torch.float32:
        return "not comparable: LCMScheduler samples its noise in 16 bits, which gives other values"
    return ""


def peers(
    bench: Session, model: str, components: Components, mode: Mode, size: int, dtype: torch.dtype
) -> tuple[list[Candidate], dict[str, str]]:
    """diffusers' candidates, and the reasons of those that cannot take part."""
    names = [name for name in bench.options.peers if name.startswith("diffusers")]
    compiled = [name for name in names if name == "diffusers-compiled"]
    missing = dict.fromkeys(compiled, "not run: the step and text-to-image benchmarks measure its UNet")
    names = [name for name in names if name not in missing]
    if not names:
        return [], missing
    if reason := why_not_comparable(mode, components, dtype):
        return [], dict.fromkeys(names, reason) | missing
    try:
        pipeline = peer_pipeline(mode.name, load_diffusers(bench, model, components, dtype))
    except Exception as error:
        reason = f"missing: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        return [], dict.fromkeys(names, reason) | missing

    def candidate(name: str) -> Candidate:
        def prepare() -> None:
            for module in (pipeline.unet, pipeline.vae):
                models.channels_last(module, name != "diffusers")

        def generate(i: int) -> Any:
            seed = SEEDS[i % len(SEEDS)]
            arguments = mode.arguments | {"generator": torch.Generator().manual_seed(seed)}
            if mode.name in FEW_STEP:  # the first sample of the generator; LCM takes more from it later
                start = torch.randn(shape, generator=arguments["generator"])
                arguments["latents"] = start.to(bench.options.device, dtype)
            elif mode.name == "inpaint":
                arguments["latents"] = sample_noise(seed, components, size, skip=1).to(bench.options.device, dtype)
                arguments |= {"width": size, "height": size}
            return pipeline(PROMPT, **arguments).images

        return Candidate(name, generate, prepare, mode.read)

    shape = sample_noise(0, components, size).shape
    return [candidate(name) for name in names], missing


@pytest.mark.parametrize("name", MODES)
def bench_mode(bench: Session, publish: Any, model: str, name: str, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    size = bench.size(model, components)
    pipeline, eager = (models.pipeline_of(components, device, dtype, captured) for captured in (True, False))
    mode = make_mode(name, size, min(bench.options.steps))
    arguments = mode.arguments | ({"sampler": mode.sampler} if mode.sampler else {})

    def generate(i: int, pipe: Pipeline = pipeline) -> Any:
        return pipe(PROMPT, **arguments, seed=SEEDS[i % len(SEEDS)]).images

    reference: Callable[[int], Any] = forced(lambda i: generate(i, eager), "reference")
    guidance = mode.arguments["guidance_scale"]
    work = image_work(components, 1, size, mode.unet_calls, mode.encodes) if guidance != 1.0 else None
    others, missing = peers(bench, model, components, mode, size, dtype)
    outcomes = bench.run_benchmark(
        name, lambda: mode.read(reference(0)), [Candidate("fastsd", generate, read=mode.read), *others], dtype, 0, work,
        limit=image_limit(dtype, guidance, models.vae_dtype(components)), psnr=True, missing=missing,
        model=model, size=size, batch=1, steps=mode.unet_calls,
    )  # fmt: skip
    publish(outcomes)
