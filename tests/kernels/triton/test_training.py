"""Where a gradient is needed, no kernel without one computes: the gradients are those of the specifications."""

from __future__ import annotations

import pytest
import torch

from fastsd.components import Components
from fastsd.kernels import dispatch
from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter
from tests.support import tiny
from tests.support.triton_checks import DEVICE

# fp32 sums of at most 1000 terms, rounded in two orders, forward and backward through a dozen layers.
ROUNDING = 1e-4


def gradients(components: Components, adapter: TrainableAdapter) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 8, 8, 4, generator=generator).to(DEVICE)
    context = torch.randn(1, 9, 32, generator=generator).to(DEVICE)
    adapter.attach()
    try:
        y = components.unet(x, torch.tensor([37.0], device=DEVICE), context)
        return list(torch.autograd.grad(y.square().mean(), list(adapter.parameters())))
    finally:
        adapter.detach()


@pytest.mark.parametrize("targets", [("attn1.to_q",), ("attn2.to_k",), ("transformer", "convolution")], ids=str)
def test_gradients_with_triton(targets: tuple[str, ...]) -> None:
    """A model's first layers need no gradient and run on the kernels; the layers after the first adapter do not.

    With `attn1.to_q` alone, later layers of a block would add in place to what a norm's gradient needs.
    """
    components = tiny.sd1()
    components.unet.to(DEVICE).requires_grad_(False)
    adapter = TrainableAdapter(components, AdapterSettings(targets=targets), seed=0)
    for parameter in adapter.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = gradients(components, adapter)
    with dispatch.reference_only():
        expected = gradients(components, adapter)
    for ours, theirs in zip(found, expected):
        assert float((ours - theirs).abs().max()) < ROUNDING * float(theirs.abs().max())


def test_a_forced_kernel_refuses() -> None:
    components = tiny.sd1()
    components.unet.to(DEVICE).requires_grad_(False)
    adapter = TrainableAdapter(components, AdapterSettings(), seed=0)
    with dispatch.forced("triton"), pytest.raises(ValueError, match="the kernel has no gradients"):
        gradients(components, adapter)
