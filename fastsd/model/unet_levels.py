"""The levels of the UNet: residual blocks and transformers of one resolution, on the way down, at the bottom, on the
way up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsd.config import UNetConfig
from fastsd.model.call_options import PLAIN, CallOptions
from fastsd.model.layers import KeyValue, ResBlock, SpatialTransformer


class BlockInputs(NamedTuple):
    """What a residual block and the transformer after it read beside their map.

    Attributes:
        time: `[B or 1, C]`, see `ResBlock`.
        texts: of each of the transformer's blocks, see `CrossAttention`; none without a transformer.
        perturbed: of each, see `SelfAttention`; or none.
    """

    time: torch.Tensor
    texts: tuple[KeyValue, ...] = ()
    perturbed: tuple[int, ...] = ()


class UNetLevel(nn.Module):
    """One resolution of the UNet: residual blocks, each followed by a transformer where the level has attention.

    Attributes:
        recompute: where gradients are recorded, keep only the input of each block and transformer, and compute the rest
            again in the backward pass (Chen et al. 2016): less memory for a third more time.
    """

    recompute = False

    def __init__(self, config: UNetConfig, inputs: list[int], channels: int, heads: int, depths: tuple[int, ...]):
        """`inputs`: input widths of the residual blocks; `depths`: blocks of the transformers after the first ones."""
        super().__init__()
        groups, self.depths = config.norm_num_groups, depths
        self.resnets = nn.ModuleList([ResBlock(width, channels, groups, config.norm_eps) for width in inputs])
        self.attentions = nn.ModuleList(
            [SpatialTransformer(channels, config.cross_attention_dim, heads, depth, groups) for depth in depths]
        )
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    @property
    def block_depths(self) -> list[int]:
        """Of each residual block, how many transformer blocks follow it."""
        return [*self.depths, *[0] * (len(self.resnets) - len(self.depths))]

    def block(self, i: int, x: torch.Tensor, own: BlockInputs, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Residual block `i` and the transformer after it, if any."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._whole_block, i, x, own, skip, use_reentrant=False)
        return self._whole_block(i, x, own, skip)

    def _whole_block(self, i: int, x: torch.Tensor, own: BlockInputs, skip: torch.Tensor | None) -> torch.Tensor:
        x = self.resnets[i](x, own.time, skip)
        return self.attentions[i](x, own.texts, own.perturbed) if i < len(self.attentions) else x


class DownLevel(UNetLevel):
    """A level of the contracting path. All but the last end by halving the map."""

    def forward(
        self,
        x: torch.Tensor,
        blocks: Iterator[BlockInputs],
        adapter: torch.Tensor | None = None,
        most: int | None = None,
    ) -> list[torch.Tensor]:
        """Returns all maps, which become skip connections; the last one is the next level's input.

        adapter: a T2I-Adapter's map, added after the last transformer; without transformers, to the last map.
        most: only so many maps, the first, are computed; None: all.
        """
        count = len(self.resnets) + (self.downsamplers is not None)
        adds = (len(self.resnets) if len(self.attentions) else count) - 1
        maps = []
        for i in range(count if most is None else min(most, count)):
            if i < len(self.resnets):
                x = self.block(i, x, next(blocks))
            elif self.downsamplers is not None:
                x = self.downsamplers[0](x)
            x = x if adapter is None or i != adds else x + adapter
            maps.append(x)
        return maps


class MidLevel(UNetLevel):
    """The lowest level: residual block, transformer, residual block; or the first alone, or nothing."""

    def forward(self, x: torch.Tensor, blocks: Iterator[BlockInputs]) -> torch.Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, x, next(blocks))
        return x


class UpLevel(UNetLevel):
    """A level of the expanding path, which reads the skip connections in reverse order."""

    concatenates = True

    def forward(
        self,
        x: torch.Tensor,
        skips: list[torch.Tensor],
        blocks: Iterator[BlockInputs],
        number: int = 0,
        options: CallOptions = PLAIN,
        first: int = 0,
    ) -> torch.Tensor:
        """`number`: of the level, 0 the lowest; `first`: the residual block that it begins with."""
        for i in range(first, len(self.resnets)):
            skip = skips.pop()
            x, skip = options.enter(x, skip, number, len(skips))
            if self.concatenates:
                x = self.block(i, x, next(blocks), skip)
            else:  # add the skip connection to the first channels
                x = self.block(i, x + F.pad(skip, (0, x.shape[-1] - skip.shape[-1])), next(blocks))
        return x if self.upsamplers is None else self.upsamplers[0](x, skips[-1].shape[1:3])
