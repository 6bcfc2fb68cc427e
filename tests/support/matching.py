"""Run a fastsd module on the inputs of the module of the same name in diffusers or transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsd.model import clip, layers, unet, unet_levels, vae

Maps = torch.Tensor | list[torch.Tensor]


class Call(NamedTuple):
    """A recorded call of one of their modules."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def get(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def x(self) -> torch.Tensor:
        return self.get(0, "hidden_states")


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value; inf where shapes differ or ours is not finite."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def record(module: nn.Module) -> tuple[dict[str, Call], list[Any]]:
    """The last call of every submodule by name, filled while `module` runs, and the hooks to remove."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = Call(tuple(map(in_fp32, args)), kwargs, output)

        return keep

    hooks = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in module.named_modules()]
    return calls, hooks


def in_fp32(x: Any) -> Any:
    """An input of ours from a float64 input of theirs."""
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


class UNetRun:
    """Runs fastsd's UNet blocks with the text and time of a recorded call of the whole network."""

    def __init__(self, model: unet.UNet, calls: dict[str, Call], context: torch.Tensor):
        self.context = context
        embedding = calls["time_embedding"].output
        if model.add_embedding is not None:
            embedding = embedding + calls["add_embedding"].output
        projected = model.project_time(embedding).split(model.time_sizes, dim=-1)  # as in UNet.denoise
        names = [name for name, m in model.named_modules() if isinstance(m, layers.ResBlock)]
        self.times = dict(zip(names, projected, strict=True))

    def texts(self, module: nn.Module) -> tuple[layers.KeyValue, ...]:
        """Keys and values for the cross-attentions in a module."""
        return tuple(m.project_context(self.context) for m in module.modules() if isinstance(m, layers.CrossAttention))

    def blocks(self, name: str, level: unet_levels.UNetLevel) -> Iterator[unet_levels.BlockInputs]:
        """What the residual blocks and transformers of the level of that name read."""
        texts = iter(self.texts(level))
        for i, depth in enumerate(level.block_depths):
            yield unet_levels.BlockInputs(self.times[f"{name}.resnets.{i}"], tuple(islice(texts, depth)))

    def run(self, name: str, module: nn.Module, call: Call) -> Maps | None:
        """The module's output for `call`, in their layout; None where the two networks divide the work differently."""
        x = nhwc(call.x) if isinstance(call.x, torch.Tensor) else call.x
        if isinstance(module, unet_levels.DownLevel):
            return [nchw(y) for y in module(x, self.blocks(name, module))]
        if isinstance(module, unet_levels.MidLevel):
            return nchw(module(x, self.blocks(name, module)))
        if isinstance(module, unet_levels.UpLevel):
            skips = [nhwc(skip) for skip in call.get(1, "res_hidden_states_tuple")]
            if module.upsamplers is not None:  # ours upsamples to the size of the next skip connection
                size = call.get(4, "upsample_size") or (2 * x.shape[1], 2 * x.shape[2])
                skips = [x.new_zeros(1, *size, 1), *skips]
            return nchw(module(x, skips, self.blocks(name, module)))
        if isinstance(module, layers.ResBlock):
            return nchw(module(x, self.times[name]))
        if isinstance(module, layers.SpatialTransformer):
            return nchw(module(x, self.texts(module)))
        if isinstance(module, layers.TransformerBlock):
            return module(x, module.attn2.project_context(self.context))
        if isinstance(module, layers.CrossAttention):
            return module(x, module.project_context(self.context))
        return run_layer(module, x, call)


def run_layer(module: nn.Module, x: torch.Tensor, call: Call) -> Maps | None:
    """As `UNetRun.run`, for the layers that UNet, VAE and text encoder share."""
    if isinstance(
        module, layers.ResBlock | vae.AttentionBlock | vae.MidBlock | vae.VAELevel | vae.VAEEncoder | vae.VAEDecoder
    ):
        return nchw(module(x))
    if isinstance(module, layers.SelfAttention | layers.FeedForward | clip.CausalAttention | clip.TextMLP):
        return module(x, residual=torch.zeros_like(x))
    if isinstance(module, layers.GroupNorm) and x.ndim == 3:  # [B, C, S] in their attention
        return module(x.transpose(1, 2)[:, None])[:, 0].transpose(1, 2)
    if isinstance(module, layers.Upsample):
        size = call.get(1, "output_size")
        return nchw(module(x, None if size is None else torch.Size(size)))
    if isinstance(module, layers.Linear) and module.parts:
        return None  # several of theirs in one
    if isinstance(module, nn.ModuleList | nn.ModuleDict | clip.LayerStack | clip.TextModel | clip.TextEncoder):
        return None  # containers only
    if isinstance(module, unet.UNet | vae.AutoencoderKL | clip.Embedding):
        return None
    return nchw(module(x))


def expected(module: nn.Module, output: Any) -> Maps:
    """The output of one of their modules: a map, or a contracting level's skip connections."""
    if isinstance(module, layers.GroupNorm) and module.silu:
        return nn.functional.silu(output)  # a separate module of theirs
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], tuple | list):
        return list(output[1])
    return output[0]
