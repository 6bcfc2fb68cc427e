"""What the UNet computes once for all steps follows its weights."""

from __future__ import annotations

import pytest
import torch

from fastsd.config import UNetConfig
from fastsd.kernels import dispatch
from fastsd.model.layers import ResBlock
from fastsd.model.unet import UNet

SMALL = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    num_attention_heads=(2, 2),
    cross_attention_dim=16,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SMALL).eval().requires_grad_(False)


def output(unet: UNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(2, 7, 16, generator=generator)
    return unet(x, torch.tensor([3.0, 801.0]), text)


def test_biases_act_through_the_time_embedding(unet: UNet) -> None:
    """A first convolution's is a part of its block's embedding; those of the second and the shortcut follow it."""
    blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
    before = unet.project_time(torch.zeros(2, SMALL.time_embed_dim)).split(unet.time_sizes, dim=-1)
    own = unet.time_projections.bias.split(unet.time_projections.part_sizes)
    shortcuts = 0
    for block, vectors, bias in zip(blocks, before, own, strict=True):
        parts = [bias + block.conv1.bias]
        if block.conv_shortcut is not None:
            parts.append(block.conv2.bias + block.conv_shortcut.bias)
            shortcuts += 1
        torch.testing.assert_close(vectors, torch.cat(parts).expand(2, -1))
    assert 0 < shortcuts < len(blocks)


@torch.no_grad()
def test_changed_weights_and_biases_take_effect_at_once(unet: UNet) -> None:
    """In the next call, for each way to change them: no sum of biases outlives a call."""
    first = output(unet)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    for name in ("bias", "weight"):
        for part in ("conv1", "conv2", "conv_shortcut", "time_emb"):
            changed = [key for key in state if part in key and key.endswith(name)]
            changed = changed or [f"time_projections.{name}"]
            unet.load_state_dict(state | {key: 1.5 * state[key] + 0.1 for key in changed})
            second = output(unet)
            with dispatch.reference_only():
                wanted = output(unet)
            assert (second - first).abs().max() > 1e-3
            assert (second - wanted).abs().max() < 1e-5 * wanted.abs().max()
    unet.load_state_dict(state)
    torch.testing.assert_close(output(unet), first)
