"""LPIPS from a file in the layout of the package lpips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.train.lpips import load_lpips

PLACES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}
WIDTHS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights under the names of `lpips.LPIPS(net="vgg").state_dict()`."""
    torch.manual_seed(0)
    found, channels = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, 3
    for block, places in PLACES.items():
        for place in places:
            found[f"net.slice{block}.{place}.weight"] = (
                torch.randn(WIDTHS[block], channels, 3, 3) / (9 * channels) ** 0.5
            )
            found[f"net.slice{block}.{place}.bias"] = torch.randn(WIDTHS[block]) / 10
            channels = WIDTHS[block]
        for name in (f"lin{block - 1}.model.1.weight", f"lins.{block - 1}.model.1.weight"):
            found[name] = torch.linspace(0, 1, channels)[None, :, None, None].clone()
    return found


def distance(state: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, layer by layer as torchvision numbers VGG-16, in float64."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    x = torch.cat([((y.double() - shift) / scale).permute(0, 3, 1, 2) for y in (a, b)])
    total = torch.zeros(len(a)).double()
    for layer in range(30):
        block = 1 + sum(layer > pool for pool in (4, 9, 16, 23))
        if layer in (4, 9, 16, 23):
            x = F.max_pool2d(x, 2, 2)
        elif f"net.slice{block}.{layer}.weight" in state:
            name = f"net.slice{block}.{layer}"
            x = F.conv2d(x, state[f"{name}.weight"].double(), state[f"{name}.bias"].double(), padding=1).relu()
        if layer in (3, 8, 15, 22, 29):
            one, other = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            weight = state[f"lin{block - 1}.model.1.weight"].double()
            total += F.conv2d((one - other).square(), weight).mean((1, 2, 3))
    return total


@pytest.mark.heavy
def test_the_distance(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "lpips.safetensors")
    torch.save(state, tmp_path / "lpips.pth")
    a, b = torch.rand(2, 2, 32, 16, 3) * 2 - 1
    b.requires_grad_(True)
    found = [load_lpips(tmp_path / name)(a, b) for name in ("lpips.safetensors", "lpips.pth")]
    assert torch.equal(*found)
    # 13 layers of sums of up to 4608 fp32 products, each off by at most the root of their number times 2^-24, and the
    # squares of differences double it.
    torch.testing.assert_close(found[0].double(), distance(state, a, b.detach()), rtol=26 * 4608**0.5 * 2**-24, atol=0)
    (gradient,) = torch.autograd.grad(found[0].sum(), b)
    assert float(gradient.abs().sum()) > 0
    network = load_lpips(tmp_path / "lpips.pth")
    assert float(network(a, a).max()) == 0 and not any(p.requires_grad for p in network.parameters())


def test_other_weights_are_one_line(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    alex = {key: value for key, value in state.items() if "slice1.2" not in key}
    save_file(alex, tmp_path / "alex.safetensors")
    with pytest.raises(FastsdError, match=r"no LPIPS on VGG-16: net.slice1.2.weight is missing"):
        load_lpips(tmp_path / "alex.safetensors")
    heads = state | {"lin0.model.1.weight": torch.zeros(1, 96, 1, 1)}
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(FastsdError, match=r"lin0.model.1.weight is \[1, 96, 1, 1\], not \[1, 64, 1, 1\]"):
        load_lpips(tmp_path / "heads.safetensors")
