"""Running a fastsd module on what the module of the same name in diffusers or transformers was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastsd.model import clip, layers, unet, vae

Maps = torch.Tensor | list[torch.Tensor]


class Call(NamedTuple):
    """One call of their module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def get(self, position: int, name: str) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def x(self) -> torch.Tensor:
        return self.get(0, "hidden_states")


def record(module: nn.Module) -> tuple[dict[str, Call], list[Any]]:
    """The last call of every submodule by name, filled while `module` runs; and the hooks to remove."""
    calls: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = Call(tuple(map(single, args)), kwargs, output)

        return keep

    hooks = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in module.named_modules()]
    return calls, hooks


def single(x: Any) -> Any:
    """What theirs was given in float64, as ours takes it."""
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


class UNetRun:
    """Calls of fastsd's UNet blocks with the text and time that the whole network was given."""

    def __init__(self, model: unet.UNet, calls: dict[str, Call], context: torch.Tensor):
        self.context = context
        embedding = calls["time_embedding"].output
        if model.add_embedding is not None:
            embedding = embedding + calls["add_embedding"].output
        # As UNet.embed_time does it: one product for all blocks, split by their widths.
        projected = model.time_projections(nn.functional.silu(embedding)).split(model.time_sizes, dim=-1)
        names = [name for name, m in model.named_modules() if isinstance(m, layers.ResBlock)]
        self.times = dict(zip(names, projected, strict=True))

    def texts(self, module: nn.Module) -> unet.Embeddings:
        return iter([m.project_context(self.context) for m in module.modules() if isinstance(m, layers.CrossAttention)])

    def inside(self, name: str) -> unet.Embeddings:
        return iter([time for block, time in self.times.items() if block.startswith(name + ".")])

    def run(self, name: str, module: nn.Module, call: Call) -> Maps | None:
        """fastsd's output for `call`, in their layout; None where the two do not divide the work alike."""
        x = nhwc(call.x) if isinstance(call.x, torch.Tensor) else call.x
        if isinstance(module, unet.DownLevel):
            return [nchw(y) for y in module(x, self.inside(name), self.texts(module))]
        if isinstance(module, unet.MidLevel):
            return nchw(module(x, self.inside(name), self.texts(module)))
        if isinstance(module, unet.UpLevel):
            skips = [nhwc(skip) for skip in call.get(1, "res_hidden_states_tuple")]
            if (size := call.get(4, "upsample_size")) is not None and module.upsamplers is not None:
                skips = [x.new_zeros(1, *size, 1), *skips]  # the map that the next level down was made from
            elif module.upsamplers is not None:
                skips = [x.new_zeros(1, 2 * x.shape[1], 2 * x.shape[2], 1), *skips]
            return nchw(module(x, skips, self.inside(name), self.texts(module)))
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
    """The layers that UNet, VAE and text encoder share."""
    if isinstance(module, layers.ResBlock | vae.AttentionBlock | vae.MidBlock | vae.Level | vae.Encoder | vae.Decoder):
        return nchw(module(x))
    if isinstance(module, layers.SelfAttention | layers.FeedForward | clip.CausalAttention | clip.FeedForwardMLP):
        return module(x, torch.zeros_like(x))
    if isinstance(module, layers.GroupNorm) and x.ndim == 3:  # [B, C, S] in their attention
        return module(x.transpose(1, 2)[:, None])[:, 0].transpose(1, 2)
    if isinstance(module, layers.Upsample):
        size = call.get(1, "output_size")
        return nchw(module(x, None if size is None else torch.Size(size)))
    if isinstance(module, layers.Linear) and module.parts:
        return None  # several of theirs in one; likewise
    if isinstance(module, nn.ModuleList | nn.ModuleDict | clip.EncoderLayers | clip.TextModel | clip.TextEncoder):
        return None  # containers
    if isinstance(module, unet.UNet | vae.AutoencoderKL | clip.TokenTable):
        return None
    return nchw(module(x))


def expected(module: nn.Module, output: Any) -> Maps:
    """What a module of theirs gave: a map, or for a contracting level its skip connections."""
    if isinstance(module, layers.GroupNorm) and module.silu:
        return nn.functional.silu(output)  # a step of its own there
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], tuple | list):
        return list(output[1])
    return output[0]
