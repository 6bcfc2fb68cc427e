"""PatchGAN discriminators: does each patch of an image, or each place of a teacher's features, look real?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class PatchDiscriminator(nn.Module):
    """The 70 x 70 PatchGAN with three layers (Isola et al. 2017, appendix 6.1.2); fewer see smaller patches.

    Norms are over groups of channels, not over the batch: the batch is split over workers.

    Args:
        channels: of the first layer; they double with each, up to eight times.
        layers: of stride 2.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        widths = [min(2**i, 8) * channels for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1, **FLOATS)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride, 1, bias=False, **FLOATS)
            blocks.append(nn.Sequential(conv, nn.GroupNorm(min(8, widths[i + 1]), widths[i + 1], **FLOATS)))
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Conv2d(widths[-1], 1, 4, 1, 1, **FLOATS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`[B, H, W, 3]` to the verdicts `[B, 1, h, w]` (large: real), and the features of every block, NCHW."""
        x, features = image.permute(0, 3, 1, 2), []
        for block in self.blocks:
            x = F.leaky_relu(block(x), 0.2)
            features.append(x)
        return self.out(x).float(), features


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss (Lim and Ye 2017), halved as in the latent-diffusion code."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def feature_distance(real: list[torch.Tensor], fake: list[torch.Tensor]) -> torch.Tensor:
    """Mean L1 distance of a discriminator's features, a perceptual loss (Larsen et al. 2016; Wang et al. 2018)."""
    distances = [(a.detach().float() - b.float()).abs().mean() for a, b in zip(real, fake)]
    return torch.stack(distances).mean()


def adaptive_weight(rest: torch.Tensor, adversarial: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The weight at which both losses have gradients of the same norm at the last layer (Esser et al. 2021, eq. 7)."""
    (first,) = torch.autograd.grad(rest, last, retain_graph=True)
    (second,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4).detach()
