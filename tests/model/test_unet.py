"""What the UNet computes once for all steps follows its weights."""

from __future__ import annotations

import pytest
import torch

from fastsd.components import Components
from fastsd.config import UNetConfig
from fastsd.kernels import dispatch
from fastsd.model.layers import ResBlock
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter
from tests.support import tiny

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


def gradients(components: Components, adapter: TrainableAdapter) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Output, gradients, and the bytes that the forward pass keeps for the backward pass."""
    generator = torch.Generator().manual_seed(5)
    width = components.unet.config.cross_attention_dim
    x, context = torch.randn(2, 8, 8, 4, generator=generator), torch.randn(2, 9, width, generator=generator)
    added = AddedConditioning(torch.ones(2, 24), torch.ones(2, 6)) if components.xl else None
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    adapter.masks.set(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = components.unet(x, torch.tensor([3.0, 700.0]), context, added)
    weights = {p.untyped_storage().data_ptr() for p in (*components.unet.parameters(), *adapter.parameters())}
    found = torch.autograd.grad(y.square().mean(), list(adapter.parameters()))
    return y, list(found), sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("make", [tiny.sd1, tiny.sdxl], ids=["sd1", "sdxl"])
def test_the_same_gradients_from_less_memory(make: object) -> None:
    """Bit for bit: the same operations run twice. Dropout has the same masks both times."""
    components = make()  # type: ignore[operator]
    components.unet.requires_grad_(False).train()
    settings = AdapterSettings(rank=2, dropout=0.3, targets=("linear", "convolution"))
    adapter = TrainableAdapter(components, settings, seed=0)
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapter.attach()
    y, expected, all_kept = gradients(components, adapter)
    components.unet.recompute_blocks()
    again, found, kept = gradients(components, adapter)
    assert torch.equal(again, y)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert kept < all_kept / 2
