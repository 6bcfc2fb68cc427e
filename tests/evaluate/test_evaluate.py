"""`fastsd evaluate --metrics` from its flags to its files, with a stand-in model that paints what the captions say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.pipeline import Pipeline
from fastsd.weights.adapters.apply import Adapter
from tests.support.cli import refused
from tests.support.measuring import COLOURS, Painter, stand_in, write_shapes

WORDS = ("evaluate", "--model", "0", "--bootstrap", "20", "--count", "40")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes")


def test_a_right_model_and_a_wrong_one(data: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of right images is that of the colours that come out right; FID sees the difference."""
    reports = []
    for wrong in ((), ("red",)):
        monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(Painter(wrong)))
        file = tmp_path / f"{len(wrong)}.json"
        ran = cli(*WORDS, "--data", data, "--metrics", "nearest,fid,kid,precision-recall", "--json", file)
        assert ran.code == 0, ran.err
        reports.append(json.loads(file.read_text()))
    right, half = (report["figures"] for report in reports)
    # Each of 40 captions once: those of red, a quarter, come out as the blue image of their form.
    assert right["nearest of 20"]["value"] == 1 and half["nearest of 20"]["value"] == 0.75
    assert half["nearest, parts"]["value"] == 0.75 and right["nearest, parts"]["value"] == 1
    low, high = half["nearest of 20"]["low"], half["nearest of 20"]["high"]
    assert 0.5 < low < 0.75 < high < 1
    assert half["fid"]["value"] > 2 * right["fid"]["value"] > 0
    assert half["recall"]["value"] < right["recall"]["value"]
    assert reports[0]["extractor"] == "pixels" and reports[0]["count"] == 40 and reports[0]["size"] == [32, 32]


def test_a_seed_and_a_caption_for_each_image(data: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter()
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(model))
    assert cli(*WORDS, "--data", data, "--metrics", "fid", "--seed", "7", "--settings", "steps=4").code == 0
    prompts = [prompt for part, _, _ in model.calls for prompt in part]
    assert len(set(prompts)) == 40, "every caption once before any comes again"
    assert [seed for _, seed, _ in model.calls] == [7, 32]
    assert all(settings == {"prompt_syntax": "plain", "num_inference_steps": 4} for _, _, settings in model.calls)


def test_a_lora_is_put_on_and_named(data: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, put = Painter(), []

    def set_adapters(adapters: list[Adapter], allow_partial: bool, allow_pickle: bool) -> list[str]:
        put.append((adapters, allow_partial, allow_pickle))
        return ["a layer is left out"]

    monkeypatch.setattr(model, "set_adapters", set_adapters, raising=False)
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(model))
    Path("ink.safetensors").write_bytes(b"")
    words = ("--data", data, "--metrics", "fid", "--count", "10", "--bootstrap", "9", "--json", "found.json")
    ran = cli("evaluate", "--model", "0", *words, "--lora", "ink.safetensors:0.5", "--allow-partial")
    assert ran.code == 0 and "note: a layer is left out" in ran.err
    assert put == [([Adapter(Path("ink.safetensors"), 0.5, 0.5)], True, False)]
    assert json.loads(Path("found.json").read_text())["model"] == "0 + ink.safetensors:0.5"


def test_the_files_of_a_folder(data: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", stand_in(Painter()))
    out = tmp_path / "new" / "report"
    words = (*WORDS, "--data", data, "--metrics", "fid", "--out", out)
    assert cli(*words).code == 0
    text = (out / "report.md").read_text()
    assert "| fid | " in text and "features: pixels" in text and "40 generated images, seeds 0 to 39" in text
    with Image.open(out / "grid.png") as grid:
        found = {tuple(pixel) for pixel in np.asarray(grid.convert("RGB")).reshape(-1, 3)[::7]}
    for colour in COLOURS.values():
        assert min(sum(abs(a - b) for a, b in zip(pixel, colour)) for pixel in map(tuple, _ints(found))) < 15
    before = (out / "report.md").read_bytes()
    refused(cli(*words), "--out", "--overwrite")
    assert (out / "report.md").read_bytes() == before


def _ints(pixels: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [tuple(int(part) for part in pixel) for pixel in pixels]


def test_fewer_images_than_a_metric_needs(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    folder = tmp_path / "three"
    folder.mkdir()
    for name in "abc":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    words = ("evaluate", "--data", folder, "--metrics", "precision-recall")
    refused(cli(*words), "--data", "precision-recall needs at least 4 images, and there are 3")


@pytest.mark.heavy
def test_the_digits_by_their_reader(cli: Any, tmp_path: Path) -> None:
    """The bundled model, a few images: its reader's classes, and its autoencoder."""
    root = Path(__file__).parent.parent.parent
    reader = f"reader:{root / 'tests' / 'data' / 'digit_reader.safetensors'}"
    words = ("--count", "10", "--reference", "40", "--bootstrap", "5", "--json", tmp_path / "found.json")
    ran = cli("evaluate", "--data", root / "data" / "mnist", "--metrics", "accuracy,is,autoencoder", "--extractor",
              reader, *words)  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["extractor"].startswith("reader (sha256 ") and len(found["extractor_sha256"]) == 64
    assert found["figures"]["accuracy"]["value"] >= 0.8
    assert found["figures"]["is"]["value"] == pytest.approx(1)  # a part is one image, whose mean is itself
    assert found["figures"]["autoencoder psnr"]["value"] > 25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--metrics", "fdi"], ("--metrics", "did you mean fid")),
        (["--metrics", ","], ("--metrics", "fid, kid")),
        (["--metrics", "is"], ("--extractor", "inception:FILE")),
        (["--metrics", "accuracy"], ("--extractor", "reader:FILE")),
        (["--metrics", "fid", "--count", "1"], ("--count", "at least 2")),
        (["--metrics", "precision-recall", "--count", "3"], ("--count", "at least 4")),
        (["--metrics", "fid", "--count", "0"], ("--count", "1 to")),
        (["--metrics", "fid", "--extractor", "inseption:x"], ("--extractor", "did you mean inception")),
        (["--metrics", "fid", "--extractor", "inception"], ("--extractor", "inception:FILE")),
        (["--metrics", "fid", "--extractor", "inception:none.pth"], ("--extractor", "none.pth")),
        (["--metrics", "fid", "--extractor", "pixels:x"], ("--extractor", "no file")),
        (["--metrics", "fid", "--gallery", "none"], ("--gallery", "no such folder")),
        (["--metrics", "fid", "--settings", "stepps=4"], ("--settings", "did you mean steps")),
        (["--count", "7"], ("--count", "--metrics")),
        (["--gallery", "x"], ("--gallery", "--metrics")),
        (["--metrics", "fid", "--quick"], ("--quick", "digits")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    flags: list[str], said: tuple[str, ...], data: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    refused(cli("evaluate", "--data", data, *flags), *said)


def test_another_network_as_the_extractor(data: Path, cli: Any) -> None:
    reader = Path(__file__).parent.parent / "data" / "digit_reader.safetensors"
    refused(cli("evaluate", "--data", data, "--metrics", "fid", "--extractor", f"inception:{reader}"), "--extractor",
            "not the Inception network")  # fmt: skip
    no_labels = write_shapes(data.parent / "no labels", labels=False)
    words = (
        "evaluate",
        "--data",
        no_labels,
        "--count",
        "2",
        "--metrics",
        "accuracy",
        "--extractor",
        f"reader:{reader}",
    )
    refused(cli(*words), "--data", '"label"')
