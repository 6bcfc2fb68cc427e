"""What a batch starts from: noise, an image, an image with a mask, or the first pass of the hires fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from fastsd.components import Components
from fastsd.errors import about
from fastsd.generate.beside import depth_latent, edited_latent
from fastsd.generate.latents import INTERPOLATION, Codec, enlarge, image_tensor, to_channels_last
from fastsd.generate.noise import Noise
from fastsd.generate.request import Pass
from fastsd.generate.sizes import RESAMPLING


@dataclass(frozen=True)
class Start:
    """The tensors that a batch starts from.

    Attributes:
        noise: `[n, h, w, C]`, unit variance.
        image: `[n, h, w, C]`, scaled latents that the noise is added to; None: pure noise.
        mask: `[1, h, w, 1]` in [0, 1]: latents follow `image` until it frees them, see `free_latents`; or None.
        extra_channels: what the UNet reads beside the latent, `[n, h, w, channels]`: mask and masked image, the image
            to edit, or a depth map; or None.
    """

    noise: torch.Tensor
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    extra_channels: torch.Tensor | None = None


def start_batch(
    components: Components, codec: Codec, stage: Pass, which: slice, noise: Noise, first: torch.Tensor | None
) -> Start:
    """The start of one batch of a pass, by its mode and by what the UNet reads.

    Args:
        which: the images of the batch.
        noise: of these images.
        first: `[n, h, w, C]`, the first pass's latents, in the second pass.
    """
    reads = components.unet.config.reads
    start = _start(codec, stage, which, noise, reads, first)
    if reads == "image" and stage.image is not None:
        extra = edited_latent(codec, stage.image, stage.vae_tiling, components)
    elif stage.depth is not None:
        extra = depth_latent(stage.depth, *noise.shape[1:])
    else:
        return start
    return replace(start, extra_channels=extra.to(noise.device).expand(len(start.noise), -1, -1, -1))


def _start(
    codec: Codec, stage: Pass, which: slice, noise: Noise, reads: str | None, first: torch.Tensor | None
) -> Start:
    """The start without the image to edit and the depth map."""
    if first is not None:
        return second_pass(codec, stage, noise, first)
    if stage.image is None:
        return text_to_image(stage, which, noise)
    if stage.mask is None:
        edits = reads == "image" and stage.strength == 1.0  # nothing of the image is left, and the UNet reads it
        return text_to_image(stage, which, noise) if edits else image_to_image(codec, stage, which, noise)
    return (inpaint_by_unet if reads == "mask" else inpaint_by_mask)(codec, stage, which, noise)


def text_to_image(stage: Pass, which: slice, noise: Noise) -> Start:
    """Pure noise: the caller's, or fresh."""
    if stage.latents is None:
        return Start(noise.first())
    return Start(to_channels_last(stage.latents[which]).to(noise.device))


def image_to_image(codec: Codec, stage: Pass, which: slice, noise: Noise) -> Start:
    """The encoded image; noise is added to it."""
    assert stage.image is not None
    image = codec.encode(image_tensor(stage.image), noise.encoding(), stage.vae_tiling)
    return replace(text_to_image(stage, which, noise), image=image)


def inpaint_by_mask(codec: Codec, stage: Pass, which: slice, noise: Noise) -> Start:
    """Latents outside the mask follow the image after each step, for any UNet."""
    assert stage.mask is not None
    start = image_to_image(codec, stage, which, noise)
    return _fill(replace(start, mask=stage.mask.latents.to(noise.device)), stage, noise)


def _fill(start: Start, stage: Pass, noise: Noise) -> Start:
    """The start with other latents under the mask, by its value: noise or zeros, where the call asks for them.

    A1111 (`StableDiffusionProcessingImg2Img.init` in modules/processing.py) takes the run's own noise for "latent
    noise"; here it is drawn anew, so that the noisy latents have unit variance.
    """
    fill = stage.settings.inpaint_fill
    if start.image is None or stage.mask is None or fill not in ("noise", "blank"):
        return start
    new = noise.sample() if fill == "noise" else torch.zeros_like(start.image)
    mask = stage.mask.latents.to(noise.device)
    return replace(start, image=start.image * (1.0 - mask) + new * mask)


def inpaint_by_unet(codec: Codec, stage: Pass, which: slice, noise: Noise) -> Start:
    """An inpainting UNet reads mask and masked image; at full strength it starts from pure noise.

    It was trained to see pixels or not, so it sees those that are kept in full. Of a grey mask, latents are restored as
    for any UNet.
    """
    assert stage.image is not None and stage.mask is not None
    pure = stage.starts_from_noise and not stage.mask.is_grey
    start = text_to_image(stage, which, noise) if pure else image_to_image(codec, stage, which, noise)
    if stage.mask.is_grey:
        start = replace(start, mask=stage.mask.latents.to(noise.device))
    start = _fill(start, stage, noise)
    kept = image_tensor(stage.image) * (stage.mask.pixels == 0)
    masked = codec.encode(kept, noise.encoding(), stage.vae_tiling)
    mask = stage.mask.hidden.to(noise.device).expand(len(masked), -1, -1, -1)
    return replace(start, extra_channels=torch.cat([mask, masked], dim=-1))


def second_pass(codec: Codec, stage: Pass, noise: Noise, first: torch.Tensor) -> Start:
    """The first pass's latents, enlarged; or its decoded images, enlarged and encoded again."""
    upscaler, size = stage.settings.hires_upscaler, (stage.width, stage.height)
    if upscaler in INTERPOLATION:
        return Start(noise.first(), enlarge(first, *noise.shape[1:], upscaler))
    images = [Image.fromarray(codec.decode(latent[None], stage.vae_tiling)[0]) for latent in first]
    if upscaler in RESAMPLING:
        images = [image.resize(size, RESAMPLING[upscaler]) for image in images]
    else:
        with about("hires_upscaler"):
            images = [upscaler(image, size=size) for image in images]
    image = encode_each(codec, images, noise, stage.vae_tiling)  # draws before the noise, as image to image does
    return Start(noise.first(), image)


def encode_each(codec: Codec, images: Sequence[Image.Image], noise: Noise, tiled: bool) -> torch.Tensor:
    """An image for each latent of a batch, `[n, h, w, C]`."""
    parts = [
        codec.encode(image_tensor(image), sample[None], tiled)
        for image, sample in zip(images, noise.encoding(each=True), strict=True)
    ]
    return torch.cat(parts)
