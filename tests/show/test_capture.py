"""The noted attention is the network's own, and noting it changes nothing."""

from __future__ import annotations

import pytest
import torch

from fastsd.kernels.flash_attn import flash_attn_ref
from fastsd.model.layers import CrossAttention, SelfAttention
from fastsd.model.unet import UNet
from fastsd.show.capture import map_shape, probabilities, recorded, short_name
from tests.support.tiny import sd1


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return sd1().unet.eval()


@torch.inference_mode()
def call(unet: UNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 10, unet.config.in_channels, generator=generator)
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    return unet(x, torch.tensor([500.0, 500.0]), context)


def test_noting_changes_nothing_and_leaves_no_hooks(unet: UNet) -> None:
    before = call(unet)
    with recorded(unet, (6, 10), (0.5, 0.5)) as record:
        assert torch.equal(call(unet), before)
    assert not any(module._forward_pre_hooks for module in unet.modules())
    crosses = [name for name, module in unet.named_modules() if isinstance(module, CrossAttention)]
    owns = [name for name, module in unet.named_modules() if isinstance(module, SelfAttention)]
    assert list(record.cross) == crosses and list(record.own) == owns and crosses
    for name, noted in record.cross.items():
        height, width = record.shapes[name]
        assert noted[0].shape == (height * width, 7)
        # A softmax sums to 1, to the rounding of as many additions.
        torch.testing.assert_close(noted[0].sum(-1), torch.ones(height * width), rtol=0, atol=7 * 2**-23)
    call(unet)
    assert all(len(noted) == 1 for noted in record.cross.values()), "nothing is noted outside of the context"


def test_the_probabilities_are_those_of_the_specification() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, 3, 8, generator=generator) for n in (5, 9, 9))
    weighted = torch.einsum("hsl,lhd->shd", probabilities(q, k), v[0])
    torch.testing.assert_close(weighted.flatten(1), flash_attn_ref(q, k, v)[0])


def test_shapes_of_maps() -> None:
    """Each level halves and rounds up, as the strided convolution does."""
    assert map_shape(60, (6, 10)) == (6, 10)
    assert map_shape(15, (6, 10)) == (3, 5)
    assert map_shape(6, (6, 10)) == (2, 3)


def test_names_of_layers() -> None:
    assert short_name("down_blocks.0.attentions.1.transformer_blocks.0.attn2") == "down 0.1"
    assert short_name("mid_block.attentions.0.transformer_blocks.2.attn1") == "mid block 2"
