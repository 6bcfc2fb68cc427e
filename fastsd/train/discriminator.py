"""PatchGAN discriminators: does each patch of an image, or each place of a teacher's features, look real?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastsd.model.layers import timestep_embedding
from fastsd.model.unet import AddedConditioning, UNet

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


class FeatureDiscriminator(nn.Module):
    """Judges latents by a frozen UNet's features: a head for each map, which knows the time and the text.

    Sauer et al. 2023 ("Adversarial Diffusion Distillation", section 3.2) put such heads on an image network, Sauer et
    al. 2024 ("Fast high-resolution image synthesis with latent adversarial diffusion distillation", section 3) on
    features of the teacher, of noised latents. The text counts as in a projection discriminator (Miyato and Koyama
    2018, equation 3): a product of the head's features with a vector of the condition is added to the verdict.

    Args:
        widths: channels of the maps that `unet_maps` returns.
        condition: features of the pooled text.
        channels: of the heads.
    """

    def __init__(self, widths: Sequence[int], condition: int, channels: int):
        super().__init__()
        self.time_channels = channels
        self.heads = nn.ModuleList([FeatureHead(width, condition + channels, channels) for width in widths])

    def forward(self, maps: Sequence[torch.Tensor], t: torch.Tensor, pooled: torch.Tensor) -> list[torch.Tensor]:
        """The verdicts `[B, 1, h, w]` of each head, large for real latents.

        Args:
            maps: `[B, h, w, C]`. t: `[B]`, the timesteps of the noised latents. pooled: `[B, P]`.
        """
        waves = timestep_embedding(t, self.time_channels, flip_sin_to_cos=True, freq_shift=0)
        condition = torch.cat([pooled.float(), waves.float()], dim=-1)
        with torch.autocast(t.device.type, enabled=False):  # small products, of which R1 takes second derivatives
            # Contiguous: PyTorch's CPU group norm crashes in the backward pass of an input in another layout that
            # needs no gradient (2.13).
            inputs = [x.float().permute(0, 3, 1, 2).contiguous() for x in maps]
            return [head(x, condition) for head, x in zip(self.heads, inputs, strict=True)]


class FeatureHead(nn.Module):
    """Two convolutions over one map, then a verdict for each place."""

    def __init__(self, width: int, condition: int, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(1, width, **FLOATS)
        self.conv1 = nn.Conv2d(width, channels, 3, padding=1, **FLOATS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, **FLOATS)
        self.condition = nn.Sequential(
            nn.Linear(condition, channels, **FLOATS), nn.SiLU(), nn.Linear(channels, channels, **FLOATS)
        )

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv1(self.norm(x)))
        x = F.silu(self.conv2(x))
        # The last bias is the part of the verdict that no condition changes.
        return (x * self.condition(condition)[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(x.shape[1])


def unet_maps(
    unet: UNet, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, added: AddedConditioning | None
) -> list[torch.Tensor]:
    """The maps `[B, h, w, C]` of a UNet's contracting path after its first convolution, and the lowest one.

    Args:
        x: noised latents `[B, h, w, C]`. The rest: as `UNet.forward` takes it.
    """
    blocks = unet.block_inputs(unet.embed_time(t, added), unet.project_context(context))
    skips, lowest = unet.contract(unet.conv_in(x), iter(blocks))
    return [*skips[1:], lowest]


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
