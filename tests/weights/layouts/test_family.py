"""Families and prediction types are detected from keys and shapes; a file's name is ignored."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.config import (
    CLIP_L,
    OPENCLIP_BIGG,
    OPENCLIP_H,
    SD15_UNET,
    SD21_UNET,
    SD_VAE,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    SDXL_VAE,
    SSD1B_UNET,
    VEGA_UNET,
    UNetConfig,
)
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights import load_single_file
from fastsd.weights.layouts.family import CheckpointFamily, find_family
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.single_file import read_file
from tests.support import original

FULL_SIZE = {
    "sd1": (SD15_UNET, SD_VAE, {"text_encoder": CLIP_L}),
    "sd2": (SD21_UNET, SD_VAE, {"text_encoder": OPENCLIP_H}),
    "sd-turbo": (SD21_UNET, SD_VAE, {"text_encoder": OPENCLIP_H}),
    "sdxl": (SDXL_UNET, SDXL_VAE, {"text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG}),
    "refiner": (SDXL_REFINER_UNET, SDXL_VAE, {"text_encoder_2": OPENCLIP_BIGG}),
}


def family_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> CheckpointFamily:
    return find_family(Path("x"), {key: tuple(value.shape) for key, value in tensors.items()}, metadata or {})


@pytest.mark.parametrize("inpainting", [False, True], ids=["", "inpainting"])
@pytest.mark.parametrize("family", original.FAMILIES)
def test_families_of_tiny_files(originals: Any, family: str, inpainting: bool) -> None:
    kind = " inpainting" if inpainting else ""
    found = family_of(originals.tensors(family + kind))
    assert found.name == original.FAMILIES[family].name + kind
    assert found.unet.in_channels == (9 if inpainting else 4)


@pytest.mark.parametrize("family", original.FAMILIES)
def test_full_size_files_have_the_published_configs(family: str) -> None:
    """The shapes of the real models on the meta device, by the tests' own writer of original keys."""
    unet, vae, texts = FULL_SIZE[family]
    with torch.device("meta"):
        tensors = original.unet_tensors(stored(UNet(unet), unet.use_linear_projection), unet)
        tensors = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        original_vae = original.vae_tensors(stored(AutoencoderKL(vae), False), 4)
        tensors |= {f"first_stage_model.{key}": value for key, value in original_vae.items()}
        for name, prefix, config in original.FAMILIES[family].texts:
            text = stored(TextEncoder(texts[name]), False)
            if config.hidden_act == "gelu":
                text = original.openclip_tensors(text, complete=original.FAMILIES[family].truncated)
            tensors |= {prefix + key: value for key, value in text.items()}
    found = family_of(tensors)
    assert found.unet == unet
    assert found.vae == vae
    assert [text.config for text in found.texts] == list(texts.values())
    assert found.sample_size("v_prediction") == {"sd1": 64, "sd2": 96, "sd-turbo": 64}.get(family, 128)


@pytest.mark.parametrize("unet", [SSD1B_UNET, VEGA_UNET], ids=["SSD-1B", "Vega"])
def test_full_size_unets_without_some_blocks(unet: UNetConfig) -> None:
    """As the published SSD-1B and Vega: 944 and 564 tensors of the UNet."""
    tiny = original.FAMILIES["sdxl"]
    with torch.device("meta"):
        tensors = original.unet_tensors(stored(UNet(unet), True), unet)
        assert len(tensors) == (944 if unet is SSD1B_UNET else 564)
        tensors = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
        for name, prefix, config in tiny.texts:
            text = stored(TextEncoder(FULL_SIZE["sdxl"][2][name]), False)
            openclip = config.hidden_act == "gelu"
            text = original.openclip_tensors(text, complete=False) if openclip else text
            tensors |= {prefix + key: value for key, value in text.items()}
    assert family_of(tensors).unet == unet


def stored(module: torch.nn.Module, linear: bool) -> dict[str, torch.Tensor]:
    parts = [part for _, _, found in sources(module) for part in found]
    return {part.key: stored_form(part.key, torch.empty(part.shape, device="meta"), linear) for part in parts}


def test_the_name_of_a_file_is_ignored(originals: Any, tmp_path: Path) -> None:
    path = tmp_path / "sdxl-v-prediction-inpainting-ztsnr.safetensors"
    shutil.copyfile(originals.file("sd1"), path)
    loaded = load_single_file(path, torch.float32)
    assert loaded.unet.add_embedding is None and loaded.scheduler.prediction_type == "epsilon"
    assert not loaded.scheduler.rescale_betas_zero_snr


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_marker_keys(originals: Any, family: str) -> None:
    """Merging programs write them as empty tensors. Zero terminal SNR needs the last timestep."""
    tensors = originals.tensors(family)
    marked = originals.save(tensors | {"v_pred": torch.tensor([])}, f"v {family}.safetensors")
    found = load_single_file(marked, torch.float32).scheduler
    assert (found.prediction_type, found.rescale_betas_zero_snr) == ("v_prediction", False)
    marked = originals.save(tensors | {"v_pred": torch.ones(()), "ztsnr": torch.ones(())}, f"z {family}.safetensors")
    found = load_single_file(marked, torch.float32).scheduler
    assert (found.prediction_type, found.rescale_betas_zero_snr) == ("v_prediction", True)
    assert found.timestep_spacing == "trailing"


