"""Tiny random IP-Adapters in the form of h94's files, and a vision tower for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIDE, PROJECTION = 32, 40
KINDS = ("embedding", "resampler", "full")


def make_tower(folder: Path, act: str = "gelu") -> Any:
    """transformers' vision tower, saved in a folder."""
    import transformers

    from tests.support.families import disturbed

    config = transformers.CLIPVisionConfig(
        **VISION, projection_dim=PROJECTION, image_size=SIDE, patch_size=8, hidden_act=act
    )
    tower = disturbed(transformers.CLIPVisionModelWithProjection(config))
    tower.save_pretrained(folder)
    return tower


def make_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def make_adapter(kind: str, text: int, widths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A file's tensors; `widths` of the cross-attentions in the file's order: down, up, middle."""
    random = torch.Generator().manual_seed(seed)

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, torch.Tensor]:
        found = {f"{name}.weight": torch.randn(rows, columns, generator=random) * columns**-0.5}
        return found | ({f"{name}.bias": torch.randn(rows, generator=random) * 0.1} if bias else {})

    def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(channels, generator=random),
            f"{name}.bias": 0.1 * torch.randn(channels, generator=random),
        }

    hidden, channels, inner = VISION["hidden_size"], 32, 128
    if kind == "embedding":
        table = linear("proj", 4 * text, PROJECTION) | norm("norm", text)
    elif kind == "full":
        table = linear("proj.0", hidden, hidden) | linear("proj.2", text, hidden) | norm("proj.3", text)
    else:
        table = {"latents": torch.randn(1, 6, channels, generator=random)} | linear("proj_in", channels, hidden)
        table |= linear("proj_out", text, channels) | norm("norm_out", text)
        for i in range(4):  # as many as diffusers assumes
            table |= norm(f"layers.{i}.0.norm1", channels) | norm(f"layers.{i}.0.norm2", channels)
            table |= linear(f"layers.{i}.0.to_q", inner, channels, False)
            table |= linear(f"layers.{i}.0.to_kv", 2 * inner, channels, False)
            table |= linear(f"layers.{i}.0.to_out", channels, inner, False)
            table |= norm(f"layers.{i}.1.0", channels) | linear(f"layers.{i}.1.1", 4 * channels, channels, False)
            table |= linear(f"layers.{i}.1.3", channels, 4 * channels, False)
    found = {f"image_proj.{key}": value for key, value in table.items()}
    for i, width in enumerate(widths):
        for part in ("to_k_ip", "to_v_ip"):
            found |= linear(f"ip_adapter.{2 * i + 1}.{part}", width, text, False)
    return found


def file_widths(unet: Any) -> list[int]:
    """The widths of our UNet's cross-attentions in the file's order."""
    from fastsd.model.layers import CrossAttention

    layers = {name: module for name, module in unet.named_modules() if isinstance(module, CrossAttention)}
    places = ("down_blocks", "up_blocks", "mid_block")
    return [layers[name].to_q.weight.shape[0] for place in places for name in layers if name.startswith(place)]


def write_adapter(folder: Path, unet: Any, kind: str = "embedding", seed: int = 0) -> Path:
    """An adapter for our UNet, with its vision tower beside it."""
    from safetensors.torch import save_file

    if not (folder / "image_encoder").exists():
        torch.manual_seed(4)
        make_tower(folder / "image_encoder")
    path = folder / f"{kind}-{seed}.safetensors"
    save_file(make_adapter(kind, unet.config.cross_attention_dim, file_widths(unet), seed), path)
    return path
