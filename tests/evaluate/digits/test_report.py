"""`fastsd evaluate` from its flags to its exit code, with a stand-in model that returns real digits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.cli import main
from fastsd.evaluate.digits import report
from fastsd.evaluate.digits.samples import CELL, GAP, LABEL
from fastsd.pipeline import Pipeline
from fastsd.train.captions import DIGIT_WORDS
from fastsd.train.digits import Digits
from fastsd.train.settings import DigitsData
from fastsd.train.strokes import STYLE_WORDS, measure, styles

pytestmark = pytest.mark.heavy


class RealDigits:
    """Returns held-out digits that match the prompt. Digits below `wrong` come out as the next digit."""

    def __init__(self, held_out: Digits, wrong: int = 0):
        self.images, self.labels = report.augmented(held_out, len(held_out.images))
        self.ends = styles(measure(self.images.numpy()), self.labels, DigitsData.style_share)
        self.wrong = wrong
        self.prompts: list[str] = []

    def __call__(self, prompt: str | list[str], seed: int, batch_size: int = 8, output_type: str = "pil") -> Any:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self.prompts += prompts
        grey = np.stack([self.images[self.row(text, seed + k)].numpy() for k, text in enumerate(prompts)])
        rgb = np.repeat(grey[..., None], 3, axis=-1)
        pil = [Image.fromarray(image) for image in (rgb * 255).astype(np.uint8)]
        return SimpleNamespace(images=rgb if output_type == "np" else pil)

    def row(self, prompt: str, seed: int) -> int:
        named = [d for d, word in enumerate(DIGIT_WORDS) if word in prompt.split() or str(d) in prompt.split()]
        assert len(named) == 1, prompt
        digit = (named[0] + 1) % 10 if named[0] < self.wrong else named[0]
        matches = self.labels == digit
        for column, (low, high) in enumerate(STYLE_WORDS.values()):
            if low in prompt or high in prompt:
                matches = matches & (self.ends[:, column] == (1 if high in prompt else -1))
        rows = np.flatnonzero(matches)
        return int(rows[seed % len(rows)])


@pytest.fixture(scope="module")
def held_out_subset(held_out: Digits) -> Digits:
    return Digits(held_out.images[4000:6000], held_out.labels[4000:6000])


@pytest.fixture
def flags(
    monkeypatch: pytest.MonkeyPatch, mnist: Path, reader_file: Path, held_out_subset: Digits, training_subset: Digits
) -> list[str]:
    """The flags of an evaluation on a part of MNIST."""
    sets = {"train": training_subset, "t10k": held_out_subset}
    monkeypatch.setattr(report, "read_digits", lambda _, split="train": sets[split])
    return ["evaluate", "--model", "any", "--data", str(mnist), "--reader", str(reader_file)]


def use_model(monkeypatch: pytest.MonkeyPatch, model: RealDigits) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: model)


def test_a_perfect_model_passes(
    flags: list[str],
    held_out_subset: Digits,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model = RealDigits(held_out_subset)
    use_model(monkeypatch, model)
    files = ["--out", str(tmp_path / "new" / "folder"), "--json", str(tmp_path / "figures.json")]
    assert main([*flags, "--seeds", "20", *files]) == 0
    printed = capsys.readouterr()
    assert "FAIL" not in printed.out
    checks = json.loads((tmp_path / "figures.json").read_text())["checks"]
    assert len(checks) == 7 and all(check["passed"] for check in checks.values())
    assert all(name in printed.out for name in checks)
    # Every form of prompt, and every style word.
    assert {"8", "eight", "a handwritten eight", "a thin eight", "a thick eight"} < set(model.prompts)
    assert {"two slanted left", "two slanted right", "a small two", "a large two"} < set(model.prompts)

    sheet = np.asarray(Image.open(tmp_path / "new" / "folder" / "digits.png"))
    rows, pitch = 2 + 2 * len(STYLE_WORDS), CELL + GAP
    assert sheet.shape == (rows * pitch, LABEL + 10 * pitch, 3)
    for row in range(rows):
        for column in range(10):
            top, left = row * pitch, LABEL + column * pitch
            cell = sheet[top : top + CELL, left : left + CELL]
            assert cell.max() > 200 and np.median(cell) == 0

    # Both files exist now: an error before anything is generated.
    count = len(model.prompts)
    assert main([*flags, *files]) == 2 and len(model.prompts) == count
    assert "--overwrite" in capsys.readouterr().err


def test_a_wrong_model_fails(
    flags: list[str], held_out_subset: Digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    use_model(monkeypatch, RealDigits(held_out_subset, wrong=1))
    assert main([*flags, "--quick"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any("read as asked" in line and "worst: 0, 0%" in line for line in failed)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seeds", "1"], "--seeds"),  # one seed has no spread
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=["seeds", "model", "data"],
)
def test_invalid_input_is_an_error(
    extra: list[str],
    message: str,
    mnist: Path,
    held_out_subset: Digits,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    if "--model" not in extra:
        use_model(monkeypatch, RealDigits(held_out_subset))
    assert main(["evaluate", "--data", str(mnist), *extra]) == 2
    assert message in capsys.readouterr().err
