"""The denoising UNet (Rombach et al. 2022; SDXL: Podell et al. 2023).

Whatever does not depend on the latent is computed outside the denoising loop: `project_context` once per prompt,
`embed_time` once per run for all steps. `denoise` is the rest of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsd.config import UNetConfig
from fastsd.kernels.linear import activate
from fastsd.model.layers import (
    Conv2d,
    CrossAttention,
    Downsample,
    GroupNorm,
    KeyValue,
    Linear,
    ResBlock,
    SpatialTransformer,
    Upsample,
    timestep_embedding,
)

# Precomputed inputs, one for each block that takes one, in order of use.
BlockInputs = Iterator[torch.Tensor]
TextInputs = Iterator[KeyValue]


@dataclass(frozen=True)
class AddedConditioning:
    """SDXL's conditioning beside the prompt: pooled text `[B, P]` and sizes `[B, K]` (original size, crop, ...)."""

    pooled: torch.Tensor
    sizes: torch.Tensor


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between them; embeds the timestep and SDXL's added conditioning.

    With `cond_features`, a second input of that width is projected and added to the first.
    """

    def __init__(self, in_features: int, features: int, cond_features: int = 0):
        super().__init__()
        self.cond_proj = Linear(cond_features, in_features, bias=False) if cond_features else None
        self.linear_1 = Linear(in_features, features)
        self.linear_2 = Linear(features, features)

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        if self.cond_proj is not None and cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(self.linear_1(x, activation="silu"))


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

    def block(
        self, i: int, x: torch.Tensor, times: BlockInputs, texts: TextInputs, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Residual block `i` and the transformer after it, if any."""
        if self.recompute and torch.is_grad_enabled():
            own = [next(texts) for _ in range(self.depths[i] if i < len(self.attentions) else 0)]
            return checkpoint(self._whole_block, i, x, next(times), skip, *own, use_reentrant=False)
        x = self.resnets[i](x, next(times), skip)
        return self.attentions[i](x, texts) if i < len(self.attentions) else x

    def _whole_block(
        self, i: int, x: torch.Tensor, time: torch.Tensor, skip: torch.Tensor | None, *texts: torch.Tensor
    ) -> torch.Tensor:
        x = self.resnets[i](x, time, skip)
        return self.attentions[i](x, iter(texts)) if texts else x


