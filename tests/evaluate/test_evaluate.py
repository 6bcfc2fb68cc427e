"""`fastsd evaluate` from its words to its exit code, with a stand-in for the model that draws real digits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.cli import main
from fastsd.evaluate import report
from fastsd.pipeline import Pipeline
from fastsd.train.captions import DIGIT_WORDS
from fastsd.train.digits import Digits
from fastsd.train.strokes import STYLE_WORDS, measure, styles


class RealDigits:
    """Draws held-out digits that deserve the prompt. `wrong`: how many of the digits are drawn as the next one."""

    def __init__(self, held_out: Digits, wrong: int = 0):
        self.pictures, self.labels = report.as_drawn(held_out, len(held_out.images))
        self.ends = styles(measure(self.pictures.numpy()), self.labels, 0.27)
        self.wrong = wrong
        self.prompts: list[str] = []

    def __call__(self, prompt: str | list[str], seed: int, batch_size: int = 8, output_type: str = "pil") -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.prompts += prompts
        found = np.stack([self.pictures[self.row(text, seed + k)].numpy() for k, text in enumerate(prompts)])
        rgb = np.repeat(found[..., None], 3, axis=-1)
        pil = [Image.fromarray(picture) for picture in (rgb * 255).astype(np.uint8)]
        return SimpleNamespace(images=rgb if output_type == "np" else pil)

    def row(self, prompt: str, seed: int) -> int:
        named = [d for d, word in enumerate(DIGIT_WORDS) if word in prompt.split() or str(d) in prompt.split()]
        assert len(named) == 1, prompt
        digit = (named[0] + 1) % 10 if named[0] < self.wrong else named[0]
        fits = self.labels == digit
        for column, (low, high) in enumerate(STYLE_WORDS.values()):
            if low in prompt or high in prompt:
                fits = fits & (self.ends[:, column] == (1 if high in prompt else -1))
        rows = np.flatnonzero(fits)
        return int(rows[seed % len(rows)])


@pytest.fixture(scope="module")
def some_held_out(held_out: Digits) -> Digits:
    return Digits(held_out.images[4000:6000], held_out.labels[4000:6000])


@pytest.fixture
def words(
    monkeypatch: pytest.MonkeyPatch, mnist: Path, reader_file: Path, some_held_out: Digits, some_training: Digits
) -> list[str]:
    """Flags for a run on a tenth of MNIST."""
    sets = {"train": some_training, "t10k": some_held_out}
    monkeypatch.setattr(report, "read_digits", lambda _, split="train": sets[split])
    return ["evaluate", "--model", "any", "--data", str(mnist), "--reader", str(reader_file)]


def stand_in(monkeypatch: pytest.MonkeyPatch, model: RealDigits) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: model)


def test_a_perfect_model_passes(
    words: list[str],
    some_held_out: Digits,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model = RealDigits(some_held_out)
    stand_in(monkeypatch, model)
    files = ["--out", str(tmp_path / "new" / "folder"), "--json", str(tmp_path / "figures.json")]
    assert main([*words, "--seeds", "20", *files]) == 0
    printed = capsys.readouterr()
    assert "FAIL" not in printed.out
    checks = json.loads((tmp_path / "figures.json").read_text())["checks"]
    assert len(checks) == 7 and all(check["passed"] for check in checks.values())
    assert all(name in printed.out for name in checks)
    # Every way of asking, and every style word, for every digit.
    assert {"8", "eight", "a handwritten eight", "a thin eight", "a thick eight"} < set(model.prompts)
    assert {"two slanted left", "two slanted right", "a small two", "a large two"} < set(model.prompts)

    picture = np.asarray(Image.open(tmp_path / "new" / "folder" / "digits.png"))
    cells = [picture[66 * row : 66 * row + 64, 150 + 66 * d : 214 + 66 * d] for row in range(8) for d in range(10)]
    assert picture.shape == (528, 810, 3)
    assert all(cell.max() > 200 and np.median(cell) == 0 for cell in cells)

    assert main([*words, *files]) == 2  # both are there now: refused before anything is drawn
    assert "--overwrite" in capsys.readouterr().err


def test_a_model_that_errs_fails(
    words: list[str], some_held_out: Digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stand_in(monkeypatch, RealDigits(some_held_out, wrong=1))
    assert main([*words, "--quick"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any("read as asked" in line and "worst: 0, 0%" in line for line in failed)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seeds", "1"], "--seeds"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=["one seed has no spread", "model", "data"],
)
def test_bad_input(
    more: list[str],
    named: str,
    mnist: Path,
    some_held_out: Digits,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    if "--model" not in more:
        stand_in(monkeypatch, RealDigits(some_held_out))
    assert main(["evaluate", "--data", str(mnist), *more]) == 2
    assert named in capsys.readouterr().err


def test_the_drawn_frame_is_grey() -> None:
    """The pictures' channels are averaged, so that a tint that training never showed counts little."""
    from fastsd.evaluate.samples import grey

    image = np.zeros((1, 2, 2, 3), dtype=np.float32)
    image[..., 0], image[..., 1] = 0.3, 0.9
    torch.testing.assert_close(grey(image), torch.full((1, 2, 2), 0.4))
