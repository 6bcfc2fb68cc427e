"""The autoencoder in overlapping tiles, for images whose maps do not fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastsd.model.taesd import Autoencoder
from fastsd.model.vae import Gaussian

TILE = 64  # latent pixels along a side
OVERLAP = 16  # latent pixels that neighbours share, over which they are cross-faded


def decode_tiled(vae: Autoencoder, latent: torch.Tensor, tile: int = TILE, overlap: int = OVERLAP) -> torch.Tensor:
    """`vae.decode` of `[B, h, w, C]` in tiles of at most `tile` latent pixels.

    Norms see only a tile, so the result differs a little from an untiled one (TAESD's, which has no norms, only near a
    tile's edge). The cross-fade hides the edges.
    """
    return _in_tiles(vae.decode, latent, tile, overlap, scale_up=vae.config.downscale, scale_down=1)


def encode_tiled(vae: Autoencoder, image: torch.Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Gaussian:
    """`vae.encode` of `[B, H, W, 3]` in tiles of at most `tile` latent pixels."""

    def moments(part: torch.Tensor) -> torch.Tensor:
        distribution = vae.encode(part)
        return torch.cat([distribution.mean, distribution.logvar], dim=-1)

    mean, logvar = _in_tiles(moments, image, tile, overlap, scale_up=1, scale_down=vae.config.downscale).chunk(2, -1)
    return Gaussian(mean, logvar)


def _in_tiles(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: int,
    overlap: int,
    scale_up: int,
    scale_down: int,
) -> torch.Tensor:
    """Average of `run` over tiles, each weighted by a ramp that falls towards its inner edges.

    `tile` and `overlap` count latent pixels; a latent pixel is `scale_down` pixels of `x` and `scale_up` of the result.
    """
    height, width = x.shape[1] // scale_down, x.shape[2] // scale_down
    total, weights = None, None
    for top, bottom in _spans(height, tile, overlap):
        for left, right in _spans(width, tile, overlap):
            part = x[:, top * scale_down : bottom * scale_down, left * scale_down : right * scale_down]
            y = run(part).float()
            if total is None or weights is None:
                total = y.new_zeros(len(x), height * scale_up, width * scale_up, y.shape[-1])
                weights = y.new_zeros(1, height * scale_up, width * scale_up, 1)
            rows, columns = slice(top * scale_up, bottom * scale_up), slice(left * scale_up, right * scale_up)
            ramp = overlap * scale_up
            vertical = _ramp(y.shape[1], ramp if top > 0 else 0, ramp if bottom < height else 0, y.device)
            horizontal = _ramp(y.shape[2], ramp if left > 0 else 0, ramp if right < width else 0, y.device)
            weight = vertical[None, :, None, None] * horizontal[None, None, :, None]
            total[:, rows, columns] += y * weight
            weights[:, rows, columns] += weight
    assert total is not None and weights is not None
    return (total / weights).to(x.dtype)


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Spans of length `tile` that cover `range(length)` and share at least `overlap`; the last one ends at `length`."""
    if length <= tile:
        return [(0, length)]
    starts = [*range(0, length - tile, tile - overlap), length - tile]
    return [(start, start + tile) for start in starts]


def _ramp(length: int, rise: int, fall: int, device: torch.device) -> torch.Tensor:
    """Weights that rise from near 0 over the first `rise` entries and fall over the last `fall`.

    They follow 3 t^2 - 2 t^3, which starts quadratically: next to its edge a tile lacks its surroundings and errs most.
    """
    position = torch.arange(length, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if rise:
        weight = torch.minimum(weight, position / rise)
    if fall:
        weight = torch.minimum(weight, (length - position) / fall)
    return weight.square() * (3 - 2 * weight)
