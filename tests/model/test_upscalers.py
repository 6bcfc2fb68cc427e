"""ESRGAN's network and the compact one: against plain PyTorch in float64, and spandrel where it is installed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastsd.model.upscalers import CompactConfig, RRDBConfig, UpscalerConfig, make_network
from tests.support.upscalers import TINY_RRDB, computed, in_layout, random_state

CONFIGS: dict[str, UpscalerConfig] = {
    "x4": TINY_RRDB,
    "x8": replace(TINY_RRDB, doublings=3),
    "x1, old": replace(TINY_RRDB, doublings=0),
    "x2, unshuffled": replace(TINY_RRDB, unshuffle=2),
    "x1, unshuffled": replace(TINY_RRDB, unshuffle=4),
    "ESRGAN+": replace(TINY_RRDB, plus=True, blocks=2),
    "grey": replace(TINY_RRDB, channels=1, doublings=1),
    "wide": RRDBConfig(features=64, growth=32, blocks=1),  # the real widths, which have fast paths of their own
    "compact x4": CompactConfig(features=16, convolutions=3, scale=4),
    "compact x1": CompactConfig(features=64, convolutions=1, scale=1),
}


def ours(config: UpscalerConfig, image: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` to the result of our network, with the random weights of `random_state`."""
    network = make_network(config).eval().requires_grad_(False)
    network.load_state_dict(random_state(config))
    return network(image.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_its_description_says(name: str) -> None:
    """To 1e-5 of the largest value: rounding in fp32, whose unit is 6e-8, through some thirty layers."""
    config = CONFIGS[name]
    image = torch.rand(2, config.channels, 12, 20, generator=torch.Generator().manual_seed(1))
    expected = computed(config, random_state(config), image)
    found = ours(config, image)
    assert found.shape == (2, config.channels, 12 * config.scale, 20 * config.scale)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["x4", "x1, old", "compact x4", "compact x1"])
def test_a_result_sees_as_far_as_the_radius_says(name: str) -> None:
    """The gradient of one pixel of the result reaches pixels within `radius`, and some at about that distance."""
    config, side = CONFIGS[name], 2 * CONFIGS[name].radius + 9
    network = make_network(config)
    network.load_state_dict({key: tensor.abs() for key, tensor in random_state(config).items()})
    image = torch.rand(1, side, side, config.channels, requires_grad=True)
    middle = side // 2
    network(image)[0, middle * config.scale, middle * config.scale].sum().backward()
    assert image.grad is not None
    rows = image.grad.abs().sum(dim=(0, 2, 3)).nonzero()[:, 0] - middle
    reach = int(rows.abs().max())
    assert config.radius - 3 <= reach <= config.radius


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "wide"])
def test_it_is_what_spandrel_computes(name: str) -> None:
    """spandrel reads the same table, in the oldest layout where that has the network's shape, by its own code."""
    spandrel: Any = pytest.importorskip("spandrel", reason="spandrel, with torchvision, is not installed")
    config = CONFIGS[name]
    if isinstance(config, RRDBConfig):
        config = replace(config, growth=32)  # it knows no other
    state = random_state(config)
    theirs = spandrel.ModelLoader().load_from_state_dict(
        dict(state) if isinstance(config, CompactConfig) else in_layout(state, "old")
    )
    image = torch.rand(1, config.channels, 12, 20, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs.model(image)
    found = ours(config, image)
    assert theirs.scale == config.scale
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
