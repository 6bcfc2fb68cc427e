"""The denoising UNet (Rombach et al. 2022; SDXL: Podell et al. 2023).

Whatever does not depend on the latent is computed outside the denoising loop: `project_context` once per prompt,
`embed_time` once per run for all steps. `denoise` is the rest of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from fastsd.config import UNetConfig
from fastsd.kernels.linear import activate
from fastsd.model.call_options import PLAIN, CallOptions, Perturbation
from fastsd.model.layers import (
    Conv2d,
    CrossAttention,
    Downsample,
    GroupNorm,
    KeyValue,
    Linear,
    ResBlock,
    TransformerBlock,
    Upsample,
    timestep_embedding,
)
from fastsd.model.unet_levels import BlockInputs, DownLevel, MidLevel, UNetLevel, UpLevel


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
        levels = [m for m in self.modules() if isinstance(m, UNetLevel)]
        self.block_depths = tuple(depth for level in levels for depth in level.block_depths)
        self.cross_attentions = sum(self.block_depths)
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

    def block_inputs(
        self, time: torch.Tensor, key_values: tuple[torch.Tensor, ...], perturbed: Perturbation | None = None
    ) -> list[BlockInputs]:
        """What each residual block, with the transformer after it, reads; in order of use.

        time, key_values: as in `UNet.denoise`. With image prompts a cross-attention reads a tuple.
        """
        count, texts = self.cross_attentions, list[KeyValue](key_values)
        if len(texts) != count:
            texts = [key_values[i::count] for i in range(count)]
        own = [0] * count
        if perturbed is not None:
            for number in perturbed.attentions:
                own[number] = perturbed.samples
        found, start = [], 0
        for block, depth in zip(time.split(self.time_sizes, dim=-1), self.block_depths, strict=True):
            end = start + depth
            found.append(BlockInputs(block, tuple(texts[start:end]), tuple(own[start:end])))
            start = end
        return found

    def skips(
        self,
        x: torch.Tensor,
        blocks: Iterator[BlockInputs],
        adapter: Sequence[torch.Tensor] = (),
        most: int | None = None,
    ) -> list[torch.Tensor]:
        """The skip connections, of which `x` from `conv_in` is the first.

        adapter: a T2I-Adapter's maps, as in `contract`.
        most: only so many, the first, are computed; None: all.
        """
        most, skips = len(self.skip_channels) if most is None else most, [x]
        for i, level in enumerate(self.down_blocks):
            if len(skips) < most:
                own = adapter[i] if i < len(adapter) else None
                skips += level(skips[-1], blocks, own, most - len(skips))
        return skips

    def contract(
        self, x: torch.Tensor, blocks: Iterator[BlockInputs], adapter: Sequence[torch.Tensor] = ()
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """All skip connections, and the lowest map.

        adapter: a T2I-Adapter's maps, one for each level from the first on; one more is for the lowest map, if it has
            its size (Mou et al. 2023, section 3.2).
        """
        skips = self.skips(x, blocks, adapter)
        x = self.mid_block(skips[-1], blocks)
        last = adapter[len(self.down_blocks)] if len(adapter) > len(self.down_blocks) else None
        return skips, x if last is None or last.shape[1:] != x.shape[1:] else x + last


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
        options: CallOptions = PLAIN,
    ) -> torch.Tensor:
        """The part of `forward` that depends on `x`.

        Args:
            x: as in `forward`.
            time: `[B or 1, ...]` from `embed_time`.
            key_values: from `project_context`. Of image prompts, after them: of each, keys and values of every
                cross-attention, and as many masks, if it has one.
            control: ControlNets' residuals for the skip connections and, last, for the lowest map.
            adapter: a T2I-Adapter's maps, as in `contract`.
            options: what this call does otherwise.
        """
        inputs, deep = self.block_inputs(time, key_values, options.perturbed), options.deep
        blocks, x = iter(inputs), self.conv_in(x)
        if deep is not None and deep.reuses:
            skips, x = self.skips(x, blocks, adapter, deep.branch + 1), deep.features
            blocks = iter(inputs[-len(skips) :])
        else:
            skips, x = self.contract(x, blocks, adapter)
            x = x if control is None else x + control[-1]
        if control is not None:
            skips = [skip + residual for skip, residual in zip(skips, control)]
        first = len(self.skip_channels) - len(skips)  # the expanding block that reads the last of them
        for number, level in enumerate(cast(list[UpLevel], self.up_blocks)):
            if first < len(level.resnets):
                x = level(x, skips, blocks, number, options, max(first, 0))
            first -= len(level.resnets)
        return self.conv_out(self.conv_norm_out(x))

    def attentions_in(self, name: str) -> frozenset[int]:
        """The numbers, in order of use, of the self-attentions in the module of a name; "mid" is the middle block."""
        blocks = [name for name, module in self.named_modules() if isinstance(module, TransformerBlock)]
        inside = (f"{name}.", f"{name}_block.")
        return frozenset(i for i, block in enumerate(blocks) if f"{block}.".startswith(inside))

    def deep_shape(self, branch: int, samples: int, height: int, width: int) -> tuple[int, int, int, int]:
        """The shape of DeepCache's features for a latent of `height` and `width`.

        branch: the number of a skip connection, 0 to len(skip_channels) - 1.
        """
        per_level = self.config.layers_per_block + 1
        for _ in range(branch // per_level):
            height, width = (height + 1) // 2, (width + 1) // 2
        place = len(self.skip_channels) - 1 - branch
        level = cast(UpLevel, self.up_blocks[place // per_level])
        channels = len(cast(ResBlock, level.resnets[place % per_level]).norm1.weight)
        return samples, height, width, channels - (self.skip_channels[branch] if level.concatenates else 0)
