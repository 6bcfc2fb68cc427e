"""diffusers' UNet and ControlNet, answered by ours."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.config import ControlNetConfig
from fastsd.diffusers.memo import Memo
from fastsd.diffusers.twin import Twin
from fastsd.model.controlnet import ControlNet
from fastsd.model.unet import AddedConditioning, ContractingPath, UNet
from fastsd.weights.layouts.unet_config import read_unet

# Of diffusers' attention, in every way that computes the same.
PLAIN_ATTENTION = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
FREEU = ("s1", "s2", "b1", "b2")


def plain_config(config: Any) -> dict[str, Any]:
    """A host's config as its JSON file would hold it."""
    return json.loads(json.dumps(dict(config), default=str))


class PathTwin(Twin):
    """What a UNet and a ControlNet have in common: time, text, adapters' scale."""

    def __init__(self, host: Any, name: str, make: Callable[[], nn.Module]):
        super().__init__(host, name, make)
        self._texts: Memo[tuple[torch.Tensor, ...]] = Memo()

    def answer(self, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        """See `Twin.answer`. `scale` in `cross_attention_kwargs` is of the adapters, during this call."""
        scale = (arguments["cross_attention_kwargs"] or {}).get("scale", 1.0)
        reason = None
        with self.lock:
            with _adapters_scaled(self.host, scale):
                reason, result = self.attempt(arguments)
        if reason is None:
            return result
        self.say(reason)
        return call()

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        attention = self._attention()
        if attention is not None:
            return attention
        given = arguments["cross_attention_kwargs"] or {}
        others = sorted(set(given) - {"scale"})
        if others:
            return f"cross_attention_kwargs has {others[0]}"
        for name in ("class_labels", "attention_mask", "encoder_attention_mask"):
            if arguments.get(name) is not None:
                return f"{name} is given"
        known = {"text_embeds", "time_ids"} if self.host.config["addition_embed_type"] else set()
        unknown = sorted(set(arguments["added_cond_kwargs"] or {}) - {"text_embeds", "time_ids"})
        if unknown:
            return f"added_cond_kwargs has {unknown[0]}"
        if known - set(arguments["added_cond_kwargs"] or {}):
            return "added conditions are missing"  # diffusers says which
        if not isinstance(arguments["encoder_hidden_states"], torch.Tensor):
            return "encoder_hidden_states is no tensor"
        if arguments["sample"].dtype != next(self.host.parameters()).dtype:
            return "the latents have another dtype than the weights"
        return None

    def _attention(self) -> str | None:
        if getattr(self.host, "encoder_hid_proj", None) is not None:
            return f"it has {type(self.host.encoder_hid_proj).__name__} (IP-Adapter)"
        for module in self.host.modules():
            processor = getattr(module, "processor", None)
            if processor is not None and type(processor).__name__ not in PLAIN_ATTENTION:
                return f"its attention is {type(processor).__name__}"
            if getattr(module, "_chunk_size", None) is not None:
                return "forward chunking is on"
            if any(getattr(module, name, None) is not None for name in FREEU):
                return "FreeU is on"
        return None

    def conditions(self, net: ContractingPath, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent `[B, h, w, C]`, and the time embeddings of all blocks."""
        sample, timestep = arguments["sample"], arguments["timestep"]
        if not isinstance(timestep, torch.Tensor):
            kind = torch.float64 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor([timestep], dtype=kind, device=sample.device)
        timestep = timestep.reshape(-1).to(sample.device)
        added, cond, given = None, arguments["timestep_cond"], arguments["added_cond_kwargs"] or {}
        if net.add_embedding is not None:
            added = AddedConditioning(given["text_embeds"], given["time_ids"].reshape(len(given["text_embeds"]), -1))
            timestep = timestep.expand(len(sample))
        elif cond is not None:
            timestep = timestep.expand(len(sample))
        dtype = net.conv_in.weight.dtype
        time = net.embed_conditions(timestep.float(), None if cond is None else cond.to(dtype), added)
        return sample.permute(0, 2, 3, 1).contiguous(), time

    def texts(self, net: ContractingPath, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of the text, computed once while a pipeline gives the same one."""
        stamp = (net, self.changes)
        return self._texts((context,), stamp, lambda: net.project_context(context.to(net.conv_in.weight.dtype)))


@contextlib.contextmanager
def _adapters_scaled(host: nn.Module, scale: float) -> Iterator[None]:
    if scale == 1.0:
        yield
        return
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(host, scale)
    try:
        yield
    finally:
        unscale_lora_layers(host, scale)


class UNetTwin(PathTwin):
    """Answers `UNet2DConditionModel`."""

    def __init__(self, host: Any, name: str):
        config, _ = read_unet(Path(f"{name}.config"), plain_config(host.config))
        super().__init__(host, name, lambda: UNet(config))

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        down, mid = arguments["down_block_additional_residuals"], arguments["mid_block_additional_residual"]
        if (down is None) is not (mid is None):
            return "ControlNet's residuals are incomplete"
        return super().refuses(arguments)

    def compute(self, net: nn.Module, arguments: dict[str, Any]) -> Any:
        assert isinstance(net, UNet)
        x, time = self.conditions(net, arguments)
        texts = self.texts(net, arguments["encoder_hidden_states"])
        down, mid = arguments["down_block_additional_residuals"], arguments["mid_block_additional_residual"]
        control = [] if down is None else [_nhwc(r) for r in (*down, mid)]
        adapter = [_nhwc(r) for r in arguments["down_intrablock_additional_residuals"] or ()]
        sizes = len(texts), len(control), len(adapter)

        def denoise(x: torch.Tensor, time: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            texts, rest = rest[: sizes[0]], rest[sizes[0] :]
            control, adapter = list(rest[: sizes[1]]), rest[sizes[1] :]
            return net.denoise(x, time, texts, control or None, adapter)

        inputs = (x, time, *texts, *control, *adapter)
        out = self.graphs(("unet", sizes), denoise, *inputs, weights=net).permute(0, 3, 1, 2).contiguous()
        if not arguments["return_dict"]:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)


class ControlNetTwin(PathTwin):
    """Answers `ControlNetModel`."""

    def __init__(self, host: Any, name: str):
        given = plain_config(host.config)
        for key in ("global_pool_conditions", "conditioning_channels", "controlnet_conditioning_channel_order"):
            given.pop(key, None)
        hints = tuple(given.pop("conditioning_embedding_out_channels", None) or (16, 32, 96, 256))
        levels = len(given["down_block_types"])
        unet = {"_class_name": "UNet2DConditionModel", "up_block_types": _mirrored(given["down_block_types"])}
        config, _ = read_unet(Path(f"{name}.config"), given | unet)
        assert levels == len(config.block_out_channels)
        config = replace(config, time_cond_proj_dim=0)
        super().__init__(host, name, lambda: ControlNet(ControlNetConfig(config, hints)))
        self._hints: Memo[torch.Tensor] = Memo()

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        if arguments["timestep_cond"] is not None:
            return "timestep_cond is given"
        return super().refuses(arguments)

    def compute(self, net: nn.Module, arguments: dict[str, Any]) -> Any:
        assert isinstance(net, ControlNet)
        x, time = self.conditions(net, arguments)
        texts, image = self.texts(net, arguments["encoder_hidden_states"]), arguments["controlnet_cond"]
        if self.host.config["controlnet_conditioning_channel_order"] == "bgr":
            hint = self._hints((image,), (net, self.changes), lambda: net.embed_hint(_nhwc(image.flip(1))))
        else:
            hint = self._hints((image,), (net, self.changes), lambda: net.embed_hint(_nhwc(image)))
        one = torch.ones(1, dtype=torch.float32, device=x.device)

        def denoise(x: torch.Tensor, time: torch.Tensor, hint: torch.Tensor, *texts: torch.Tensor) -> Any:
            return tuple(net.denoise(x, time, texts, hint, one))

        maps = self.graphs("controlnet", denoise, x, time, hint, *texts, weights=net)
        maps = self._scaled([m.permute(0, 3, 1, 2) for m in maps], arguments)
        if not arguments["return_dict"]:
            return maps[:-1], maps[-1]
        from diffusers.models.controlnets.controlnet import ControlNetOutput

        make: Any = ControlNetOutput
        return make(down_block_res_samples=maps[:-1], mid_block_res_sample=maps[-1])

    def _scaled(self, maps: list[torch.Tensor], arguments: dict[str, Any]) -> list[torch.Tensor]:
        """The residuals by their strength; in guess mode from a tenth of it on (Zhang et al. 2023, section 3.4)."""
        pooled, scale = self.host.config["global_pool_conditions"], arguments["conditioning_scale"]
        if arguments["guess_mode"] and not pooled:
            scales = torch.logspace(-1, 0, len(maps), dtype=torch.float32, device=maps[0].device) * scale
            return [m * s for m, s in zip(maps, scales, strict=True)]
        maps = [m * scale for m in maps]
        return [m.mean(dim=(2, 3), keepdim=True) for m in maps] if pooled else maps


def _mirrored(down: list[str]) -> list[str]:
    """The up blocks of a path, which a ControlNet's config does not have."""
    return [name.replace("Down", "Up") for name in reversed(down)]


def _nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)
