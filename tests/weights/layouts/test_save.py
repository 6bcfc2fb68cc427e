"""A saved folder loads back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastsd.components import Components
from fastsd.weights import load_folder, save_folder
from tests.support.folders import UNET_FILE, same_weights
from tests.support.tiny import UNET, sd1, sdxl


@pytest.mark.parametrize("make", [sd1, sdxl])
def test_a_saved_model_loads_bit_for_bit(make: Callable[[], Components], tmp_path: Path) -> None:
    components = make()
    save_folder(components, tmp_path, torch.float32)
    loaded = load_folder(tmp_path, torch.float32)
    assert same_weights(loaded, components)
    for name in ("scheduler", "sample_size", "zeros_for_empty_prompt", "aesthetic_score"):
        assert getattr(loaded, name) == getattr(components, name), name
    assert loaded.unet.config == components.unet.config and loaded.vae.config == components.vae.config
    assert [e.config for e in loaded.text_encoders] == [e.config for e in components.text_encoders]


def test_half_precision_survives_saving(tmp_path: Path) -> None:
    components = sd1()
    for module in (components.unet, components.vae, *components.text_encoders):
        module.bfloat16()
    save_folder(components, tmp_path, torch.bfloat16)
    assert same_weights(load_folder(tmp_path, torch.bfloat16), components)
    assert load_file(tmp_path / UNET_FILE)["conv_in.weight"].dtype == torch.bfloat16


def test_added_skips(tmp_path: Path) -> None:
    """A UNet with the config value `skip="add"` runs, has gradients everywhere, and survives saving."""
    components = sd1(replace(UNET, skip="add"))
    unet = components.unet
    concatenated = sum(p.numel() for p in sd1().unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) < concatenated
    x, context = torch.randn(2, 8, 8, 4), torch.randn(2, 5, 32)
    out = unet(x, torch.tensor([3.0, 700.0]), context)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in unet.parameters())
    save_folder(components, tmp_path, torch.float32)
    loaded = load_folder(tmp_path, torch.float32)
    assert loaded.unet.config.skip == "add" and same_weights(loaded, components)
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(x, torch.tensor([3.0, 700.0]), context), out.detach())
