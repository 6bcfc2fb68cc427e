"""Original keys and diffusers keys mean the same weights; diffusers' converters agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastsd.weights import load_folder, load_single_file
from tests.support import original
from tests.support.tiny import all_weights, assert_same

FP32 = torch.float32


@pytest.mark.parametrize("family", original.WITH_KINDS)
def test_a_file_loads_the_weights_and_configs_of_its_folder(originals: Any, family: str) -> None:
    prediction = "v_prediction" if family == "sd2" else None  # which the tests' files of SD 2 do not say
    file = load_single_file(originals.file(family), FP32, prediction=prediction)
    folder = load_folder(originals.folder(family), FP32)
    assert_same(all_weights(file), all_weights(folder))
    assert file.unet.config == folder.unet.config
    assert file.vae.config == folder.vae.config
    assert [text.config for text in file.text_encoders] == [text.config for text in folder.text_encoders]
    assert file.scheduler == folder.scheduler
    for name in ("zeros_for_empty_prompt", "aesthetic_score"):
        assert getattr(file, name) == getattr(folder, name)
    for ours, theirs in zip(file.tokenizers, folder.tokenizers, strict=True):
        assert torch.equal(ours("a cat! on a mat"), theirs("a cat! on a mat"))


def test_a_text_encoder_without_the_level_text_model(originals: Any) -> None:
    flat = {
        key.replace("transformer.text_model.", "transformer."): value for key, value in originals.tensors("sd1").items()
    }
    found = load_single_file(originals.save(flat, "flat.safetensors"), FP32)
    assert_same(all_weights(found), all_weights(load_single_file(originals.file("sd1"), FP32)))


@pytest.mark.parametrize("family", original.FAMILIES)
def test_diffusers_reads_the_same_out_of_these_files(originals: Any, family: str) -> None:
    """The tests' own writer is right: diffusers' converters turn its files back into the folders' tensors."""
    theirs = pytest.importorskip("diffusers.loaders.single_file_utils")
    config, tensors = original.FAMILIES[family].unet, originals.tensors(family)
    levels = len(config.block_out_channels)
    unet_json = {
        "layers_per_block": config.layers_per_block,
        "block_out_channels": config.block_out_channels,
        "down_block_types": ["" for _ in range(levels)],
        "up_block_types": ["" for _ in range(levels)],
        "class_embed_type": None,
        "addition_embed_type": "text_time" if config.addition_time_embed_dim else None,
    }
    found = theirs.convert_ldm_unet_checkpoint(dict(tensors), unet_json)
    assert_same(found, load_file(originals.folder(family) / "unet/diffusion_pytorch_model.safetensors"))
    vae_json = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    found = theirs.convert_ldm_vae_checkpoint(dict(tensors), vae_json)
    assert_same(found, load_file(originals.folder(family) / "vae/diffusion_pytorch_model.safetensors"))
    for name, prefix, _ in original.FAMILIES[family].texts:
        wanted = load_file(originals.folder(family) / name / "model.safetensors")
        if prefix.endswith("transformer."):
            found = theirs.convert_ldm_clip_checkpoint(dict(tensors), prefix)
        else:
            projection = wanted.get("text_projection.weight", torch.empty(1, 64))
            model = type("Model", (), {"text_projection": type("P", (), {"weight": projection})})
            found = theirs.convert_open_clip_checkpoint(model, dict(tensors), prefix)
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key
