"""ControlNet: an image that says where things are (Zhang et al. 2023).

A copy of the UNet's contracting path reads the latent and an image (edges, depths, a pose). Its features at each
resolution are added to the UNet's skip connections. As for the UNet, whatever does not depend on the latent is computed
outside the loop; that includes the layers that read the image.
"""

from __future__ import annotations

import torch
from torch import nn

from fastsd.config import ControlNetConfig
from fastsd.kernels.linear import activate
from fastsd.model.layers import Conv2d, Linear
from fastsd.model.unet import ContractingPath


class HintEncoder(nn.Module):
    """An image to a map of the latent's size and the path's width: 3 x 3 convolutions with SiLU between them."""

    def __init__(self, hint_channels: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = Conv2d(3, hint_channels[0])
        self.blocks = nn.ModuleList()
        for width, wider in zip(hint_channels, hint_channels[1:], strict=False):
            self.blocks += [Conv2d(width, width), Conv2d(width, wider, stride=2)]
        self.conv_out = Conv2d(hint_channels[-1], out_channels)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = activate(self.conv_in(image), "silu")
        for block in self.blocks:
            x = activate(block(x), "silu")
        return self.conv_out(x)


class ControlNet(ContractingPath):
    """Computes residuals for a UNet's skip connections from the UNet's inputs and an image."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.bgr = config.bgr
        self.downscale = 2 ** (len(config.hint_channels) - 1)  # from the image to the latent
        self.controlnet_cond_embedding = HintEncoder(config.hint_channels, config.unet.block_out_channels[0])
        self.controlnet_down_blocks = nn.ModuleList([Linear(width, width) for width in self.skip_channels])
        lowest = config.unet.block_out_channels[-1]
        self.controlnet_mid_block = Linear(lowest, lowest)
        self._project_times()

    def embed_hint(self, image: torch.Tensor) -> torch.Tensor:
        """An RGB image `[B, H, W, 3]` in [0, 1] to the map `[B, h, w, C]` that `denoise` takes."""
        return self.controlnet_cond_embedding(image.flip(-1) if self.bgr else image)

    def denoise(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        key_values: tuple[torch.Tensor, ...],
        hint: torch.Tensor,
        weight: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The residuals for one step.

        Args:
            x: the noisy latent that the UNet reads, `[B, h, w, 4]`.
            time: `[B or 1, ...]` from this network's `embed_time`.
            key_values: from this network's `project_context`.
            hint: `[B or 1, h, w, C]` from `embed_hint`.
            weight: `[1]`, multiplies every residual.

        Returns:
            A map for each of the UNet's skip connections and, last, one for its lowest level.
        """
        skips, lowest = self.contract(self.conv_in(x) + hint, iter(self.block_inputs(time, key_values)))
        residuals = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        weight = weight.to(x.dtype)
        return [weight * residual for residual in (*residuals, self.controlnet_mid_block(lowest))]
