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


def test_the_bias_of_a_first_convolution_acts_through_the_time_embedding(unet: UNet) -> None:
    """Adding b to the bias is adding b to the block's time embedding, of which it is a part."""
    before = unet.project_time(torch.zeros(1, SMALL.time_embed_dim))
    blocks = [block for block in unet.modules() if isinstance(block, ResBlock)]
    biases = torch.cat([block.conv1.bias for block in blocks])
    torch.testing.assert_close(before[0], unet.time_projections.bias + biases)
    blocks[1].conv1.bias += 1
    after = unet.project_time(torch.zeros(1, SMALL.time_embed_dim))
    start, size = blocks[0].out_channels, blocks[1].out_channels
    expected = torch.zeros_like(before).index_fill_(1, torch.arange(start, start + size), 1.0)
    torch.testing.assert_close(after - before, expected)
    blocks[1].conv1.bias -= 1


@torch.no_grad()
def test_changed_weights_and_biases_take_effect_at_once(unet: UNet) -> None:
    """In the next call, for each way to change them: no sum of biases outlives a call."""
    first = output(unet)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    for name in ("bias", "weight"):
        for part in ("conv1", "conv2", "time_emb"):
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
