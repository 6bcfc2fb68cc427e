"""Images as latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from fastsd.config import TAESDConfig
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.model.taesd import Autoencoder
from fastsd.model.tiling import decode_tiled, encode_tiled
from fastsd.runtime.devices import dtype_name

CAPTURED = 1024 * 1024  # most pixels for a graph of the autoencoder: above, launches cost nothing and maps gigabytes

T = TypeVar("T")


def to_channels_last(x: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` to contiguous `[N, H, W, C]`."""
    return x.permute(0, 2, 3, 1).contiguous()


def image_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as `[1, H, W, 3]` fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).div_(127.5).sub_(1.0)[None]


class Codec:
    """The autoencoder between images and scaled latents.

    Some checkpoints overflow fp16, whose largest number is 65504. Those that say so are loaded in another dtype
    (`autoencoder_dtype`). If a single value is not finite, the autoencoder is
    converted to fp32 and the image computed again; later images run in fp32 at once. `take_notes` reports it once.
    """

    def __init__(self, vae: Autoencoder, graphs: Graphs):
        self.vae, self.graphs = vae, graphs
        self._notes: list[str] = []

    def encode(self, image: torch.Tensor, noise: torch.Tensor, tiled: bool) -> torch.Tensor:
        """One image to a sampled, scaled latent for each image of `noise`; with TAESD all are the same.

        Args:
            image: `[1, H, W, 3]` in [-1, 1].
            noise: `[N, h, w, C]`, standard normal.
            tiled: encode in overlapping tiles.

        Returns:
            `[N, h, w, C]` fp32.

        Raises:
            FastsdError: it is not finite even in fp32.
        """
        mean, logvar = self._distribution(image, tiled)
        return self.scale(mean + torch.exp(0.5 * logvar) * noise)

    def scale(self, latent: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latent `[N, h, w, C]` as the diffusion model sees it."""
        mean, std = self._spread(latent)
        return (latent - mean) * (self.vae.config.scaling_factor / std)

    def unscale(self, latent: torch.Tensor) -> torch.Tensor:
        """The opposite of `scale`."""
        mean, std = self._spread(latent)
        return latent / self.vae.config.scaling_factor * std + mean

    def _spread(self, latent: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and standard deviation of the latents in training, by channel, where the autoencoder states them."""
        config = self.vae.config
        if isinstance(config, TAESDConfig) or config.latents_mean is None or config.latents_std is None:
            return 0.0, 1.0
        return latent.new_tensor(config.latents_mean), latent.new_tensor(config.latents_std)

    def mode(self, image: torch.Tensor, tiled: bool) -> torch.Tensor:
        """One image `[1, H, W, 3]` in [-1, 1] to the mode of its latents, unscaled, `[1, h, w, C]` fp32."""
        return self._distribution(image, tiled)[0]

    def _distribution(self, image: torch.Tensor, tiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of an image's latents, unscaled, `[1, h, w, C]` fp32 each."""
        run = partial(encode_tiled, self.vae) if tiled else self.vae.encode
        mean, logvar = self._finite("encode", run, image, tiled or image.shape[1] * image.shape[2] > CAPTURED)
        return mean.float(), logvar.float()

    def decode(self, latent: torch.Tensor, tiled: bool) -> np.ndarray:
        """A scaled latent `[1, h, w, C]` to an image `[1, H, W, 3]` uint8; see `decode_float`."""
        return self.decode_float(latent, tiled).round().astype(np.uint8)

    def decode_float(self, latent: torch.Tensor, tiled: bool) -> np.ndarray:
        """A scaled latent `[1, h, w, C]` to an image `[1, H, W, 3]` fp32 from 0 to 255, not rounded; in overlapping
        tiles where `tiled`.

        Raises:
            FastsdError: it is not finite even in fp32.
        """
        config = self.vae.config
        run = partial(decode_tiled, self.vae) if tiled else self.vae.decode
        large = latent.shape[1] * latent.shape[2] * config.downscale**2 > CAPTURED
        image = self._finite("decode", run, self.unscale(latent), tiled or large)
        return (image.float() * 127.5 + 127.5).clamp(0, 255).cpu().numpy()

    def take_notes(self) -> list[str]:
        """Notes since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _finite(self, name: str, run: Callable[[torch.Tensor], T], x: torch.Tensor, eager: bool) -> T:
        """`run(x)`; again in fp32 if it is not finite."""
        weight = next(self.vae.parameters())
        given = x.to(weight.device, weight.dtype)
        with fixed_convolutions(given.device):
            if eager:
                result = self.graphs.eagerly(lambda: run(given))
            else:
                result = self.graphs(name, run, given, weights=self.vae)
        if is_finite(result):
            return result
        if weight.dtype == torch.float32 or not is_finite(x):
            raise FastsdError("the image is not finite: the model overflowed; {dtype} fp32 or bf16 may help")
        self._notes.append(f"the autoencoder overflowed in {dtype_name(weight.dtype)}; it runs in fp32 from now on")
        self.vae.float()
        self.graphs.forget()  # they read the old weights, and hold memory
        return self._finite(name, run, x, eager)


def is_finite(tensors: Any) -> bool:
    """Whether all values of a tensor, or of a tuple of them, are finite. Waits for the device."""
    return all(bool(torch.isfinite(x).all()) for x in (tensors if isinstance(tensors, tuple) else (tensors,)))


# The hires upscalers of latents (`fastsd.parameters.passes.LATENT_UPSCALERS`): a mode of PyTorch's interpolation, and
# whether it is antialiased (`latent_upscale_modes` in A1111's modules/shared_items.py).
INTERPOLATION = {
    "latent": ("bilinear", False),
    "latent-antialiased": ("bilinear", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}


def enlarge(latents: torch.Tensor, height: int, width: int, upscaler: str) -> torch.Tensor:
    """`[n, h, w, C]` to `[n, height, width, C]` by one of `INTERPOLATION`, as A1111 does."""
    mode, antialias = INTERPOLATION[upscaler]
    maps = latents.permute(0, 3, 1, 2)
    return to_channels_last(torch.nn.functional.interpolate(maps, size=(height, width), mode=mode, antialias=antialias))
