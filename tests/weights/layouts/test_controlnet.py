"""Files that are not ControlNets, or not for this model, are refused in one line with file, key and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.weights.layouts.controlnet import load_controlnet
from tests.support import tiny

Tensors = dict[str, torch.Tensor]
CONV_IN = "controlnet_cond_embedding.conv_in.weight"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return tiny.controlnet(tiny.UNET)


def changed(**changes: torch.Tensor | None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in {**tensors, **changes}.items() if v is not None}


CASES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a missing key": (
        changed(**{"mid_block.resnets.0.norm1.weight": None}),
        "mid_block.resnets.0.norm1.weight",
    ),
    "an extra key": (changed(**{"down_blocks.7.x": torch.ones(2)}), "down_blocks.7.x .* matches no parameter"),
    "another shape": (changed(**{"conv_in.weight": torch.ones(32, 5, 3, 3)}), r"conv_in.weight is \[32, 5, 3, 3\]"),
    "NaN": (changed(**{"conv_in.bias": torch.full((32,), float("nan"))}), "conv_in.bias holds NaN"),
    "an image of one channel": (changed(**{CONV_IN: torch.ones(8, 1, 3, 3)}), r"conv_in.weight is \[8, 1, 3, 3\]"),
    "a hint that is a vector": (changed(**{CONV_IN: torch.ones(8)}), "not layers that shrink an image"),
    "no tensors": (lambda _: {}, "it holds no tensors"),
    "a LoRA": (lambda _: {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "a LoRA, which lora takes"),
    "a Control-LoRA": (changed(**{CONV_IN: None, "lora_controlnet": torch.ones(1)}), "a Control-LoRA"),
    "a checkpoint": (lambda _: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, "a whole checkpoint"),
    "another family's": (
        lambda _: tiny.controlnet(replace(tiny.UNET, cross_attention_dim=64)),
        "64 text features.* has 32",
    ),
    "a wider one": (
        lambda _: tiny.controlnet(replace(tiny.UNET, block_out_channels=(64, 64))),
        r"is \[64.*; the config expects \[32",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(tensors: Tensors, tmp_path: Path, case: str) -> None:
    build, message = CASES[case]
    file = tmp_path / "x.safetensors"
    save_file(build(tensors), file)
    with pytest.raises(FastsdError, match=message) as error:
        load_controlnet(file, tiny.UNET, torch.float32)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"global_pool_conditions": True}, "global_pool_conditions is True"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768; the model's text has 32"),
        ({"_class_name": "ControlNetUnionModel"}, "it should be ControlNetModel"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "'rgb' or 'bgr'"),
    ],
)
def test_unsupported_configs(tensors: Tensors, tmp_path: Path, config: dict[str, object], message: str) -> None:
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel", **config}))
    with pytest.raises(FastsdError, match=message):
        load_controlnet(tmp_path, tiny.UNET, torch.float32)


def test_a_controlnet_without_attention(tmp_path: Path) -> None:
    """The small ControlNets for SDXL consist of residual blocks only."""
    small = replace(tiny.UNET, transformer_layers_per_block=(0, 0), mid_transformer_layers=0)
    save_file(tiny.controlnet(small), tmp_path / "small.safetensors")
    net = load_controlnet(tmp_path / "small.safetensors", tiny.UNET, torch.float32)
    assert net.project_context(torch.ones(1, 5, 32)) == ()


def test_a_missing_file_and_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such"):
        load_controlnet(tmp_path / "nowhere.safetensors", tiny.UNET, torch.float32)
    with pytest.raises(FastsdError, match="no config.json in this folder, so it is not a ControlNet"):
        load_controlnet(tmp_path, tiny.UNET, torch.float32)


def test_weights_that_do_not_fit_in_memory(tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 1000)
    with pytest.raises(FastsdError, match="the weights take"):
        load_controlnet(tmp_path / "x.safetensors", tiny.UNET, torch.float32)