class DownLevel(UNetLevel):
    """A level of the contracting path. All but the last end by halving the map."""

    def forward(
        self, x: torch.Tensor, times: BlockInputs, texts: TextInputs, adapter: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Returns all maps, which become skip connections; the last one is the next level's input.

        A T2I-Adapter's map is added after the last transformer; without transformers, to the last map.
        """
        maps = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, times, texts)
            maps.append(x)
        if adapter is not None and len(self.attentions):
            maps[-1] = x = x + adapter
        if self.downsamplers is not None:
            maps.append(self.downsamplers[0](x))
        if adapter is not None and not len(self.attentions):
            maps[-1] = maps[-1] + adapter
        return maps


class MidLevel(UNetLevel):
    """The lowest level: residual block, transformer, residual block; or the first alone, or nothing."""

    def forward(self, x: torch.Tensor, times: BlockInputs, texts: TextInputs) -> torch.Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, x, times, texts)
        return x


class UpLevel(UNetLevel):
    """A level of the expanding path, which reads the skip connections in reverse order."""

    concatenates = True

    def forward(
        self, x: torch.Tensor, skips: list[torch.Tensor], times: BlockInputs, texts: TextInputs
    ) -> torch.Tensor:
        for i in range(len(self.resnets)):
            skip = skips.pop()
            if self.concatenates:
                x = self.block(i, x, times, texts, skip)
            else:  # add the skip connection to the first channels
                x = self.block(i, x + F.pad(skip, (0, x.shape[-1] - skip.shape[-1])), times, texts)
        return x if self.upsamplers is None else self.upsamplers[0](x, skips[-1].shape[1:3])


class ContractingPath(nn.Module):
    """The part that UNet and ControlNet share: `conv_in`, `down_blocks`, `mid_block`, and the time embedding.

    Submodules are named as in a diffusers folder. Subclasses call `_project_times` after making their last block.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.time_embedding = EmbeddingMLP(widths[0], config.time_embed_dim, config.time_cond_proj_dim)
        self.add_embedding = (
            EmbeddingMLP(config.projection_class_embeddings_input_dim, config.time_embed_dim)
            if config.addition_time_embed_dim
            else None
        )
        self.skip_channels = self._build_down(widths)
        self.mid_block = MidLevel(
            config,
            inputs=[widths[-1]] * config.mid_resnets,
            channels=widths[-1],
            heads=config.num_attention_heads[-1],
            depths=(config.mid_transformer_layers,) if config.mid_transformer_layers else (),
        )

    def _build_down(self, widths: tuple[int, ...]) -> list[int]:
        """Make `down_blocks`; returns the channel counts of the skip connections, from first to last."""
        config = self.config
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for i, width in enumerate(widths):
            inputs = [skips[-1]] + [width] * (config.layers_per_block - 1)
            level = DownLevel(config, inputs, width, config.num_attention_heads[i], config.down_depths(i))
            skips += [width] * config.layers_per_block
            if i < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(level)
        return skips

    def _project_times(self) -> None:
        """Stack all blocks' time projections into one product. The last step of making a network."""
        self.cross_attentions = sum(isinstance(m, CrossAttention) for m in self.modules())
        blocks = {name: m for name, m in self.named_modules() if isinstance(m, ResBlock)}
        widths = tuple(block.out_channels for block in blocks.values())
        self.time_sizes = tuple(
            width if block.conv_shortcut is None else 2 * width for width, block in zip(widths, blocks.values())
        )
        self.time_projections = Linear(
            self.config.time_embed_dim,
            sum(widths),
            parts=tuple(f"{name}.time_emb_proj" for name in blocks),
            part_sizes=widths,
        )

    def recompute_blocks(self, recompute: bool = True) -> None:
        """Set `recompute` of every level."""
        for module in self.modules():
            if isinstance(module, UNetLevel):
                module.recompute = recompute

    def embed_time(
        self, timestep: torch.Tensor, added: AddedConditioning | None = None, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """Time embeddings, projected for every residual block in one product, with the bias of the block's `conv1`.

        Args:
            timestep: `[N]`.
            added: SDXL's added conditioning; its first dimension is N or 1.
            guidance_scale: an input of UNets with `time_cond_proj_dim`; others ignore it.

        Returns:
            `[N, sum of time_sizes]`.
        """
        return self.embed_conditions(timestep, self._embed_guidance(timestep, guidance_scale), added)

    def embed_conditions(
        self, timestep: torch.Tensor, cond: torch.Tensor | None, added: AddedConditioning | None
    ) -> torch.Tensor:
        """`embed_time` with the guidance scale's sinusoids `[N or 1, time_cond_proj_dim]`, or None: without them."""
        config, dtype = self.config, self.conv_in.weight.dtype
        waves = timestep_embedding(timestep, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        embedding = self.time_embedding(waves.to(dtype), cond)
        if self.add_embedding is not None:
            if added is None:
                raise ValueError("this UNet needs added conditioning (pooled text and sizes)")
            sizes = timestep_embedding(
                added.sizes.flatten(), config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift
            ).view(len(added.sizes), -1)
            embedding = embedding + self.add_embedding(torch.cat([added.pooled.to(dtype), sizes.to(dtype)], dim=-1))
        return self.project_time(embedding)

    def project_time(self, embedding: torch.Tensor) -> torch.Tensor:
        """What the blocks add to their maps: `[N, time_embed_dim]` to `[N, sum of time_sizes]`.

        The biases of the blocks' convolutions are constants of the same sums. Added here, once for all steps, they cost
        no pass over a map; a changed bias takes effect in the next call.
        """
        layer = self.time_projections
        blocks = [block for block in self.modules() if isinstance(block, ResBlock)]
        first = torch.cat([block.conv1.bias for block in blocks if block.conv1.bias is not None])
        assert layer.bias is not None and layer.bias.shape == first.shape
        projected = layer(activate(embedding, "silu"), bias=layer.bias + first)
        parts: list[torch.Tensor] = []
        for block, own in zip(blocks, projected.split(layer.part_sizes, dim=-1)):
            parts.append(own)
            if block.conv_shortcut is not None:
                assert block.conv2.bias is not None and block.conv_shortcut.bias is not None
                parts.append((block.conv2.bias + block.conv_shortcut.bias).expand(len(own), -1))
        return torch.cat(parts, dim=-1)

    def _embed_guidance(self, timestep: torch.Tensor, guidance_scale: float) -> torch.Tensor | None:
        """Sinusoids `[1, channels]` of 1000 w, w = guidance_scale - 1 (Luo et al. 2023, section 4.2)."""
        if not self.config.time_cond_proj_dim:
            return None
        w = timestep.new_tensor([guidance_scale - 1.0], dtype=torch.float32)
        waves = timestep_embedding(1000.0 * w, self.config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1)
        return waves.to(self.conv_in.weight.dtype)

    def project_context(self, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of every cross-attention for a text `[B, L, cross_attention_dim]`, in order of use."""
        return tuple(m.project_context(context) for m in self.modules() if isinstance(m, CrossAttention))

    def _by_attention(self, key_values: tuple[torch.Tensor, ...]) -> TextInputs:
        """What each cross-attention reads: the text's keys and values; or a tuple, where there are image prompts."""
        if len(key_values) == self.cross_attentions:
            return iter(key_values)
        return iter([key_values[i :: self.cross_attentions] for i in range(self.cross_attentions)])

    def contract(
        self, x: torch.Tensor, times: BlockInputs, texts: TextInputs, adapter: Sequence[torch.Tensor] = ()
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """All skip connections, of which `x` from `conv_in` is the first, and the lowest map.

        adapter: a T2I-Adapter's maps, one for each level from the first on; one more is for the lowest map, if it has
            its size (Mou et al. 2023, section 3.2).
        """
        skips = [x]
        for i, level in enumerate(self.down_blocks):
            skips += level(skips[-1], times, texts, adapter[i] if i < len(adapter) else None)
        x = self.mid_block(skips[-1], times, texts)
        last = adapter[len(self.down_blocks)] if len(adapter) > len(self.down_blocks) else None
        return skips, x if last is None or last.shape != x.shape else x + last


class UNet(ContractingPath):
    """Predicts noise, v or the image (`SchedulerConfig.prediction_type`) from a noisy latent, a timestep and a text.

    In the papers' terms, `down_blocks` and `mid_block` are the contracting path, `up_blocks` the expanding path.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        width = config.block_out_channels[0]
        self._build_up(config.block_out_channels, list(self.skip_channels))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, config.norm_eps, silu=True)
        self.conv_out = Conv2d(width, config.out_channels)
        self._project_times()

    def _build_up(self, widths: tuple[int, ...], skips: list[int]) -> None:
        config = self.config
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for i in reversed(range(len(widths))):
            inputs = []
            for _ in range(config.layers_per_block + 1):
                skip = skips.pop()
                inputs.append(below + skip if config.skip == "concat" else below)
                below = widths[i]
            level = UpLevel(config, inputs, widths[i], config.num_attention_heads[i], config.up_depths(i))
            level.concatenates = config.skip == "concat"
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(widths[i])])
            self.up_blocks.append(level)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        added: AddedConditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """The whole network in one call.

        Args:
            x: noisy latent `[B, H, W, in_channels]`, any H and W.
            timestep: `[B]`, in training steps.
            context: text features `[B, L, cross_attention_dim]`.
            added: SDXL's added conditioning.
            guidance_scale: as in `embed_time`.

        Returns:
            `[B, H, W, out_channels]`.
        """
        return self.denoise(x, self.embed_time(timestep, added, guidance_scale), self.project_context(context))

    def denoise(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        key_values: tuple[torch.Tensor, ...],
        control: list[torch.Tensor] | None = None,
        adapter: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """The part of `forward` that depends on `x`.

        Args:
            x: as in `forward`.
            time: `[B or 1, ...]` from `embed_time`.
            key_values: from `project_context`. Of image prompts, after them: of each, keys and values of every
                cross-attention, and as many masks, if it has one.
            control: ControlNets' residuals for the skip connections and, last, for the lowest map.
            adapter: a T2I-Adapter's maps, as in `contract`.
        """
        times = iter(time.split(self.time_sizes, dim=-1))
        texts = self._by_attention(key_values)
        skips, x = self.contract(self.conv_in(x), times, texts, adapter)
        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control[:-1], strict=True)]
            x = x + control[-1]
        for level in self.up_blocks:
            x = level(x, skips, times, texts)
        return self.conv_out(self.conv_norm_out(x))