def test_the_users_prediction_type_wins(originals: Any) -> None:
    marked = originals.save(originals.tensors("sd1") | {"v_pred": torch.tensor([])}, "marked.safetensors")
    assert load_single_file(marked, torch.float32, prediction="epsilon").scheduler.prediction_type == "epsilon"
    with pytest.raises(FastsdError, match="prediction is 'v'; it should be one of epsilon, v_prediction, sample"):
        load_single_file(marked, torch.float32, prediction="v")


def test_the_prediction_type_in_the_metadata(originals: Any) -> None:
    found = family_of(originals.tensors("sd2"), {"modelspec.prediction_type": "v"})
    assert found.prediction == "v_prediction" and "metadata" in found.prediction_reason
    assert family_of(originals.tensors("sd2"), {"modelspec.prediction_type": "?"}).prediction is None


def test_sd2_without_a_prediction_type_is_refused(originals: Any) -> None:
    """Published SD 2 models predict either epsilon or v; the wrong choice generates noise."""
    with pytest.raises(FastsdError, match="it is SD 2 and does not say what it predicts; add prediction"):
        load_single_file(originals.file("sd2"), torch.float32)
    inpainting = load_single_file(originals.file("sd2 inpainting"), torch.float32)
    assert inpainting.scheduler.prediction_type == "epsilon"


NOT_CHECKPOINTS = {
    "LoRA": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "looks like a LoRA"),
    "PEFT": ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "looks like a LoRA"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "looks like a ControlNet"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9, 3)}, "a Flux or Stable Diffusion 3 model"),
    "diffusers' UNet": ({"down_blocks.0.resnets.0.conv1.weight": (3, 3, 3, 3)}, "give the folder"),
    "VAE": ({"encoder.down.0.block.0.conv1.weight": (3, 3, 3, 3)}, "an autoencoder, which vae takes"),
    "UNet": ({"diffusion_model.input_blocks.0.0.weight": (3, 3, 3, 3)}, "a UNet alone"),
    "embedding": ({"clip_g": (2, 1280), "clip_l": (2, 768)}, "a textual inversion"),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": (9, 3)}, "a text encoder alone"),
    "nothing": ({}, "it holds no tensors"),
    "anything": ({"weight": (3,)}, "its first key is 'weight'"),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
def test_the_message_says_what_the_file_is(kind: str) -> None:
    shapes, message = NOT_CHECKPOINTS[kind]
    with pytest.raises(FastsdError, match=f"x: not a Stable Diffusion checkpoint.*{message}"):
        find_family(Path("x"), shapes, {})


HOSTILE: dict[str, tuple[str, dict[str, tuple[int, ...] | None], str]] = {
    "too many levels": ("sd1", {f"model.diffusion_model.input_blocks.{i}.0.op.weight": (1,) for i in range(9, 60)}, ""),
    "too many layers of text": (
        "sd1",
        {f"cond_stage_model.transformer.text_model.encoder.layers.{i}.x": (1,) for i in range(200)},
        "more than 96",
    ),
    "a convolution of two dimensions": ("sd1", {"model.diffusion_model.input_blocks.0.0.weight": (3, 3)}, "4 dimen"),
    "a width that no head size divides": (
        "sdxl",
        {"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (7, 1, 1, 1)},
        "",
    ),
    "an empty dimension": ("sd1", {"first_stage_model.encoder.conv_in.weight": (0, 3, 3, 3)}, "encoder.conv_in.weight"),
    "no attention": ("sd1", {}, "reads no text"),
    "features that do not add up": (
        "sdxl",
        {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (128, 99)},
        "",
    ),
    "label_emb of another width": ("sdxl", {"model.diffusion_model.label_emb.0.0.weight": (256, 33)}, "label_emb"),
    "label_emb with SD 1's text encoder": (
        "sd1",
        {"model.diffusion_model.label_emb.0.0.weight": (128, 80)},
        "label_emb",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_shapes_of_no_family_are_refused(originals: Any, case: str) -> None:
    """In one line, before any network is built."""
    family, changes, message = HOSTILE[case]
    shapes: dict[str, Any] = {key: tuple(value.shape) for key, value in originals.tensors(family).items()}
    shapes |= changes
    if case == "no attention":
        shapes = {key: shape for key, shape in shapes.items() if "attn" not in key}
    if case == "features that do not add up":  # all of them, because only the first is read
        shapes = {k: (s[0], 99) if k.endswith("attn2.to_k.weight") else s for k, s in shapes.items()}
    with pytest.raises(FastsdError, match=f"x: .*{message}"):
        find_family(Path("x"), shapes, {})


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such model"):
        read_file(tmp_path / "missing.safetensors")
    with pytest.raises(FastsdError, match="a folder"):
        read_file(tmp_path)
