"""A short run that calls every network of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline


def drive(pipe: Pipeline, prompt: str, width: int, height: int) -> None:
    """Run img2img at strength 0.5: text encoders, VAE encoder, one guided UNet step, the update, VAE decoder."""
    waves = np.sin(np.arange(height)[:, None] / 5) * np.cos(np.arange(width) / 7)
    image = Image.fromarray(((waves + 1) * 127).astype(np.uint8)).convert("RGB")
    mask = Image.new("L", image.size, 255) if pipe.components.unet.config.reads == "mask" else None
    depth = Image.linear_gradient("L") if pipe.components.unet.config.reads == "depth" else None
    pipe(prompt, image=image, mask_image=mask, depth_image=depth, strength=0.5, num_inference_steps=2,
         guidance_scale=2.0, seed=0, width=width, height=height)  # fmt: skip
