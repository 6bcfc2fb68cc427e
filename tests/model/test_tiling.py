"""The autoencoder in tiles: no edge shows between tiles that differ in brightness, or that err at their borders."""

from __future__ import annotations

import pytest
import torch

from fastsd.config import VAEConfig
from fastsd.model.layers import Downsample, ResBlock, Upsample
from fastsd.model.tiling import OVERLAP, TILE, _spans, decode_tiled, encode_tiled
from fastsd.model.vae import AutoencoderKL, Gaussian

HEIGHT, WIDTH = 90, 150  # latent pixels: 2 x 3 tiles, the last of which overlap by more than the others
LEVEL = 1 / 255  # of 8-bit images


def smooth_image(height: int, width: int) -> torch.Tensor:
    """`[1, height, width, 3]` in [-1, 1], with a few waves across the image."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :]
    waves = (torch.sin(2 * x + y), torch.cos(3 * y - x), x * y)
    return 0.8 * torch.stack(waves, dim=-1)[None]


def largest_step(x: torch.Tensor) -> float:
    """The largest difference between neighbouring pixels."""
    return max(float(x.diff(dim=dim).abs().max()) for dim in (1, 2))


class Patchwork:
    """An autoencoder whose tiles are too light or too dark by `offset` in turn, and off by `border` at their edges.

    It repeats latent pixels, so that edges in an image of a constant latent come from the tiles.
    """

    config = VAEConfig()

    def __init__(self, offset: float, border: float):
        self.offset, self.border, self.tiles = offset, border, 0

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        self.tiles += 1
        assert max(latent.shape[1:3]) <= TILE
        y = latent.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2) + self.offset * (-1) ** self.tiles
        for dim in (1, 2):
            y.narrow(dim, 0, 8).add_(self.border)
            y.narrow(dim, y.shape[dim] - 8, 8).sub_(self.border)
        return y

    def encode(self, image: torch.Tensor) -> Gaussian:
        self.tiles += 1
        assert max(image.shape[1:3]) <= TILE * 8
        mean = image[:, 4::8, 4::8].clone()
        return Gaussian(mean, 2 * mean)


def test_tiles_that_differ_meet_smoothly() -> None:
    latent = torch.full((1, HEIGHT, WIDTH, 3), 0.5)
    inner = slice(8, -8)  # at the image's own edge nothing is cross-faded
    offset, border = 10 * LEVEL, 20 * LEVEL
    vae = Patchwork(offset, border)
    image = decode_tiled(vae, latent)[:, inner, inner]  # type: ignore[arg-type]
    assert vae.tiles == 6
    # The fade spreads 2 * offset over the overlap. A border of 8 pixels has at most weight 1 / OVERLAP.
    fade = 2 * offset / (OVERLAP * 8)
    assert largest_step(image) < LEVEL + fade
    assert (image - 0.5).abs().max() < offset + 2 * border * 8 / (OVERLAP * 8)
    abrupt = decode_tiled(Patchwork(offset, border), latent, overlap=0)[:, inner, inner]  # type: ignore[arg-type]
    assert largest_step(abrupt) > 2 * offset  # without a fade the measure sees the edges


def test_equal_tiles_change_nothing() -> None:
    image = smooth_image(HEIGHT * 8, WIDTH * 8)
    vae = Patchwork(0.0, 0.0)
    whole = Gaussian(image[:, 4::8, 4::8], 2 * image[:, 4::8, 4::8])
    gaussian = encode_tiled(vae, image)  # type: ignore[arg-type]
    torch.testing.assert_close(gaussian.mean, whole.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(gaussian.logvar, whole.logvar, rtol=0, atol=1e-6)
    latent = whole.mean
    enlarged = latent.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    torch.testing.assert_close(decode_tiled(vae, latent), enlarged, rtol=0, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 112, 113, 500])
def test_spans_cover_all_and_overlap(length: int) -> None:
    spans = _spans(length, TILE, OVERLAP)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(end - start == min(TILE, length) for start, end in spans)
    assert all(before[1] - after[0] >= OVERLAP for before, after in zip(spans, spans[1:]))


def interpolating_vae() -> AutoencoderKL:
    """An AutoencoderKL whose weights keep smooth images smooth, as trained ones do.

    Averaging kernels change the resolution, and residual blocks add little. Channels have different means, so that a
    norm's statistics depend on the channels more than on the part of the image in a tile.
    """
    torch.manual_seed(0)
    config = VAEConfig(block_out_channels=(16, 16, 16), layers_per_block=1, norm_num_groups=4)
    vae = AutoencoderKL(config).eval().requires_grad_(False)
    average = torch.eye(16)[:, :, None, None].expand(-1, -1, 3, 3) / 9
    for module in vae.modules():
        if isinstance(module, ResBlock):
            module.conv2.weight *= 0.2
        if isinstance(module, Upsample | Downsample):
            module.conv.weight.copy_(average)
            module.conv.bias.zero_()
    for network in (vae.encoder, vae.decoder):
        network.conv_in.bias.copy_(3 * torch.randn(16))
        network.conv_out.weight.copy_(network.conv_out.weight.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3))
    return vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return interpolating_vae()


def test_a_smooth_image_shows_no_seams(vae: AutoencoderKL) -> None:
    latent = vae.encode(smooth_image(HEIGHT * 4, WIDTH * 4)).mean
    whole, tiled = vae.decode(latent) / 2, decode_tiled(vae, latent) / 2  # [0, 1] has half the range of [-1, 1]
    assert float(whole.max() - whole.min()) > 0.25  # the image is not flat
    difference = tiled - whole
    assert 0 < float(difference.abs().max())
    assert largest_step(difference) < LEVEL


def test_encoding_in_tiles_shows_no_seams(vae: AutoencoderKL) -> None:
    """Compared as decoded images, since latents have no brightness."""
    image = smooth_image(HEIGHT * 4, WIDTH * 4)
    whole, tiled = vae.encode(image).mean, encode_tiled(vae, image).mean
    assert 0 < float((tiled - whole).abs().max())
    difference = (vae.decode(tiled) - vae.decode(whole)) / 2
    assert largest_step(difference) < LEVEL


def test_small_images_are_not_divided(vae: AutoencoderKL) -> None:
    latent = torch.randn(1, 20, TILE, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode_tiled(vae, latent), vae.decode(latent))
