"""`fastsd compare`: two models, two settings, two reports; and what is not compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd.evaluate.comparison import compare_images, means
from fastsd.evaluate.generated import generate
from fastsd.pipeline import Pipeline
from fastsd.weights.adapters.apply import Adapter
from tests.support.adapter_writers import small_lora
from tests.support.cli import refused
from tests.support.measuring import Painter, stand_in, write_shapes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


def test_equal_pairs_are_counted_apart() -> None:
    """The mean PSNR is that of the pairs that differ; one infinite pair would hide all others."""
    a = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    b = a.copy()
    b[0] += 1
    found = means(compare_images(list(a), list(b)))
    assert found["psnr"] == pytest.approx(20 * math.log10(255)) and found["equal"] == 2
    assert compare_images(list(a), list(a[:, :15])) == []


def test_two_models(data: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """B paints red as blue: half of the pairs are equal, and its share of right images is less."""
    models = Painter(noise=0), Painter(("red", "green"), noise=0)
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(*models))
    words = ("compare", "0", "1", "--data", data, "--metrics", "nearest,fid", "--count", "40", "--bootstrap", "50")
    ran = cli(*words, "--json", "found.json")
    assert ran.code == 0, ran.err
    assert "20 equal in every pixel" in ran.out
    rows = {line.split(" | ")[0][2:]: line for line in ran.out.splitlines() if line.startswith("| ")}
    assert rows["nearest of 20"].endswith("| A |") and rows["fid"].endswith("| A |")
    assert models[0].calls[0][:2] == models[1].calls[0][:2], "the same prompts and seeds"
    found = json.loads(Path("found.json").read_text())
    assert len(found["pairs"]) == 40 and sum(pair["psnr"] is None for pair in found["pairs"]) == 20
    with Image.open("compare.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((220, 30, 30), (30, 40, 220), (255, 40, 255)):  # red, blue, and 4 times their difference
        assert (pixels == colour).all(1).any()
    refused(cli(*words), "--out", "--overwrite")


def test_two_settings_of_one_model(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter()
    loaded: list[object] = []
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda path, **_: loaded.append(path) or model)
    ran = cli("compare", "any", "--a", "steps=4", "--b", "steps=20", "--prompt", "red disc", "--prompt", "blue bar")
    assert ran.code == 0, ran.err
    assert loaded == ["any"]
    assert [settings["num_inference_steps"] for _, _, settings in model.calls] == [4, 20]
    assert model.calls[0][0] == ["red disc", "blue bar"] * 4
    assert "A: any steps=4" in ran.out


@pytest.mark.heavy
def test_one_model_without_a_lora_and_with_it(model: Path, cli: Any) -> None:
    """A stays the plain model though B is loaded with it; a LoRA of both changes both."""
    numbers = torch.Generator().manual_seed(0)
    save_file({key: torch.randn(x.shape, generator=numbers) for key, x in small_lora().items()}, "ink.safetensors")
    words = ("compare", model, "--dtype", "fp32", "--prompt", "a cat", "--count", 2, "--json", "x.json", "--overwrite")
    ran = cli(*words, "--lora-b", "ink.safetensors:0.8")
    assert ran.code == 0, ran.err
    found = json.loads(Path("x.json").read_text())
    assert found["labels"] == [f"A: {model}", f"B: {model} + ink.safetensors:0.8"]
    pipe = Pipeline.from_pretrained(model, dtype="fp32")
    images = [generate(pipe, ["a cat"] * 2, 0, {}, str)]
    pipe.set_adapters([Adapter(Path("ink.safetensors"), 0.8, 0.8)])
    images.append(generate(pipe, ["a cat"] * 2, 0, {}, str))
    for pair, expected in zip(found["pairs"], compare_images(*images), strict=True):
        assert pair["psnr"] == pytest.approx(expected.psnr) and math.isfinite(expected.psnr)
    ran = cli(*words, "--lora", "ink.safetensors:0.8", "--lora-b", "ink.safetensors:-0.8")
    assert ran.code == 0, ran.err
    labels = json.loads(Path("x.json").read_text())["labels"]
    assert [label.count("ink") for label in labels] == [1, 2]
    refused(cli(*words, "--lora", "ink.safetensors"), "A and B are the same")
    refused(cli(*words, "--lora-b", "no.safetensors"), "--lora-b", "no.safetensors: no such adapter")
    refused(cli(*words, "--lora-a", "ink.safetensors:x"), "--lora-a", "should be a strength")


def report(path: Path, cli: Any, *words: object) -> Path:
    ran = cli(
        "evaluate", "--model", "0", "--metrics", "fid", "--count", "10", "--bootstrap", "9", "--json", path, *words
    )
    assert ran.code == 0, ran.err
    return path


def test_two_reports_and_two_that_measure_other_things(
    data: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FID in the features of two extractors are two quantities."""
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(Painter()))
    reader = Path(__file__).parent.parent / "data" / "digit_reader.safetensors"
    one = report(tmp_path / "one.json", cli, "--data", data)
    same = report(tmp_path / "same.json", cli, "--data", data)
    ran = cli("compare", one, same)
    assert ran.code == 0 and "| fid | " in ran.out and "overlap" in ran.out
    for name, words, said in (
        ("features", ("--data", data, "--extractor", f"reader:{reader}"), "the extractors of their features differ"),
        ("count", ("--data", data, "--count", "12"), "the number of generated images differ"),
        ("data", ("--data", write_shapes(tmp_path / "other", labels=False)), "the real images differ"),
    ):
        other = report(tmp_path / f"{name}.json", cli, *words)
        refused(cli("compare", one, other), "cannot be compared", said)
    (tmp_path / "none.json").write_text('{"format": "other"}')
    refused(cli("compare", one, tmp_path / "none.json"), "no report")
    refused(cli("compare", one, "digits"), "compared with a report")
    for words in (("--out", "x.png"), ("--json", "x.json"), ("--overwrite",), ("--count", "3"), ("--lora-b", "x")):
        refused(cli("compare", one, same, *words), words[0], "has an effect between models alone")
    assert not Path("x.png").exists() and not Path("x.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0"], "the same"),
        (["0", "1"], "--prompt or --data"),
        (["0", "1", "--prompt", "x", "--metrics", "fid"], "--data"),
        (["0", "--a", "stepps=4", "--prompt", "x"], "did you mean steps"),
        (["0", "1", "--prompt", "x", "--count", "0"], "--count"),
        (["0", "1", "--prompt", "x", "--out", "x.gif"], ".png"),
    ],
    ids=["same", "nothing", "metrics", "setting", "count", "file"],
)
def test_what_is_wrong_is_said(words: list[str], said: str, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    refused(cli("compare", *words), said)
