"""The CLIP model of the CLIP score against transformers', and folders that hold none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.errors import FastsdError
from fastsd.evaluate.clip import load_clip
from fastsd.model.tokenizer import Tokenizer
from fastsd.pipeline import Pipeline
from fastsd.weights.layouts.vision import load_vision
from tests.support.cli import refused
from tests.support.measuring import Painter, stand_in, write_shapes

TEXTS = ["a cat", "a red heart on a hill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP as transformers saves it, with the tokenizer's files."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    vision = {"hidden_size": 48, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "intermediate_size": 96}
    config = CLIPConfig(text_config=text | ends, vision_config=vision | {"num_attention_heads": 4}, projection_dim=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    Tokenizer().save(folder)
    return folder


@pytest.mark.heavy
def test_both_towers_are_those_of_transformers(folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    theirs, ours = CLIPModel.from_pretrained(folder).eval(), load_clip(folder)
    images = [np.random.default_rng(k).integers(0, 256, (40, 52, 3), dtype=np.uint8) for k in range(2)]
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessor(**size)(images, return_tensors="pt")["pixel_values"]
    ids = ours.tokenizer(TEXTS)
    with torch.inference_mode():
        expected = theirs(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
    text, image = expected.text_embeds.numpy(), expected.image_embeds.numpy()
    # Unit vectors in fp32, through 2 and 3 layers of a few roundings each.
    np.testing.assert_allclose(ours.texts(TEXTS), text, atol=2**-20)
    np.testing.assert_allclose(ours.images(images), image, atol=2**-20)
    scores = 100 * (text * image).sum(1)
    np.testing.assert_allclose(ours.scores(images, TEXTS), scores.clip(0), atol=100 * 2**-19)


@pytest.mark.heavy
def test_the_score_and_its_features_in_a_report(
    folder: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(Painter()))
    data = write_shapes(tmp_path / "shapes")
    words = ("evaluate", "--model", "0", "--data", data, "--count", "10", "--bootstrap", "5", "--json", "x.json")
    ran = cli(*words, "--metrics", "clip,fid", "--clip", folder, "--extractor", f"clip:{folder}")
    assert ran.code == 0, ran.err
    found = json.loads(Path("x.json").read_text())
    assert found["clip"].startswith("clip (sha256 ") and found["extractor"] == found["clip"]
    assert 0 <= found["figures"]["clip"]["value"] <= 100
    refused(cli(*words, "--metrics", "clip", "--overwrite"), "--clip")
    refused(cli(*words, "--metrics", "clip", "--clip", "none", "--overwrite"), "--clip none")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["text alone", "other width", "huge", "odd heads", "no weights"])
def test_a_folder_that_holds_another_model(kind: str, folder: Path, tmp_path: Path) -> None:
    Tokenizer().save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if kind == "text alone":
        del config["vision_config"]
    elif kind == "other width":
        config["text_config"]["hidden_size"] = 16
    elif kind == "odd heads":
        config["text_config"]["num_attention_heads"] = 5
    elif kind == "huge":
        config["vision_config"]["image_size"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind != "no weights":
        save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(FastsdError) as error:
        load_clip(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.heavy
def test_a_config_may_leave_out_what_is_usual(tmp_path: Path) -> None:
    """The parts of a whole CLIP's config; transformers' defaults are ViT-B/32's."""
    from transformers import CLIPConfig, CLIPModel

    small = {"num_hidden_layers": 1, "intermediate_size": 64}
    config = CLIPConfig(text_config=small | {"vocab_size": 49408}, vision_config=small)
    CLIPModel(config).save_pretrained(tmp_path)
    Tokenizer().save(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        kept[part] = small
    del kept["projection_dim"]
    (tmp_path / "config.json").write_text(json.dumps(kept))
    found = load_clip(tmp_path)
    assert found.texts(TEXTS).shape == (2, 512) and found.vision.config.patch_size == 32
    # The same folder is a vision tower for image prompts.
    tower = load_vision(tmp_path, torch.float32, torch.device("cpu"))
    assert all(torch.equal(value, found.vision.state_dict()[name]) for name, value in tower.state_dict().items())
