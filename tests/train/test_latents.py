"""Centring the latents changes no reconstruction."""

from __future__ import annotations

import torch

from fastsd.config import VAEConfig
from fastsd.model.vae import AutoencoderKL
from fastsd.train.latents import centre


def test_centred_latents_decode_to_the_same_image() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1)).double()
    image = torch.rand(2, 16, 16, 3, dtype=torch.float64) * 2 - 1
    offset, spread = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    with torch.no_grad():
        before = vae.encode(image)
        reconstruction = vae.decode(before.mean)
        centre(vae, offset, spread)
        after = vae.encode(image)
        torch.testing.assert_close(after.mean, (before.mean - offset) / spread, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after.logvar, before.logvar - 2 * spread.log(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vae.decode(after.mean), reconstruction, rtol=1e-12, atol=1e-12)
