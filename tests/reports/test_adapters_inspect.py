"""What people reported of `fastsd inspect` on files that are no checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.errors import FastsdError
from fastsd.weights.inspect import inspect
from fastsd.weights.layouts.names import folder_keys
from tests.support import tiny
from tests.support.adapter_writers import small_lora

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
PAIR = {"lora_down.weight": torch.ones(4, 768), "lora_up.weight": torch.ones(320, 4), "alpha": torch.tensor(4.0)}
KOHYA = {f"lora_unet_{Q.replace('.', '_')}.{role}": value for role, value in PAIR.items()}
FILES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "an embedding": ({"emb_params": torch.ones(3, 768)}, "a textual inversion for SD 1, 3 vectors"),
    "one of diffusers": ({"<cat-toy>": torch.ones(1024)}, "a textual inversion for SD 2, 1 vector;"),
    "one of SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "a textual inversion for SDXL"),
    "a LoRA": (KOHYA, "an adapter: LoRA;"),
    "a LoRA without a prefix": (
        {f"{Q}.lora_A.weight": torch.ones(4, 768), f"{Q}.lora_B.weight": torch.ones(320, 4)},
        "an adapter: LoRA;",
    ),
    "LyCORIS's differences": ({"lora_unet_conv_in.diff": torch.ones(4, 4)}, "an adapter: differences of weights"),
    "LoHa": (
        {f"lora_unet_x.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "an adapter: LoHa",
    ),
    "T-LoRA": ({"lora_unet_x.lambda_layer": torch.ones(2)}, "T-LoRA, which fastsd does not read"),
    "a ControlNet": (tiny.controlnet(tiny.UNET), "a ControlNet"),
    "one in the original layout": ({"control_model.input_blocks.0.0.weight": torch.ones(2)}, "a ControlNet"),
    "TAESD": ({"decoder.layers.0.weight": torch.ones(2)}, "TAESD"),
    "half of TAESD": ({"1.weight": torch.ones(2), "3.conv.0.weight": torch.ones(2)}, "one half of TAESD"),
    "an autoencoder": (dict.fromkeys(folder_keys(tiny.sd1().vae), torch.ones(2)), "an autoencoder"),
    "a text encoder": (dict.fromkeys(folder_keys(tiny.sd1().text_encoders[0]), torch.ones(2)), "a text encoder (CLIP)"),
    "a UNet": (dict.fromkeys(folder_keys(tiny.sd1().unet), torch.ones(2)), "a UNet alone"),
    "an upscaler": ({"model.1.sub.0.RDB1.conv1.0.weight": torch.ones(2)}, "an upscaler"),
    "an IP-Adapter": ({"image_proj.proj.weight": torch.ones(2)}, "an IP-Adapter"),
}


@pytest.mark.parametrize("case", FILES)
def test_inspect_says_what_a_file_is(case: str, tmp_path: Path) -> None:
    tensors, said = FILES[case]
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    facts = dict(inspect(tmp_path / "x.safetensors"))
    assert said in facts["kind"] and "family" not in facts


def test_inspect_counts_an_adapters_layers(tmp_path: Path) -> None:
    save_file(KOHYA | small_lora(), tmp_path / "x.safetensors")
    facts = dict(inspect(tmp_path / "x.safetensors"))
    assert facts["layers"] == "2 of the UNet, 1 of the text encoder" and facts["ranks"] == "1, 4"
    assert facts["base"] == "SD 1"


PICKLES: dict[str, tuple[object, str]] = {
    "A1111's embedding": ({"string_to_param": {"*": torch.ones(2, 768)}, "name": "x"}, "a textual inversion for SD 1"),
    "of the first trainer": (
        {"string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 1024))})},
        "a textual inversion for SD 2, 2 vectors",
    ),
    "a list in place of vectors": ({"string_to_param": [1]}, "a textual inversion without vectors"),
    "a hypernetwork": ({768: [{"linear.weight": torch.ones(2)}], "step": 3}, "a hypernetwork"),
    "an upscaler": ({"params_ema": {"conv_first.weight": torch.ones(2)}}, "an upscaler"),
    "a LoRA": (KOHYA, "an adapter: LoRA;"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_inspect_says_what_a_pickle_is(case: str, tmp_path: Path) -> None:
    content, said = PICKLES[case]
    torch.save(content, tmp_path / "x.pt")
    assert said in dict(inspect(tmp_path / "x.pt", allow_pickle=True))["kind"]
    with pytest.raises(FastsdError, match="a pickle"):
        inspect(tmp_path / "x.pt")
