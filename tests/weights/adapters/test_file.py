"""The layer and the role in a key, in every spelling; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.weights.adapters.file import read_adapter
from fastsd.weights.adapters.layer_names import layer_names
from fastsd.weights.adapters.peft_config import METADATA
from fastsd.weights.adapters.roles import split_key

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("key", "layer", "role"),
    [
        ("lora_unet_mid_block_attn1_to_q.lora_down.weight", "lora_unet_mid_block_attn1_to_q", "down"),  # kohya
        (f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q", "down"),  # PEFT
        (f"{Q}.to_q.lora_B.default.weight", f"{Q}.to_q", "up"),  # PEFT, with the name of its adapter
        (f"unet.{Q}.processor.to_q_lora.up.weight", f"unet.{Q}.to_q", "up"),  # diffusers before 0.20
        (f"unet.{Q}.processor.to_out_lora.down.weight", f"unet.{Q}.to_out.0", "down"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.out_proj", "up"),
        ("lora_unet_conv_in.hada_w1_a", "lora_unet_conv_in", "w1_a"),  # LyCORIS
        ("lora_unet_conv_in.lokr_w2", "lora_unet_conv_in", "kron_w2"),
        ("unet.conv_in.weight", "unet.conv_in.weight", None),
        ("alpha", "alpha", None),  # a role needs a layer
    ],
)  # fmt: skip
def test_layer_and_role(key: str, layer: str, role: str | None) -> None:
    assert split_key(key) == (layer, role)


def test_every_name_of_a_layer() -> None:
    names = set(layer_names("unet", "mid_block.resnets.0.conv1", "middle_block.0.in_layers.2"))
    assert names == {
        "mid_block.resnets.0.conv1",
        "unet.mid_block.resnets.0.conv1",
        "base_model.model.mid_block.resnets.0.conv1",
        "lora_unet_mid_block_resnets_0_conv1",
        "lycoris_mid_block_resnets_0_conv1",
        "oft_unet_mid_block_resnets_0_conv1",
        "lycoris_middle_block_0_in_layers_2",
        "model.diffusion_model.middle_block.0.in_layers.2",
        "lora_unet_middle_block_0_in_layers_2",
        "diffusion_model.middle_block.0.in_layers.2",
    }
    assert "lora_te2_text_model_final_layer_norm" in set(layer_names("text_encoder_2", "text_model.final_layer_norm"))


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match=r"no adapter_config\.json and no pytorch_lora_weights\.safetensors"):
        read_adapter(tmp_path)
    with pytest.raises(FastsdError, match="no such adapter"):
        read_adapter(tmp_path / "x.safetensors")
    file = tmp_path / "twice.safetensors"
    save_file({"a.lora_A.weight": torch.ones(1), "a.lora_down.weight": torch.ones(1)}, file)
    with pytest.raises(FastsdError, match="gives a a second 'down'"):
        read_adapter(file)
    save_file({"a.lora_A.weight": torch.ones(1)}, file, {METADATA: "["})
    with pytest.raises(FastsdError, match=f"its metadata {METADATA} is not a JSON object"):
        read_adapter(file)


def test_the_scale_of_pefts_metadata(tmp_path: Path) -> None:
    """alpha / rank, and for rank-stabilised LoRA alpha / sqrt(rank)."""
    file = tmp_path / "x.safetensors"
    tensors = {"unet.a.lora_A.weight": torch.ones(4, 8), "unet.a.lora_B.weight": torch.ones(8, 4)}
    stabilised = {"unet.lora_alpha": 8, "unet.use_rslora": True}
    for config, scale in (({}, None), ({"unet.lora_alpha": 8}, 2.0), (stabilised, 4.0)):
        save_file(tensors, file, {METADATA: json.dumps(config)})
        assert [layer.scale for layer in read_adapter(file).layers] == [scale]


@pytest.mark.parametrize("place", ["1", "9" * 5000, "\u0661", "-1"], ids=("a gap", "5000 digits", "Arabic", "negative"))
def test_a_place_that_cannot_be_is_refused(place: str, tmp_path: Path) -> None:
    """cloneofsimo's keys number the layers from 0."""
    tensors = {f"unet:{place}:{role}": torch.ones(2, 2) for role in ("up", "down")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=r"not complete|not an adapter"):
        read_adapter(tmp_path / "x.safetensors")
