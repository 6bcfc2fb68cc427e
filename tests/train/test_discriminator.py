"""The discriminators, their losses, and the adaptive weight."""

from __future__ import annotations

import torch
from torch import nn

from fastsd.model.unet import UNet
from fastsd.train.discriminator import (
    FeatureDiscriminator,
    PatchDiscriminator,
    adaptive_weight,
    feature_distance,
    hinge,
    unet_maps,
)
from tests.support import tiny

FLOATS = {"dtype": torch.float64, "device": "cpu"}


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert float(hinge(real, fake)) == 0.5 * (0.25 + 0.75)


def test_the_adaptive_weight_makes_both_gradients_as_large() -> None:
    torch.manual_seed(0)
    last = nn.Parameter(torch.randn(3, 4, **FLOATS))
    x = torch.randn(4, **FLOATS)
    rest, adversarial = (last @ x).square().mean(), 100 * (last @ x).sum()
    weight = adaptive_weight(rest, adversarial, last)
    first, second = (torch.autograd.grad(value, last)[0] for value in (rest, weight * adversarial))
    # The denominator has 1e-4 added to it, against a norm above 100.
    torch.testing.assert_close(first.norm(), second.norm(), rtol=1e-6, atol=0)


def test_a_patch_sees_a_part_of_the_image() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=8, layers=2)
    image = torch.randn(1, 32, 32, 3, requires_grad=True)
    verdict, features = net(image)
    assert verdict.shape[:2] == (1, 1) and len(features) == 3
    # Norms couple all places, so the receptive field is that of the convolutions: take the norms away.
    for block in net.blocks[1:]:
        block[1] = nn.Identity()  # type: ignore[index]
    net(image)[0][0, 0, 0, 0].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 3)) > 0
    # Strides 2, 2, 1, 1 of kernels of 4: 4 + 3 * 2 + 3 * 4 + 3 * 4 = 34 less the padding of 1 * (1 + 2 + 4 + 4) = 11.
    assert seen[:23, :23].all() and not seen[23:].any() and not seen[:, 23:].any()


def test_equal_images_have_no_feature_distance() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=4, layers=2)
    image = torch.randn(2, 16, 16, 3)
    with torch.no_grad():
        assert float(feature_distance(net(image)[1], net(image)[1])) == 0
        assert float(feature_distance(net(image)[1], net(image + 0.1)[1])) > 0


def test_the_maps_are_those_of_the_network() -> None:
    """Every map after the first convolution that the contracting path hands on, and the lowest block's."""
    torch.manual_seed(0)
    unet = UNet(tiny.UNET).requires_grad_(False)
    seen: list[torch.Tensor] = []
    for level in unet.down_blocks:
        level.register_forward_hook(lambda _module, _inputs, maps: seen.extend(maps))
    unet.mid_block.register_forward_hook(lambda _module, _inputs, x: seen.append(x))
    x, t, context = torch.randn(2, 8, 8, 4), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 32)
    unet(x, t, context)
    expected, seen[:] = list(seen), []
    maps = unet_maps(unet, x, t, context, None)
    assert len(maps) == len(expected) == 4 and all(torch.equal(a, b) for a, b in zip(maps, expected))
    assert [m.shape[-1] for m in maps] == [*unet.skip_channels[1:], 64]


def test_a_head_learns_which_text_belongs_to_a_map() -> None:
    """Real and fake maps are the same; only the text tells them apart, so the verdict must be conditional."""
    torch.manual_seed(0)
    net = FeatureDiscriminator([6, 4], condition=3, channels=8)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    kinds = torch.eye(2)
    maps = [kinds[:, None, None, :].repeat(8, 4, 4, width // 2) for width in (6, 4)]
    right = torch.nn.functional.pad(kinds, (0, 1)).repeat(8, 1)
    wrong, t = right.roll(1, 0), torch.full((16,), 10)
    for _ in range(60):
        real, fake = net(maps, t, right), net(maps, t, wrong)
        value = torch.stack([hinge(a, b) for a, b in zip(real, fake)]).mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    for verdicts, sign in ((net(maps, t, right), 1), (net(maps, t, wrong), -1)):
        assert all(bool((sign * verdict > 0).all()) for verdict in verdicts)
        assert [list(verdict.shape) for verdict in verdicts] == [[16, 1, 4, 4]] * 2
