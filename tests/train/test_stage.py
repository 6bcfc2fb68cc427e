"""docs/training.md's stage runs; on it, the loop's promises: skipped steps, SIGTERM, accumulation, validation."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fastsd.errors import FastsdError
from fastsd.train import checkpoint
from fastsd.train.figures import read_metrics
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage
from fastsd.train.training import STAGES, train
from tests.support.project import ROOT
from tests.support.training import write_data

TOY = """
out = "{folder}/run"
threads = {threads}
precision = "fp32"
[data]
kind = "digits"
path = "{folder}/mnist"
[toy.fit]
steps = 12
batch_size = 8
warmup = 2
validate_every = 6
validate_share = 0.2
sample_every = 6
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Stage]:
    """The stage of the page, as the page writes it."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {
        "dataclass": dataclass, "Fit": Fit, "Stage": Stage, "nn": nn,
    }  # fmt: skip
    exec(compile(code, "docs/training.md", "exec", dont_inherit=True), names)
    monkeypatch.setitem(STAGES, "toy", names["ToyStage"])
    return names["ToyStage"]


def config(folder: Path, threads: int = 1) -> Path:
    write_data(folder)
    path = folder / "toy.toml"
    path.write_text(TOY.format(folder=folder.as_posix(), threads=threads))
    return path


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run" / "metrics.jsonl")]


def test_the_stage_of_the_page_trains(toy: type[Stage], tmp_path: Path) -> None:
    toy.grid = lambda self: Image.new("RGB", (4, 4))  # type: ignore[method-assign]
    train(config(tmp_path))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] and {"rate", "norm"} <= lines[0].keys()
    assert [line["step"] for line in lines if "val_loss" in line] == [6, 12]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["toy-0000006.png", "toy-0000012.png"]
    assert (tmp_path / "run" / "record.json").is_file() and list((tmp_path / "run" / "events").iterdir())
    assert json.loads((tmp_path / "run" / "record.json").read_text())["data"]["images"] == 40


def test_parts_one_after_another_are_parts_at_once(toy: type[Stage], tmp_path: Path) -> None:
    for name, threads, changes in (("threads", 2, []), ("accumulated", 1, ["toy.fit.accumulate=2"])):
        train(config(tmp_path / name, threads), changes=changes)
    assert losses(tmp_path / "threads") == losses(tmp_path / "accumulated")


def test_a_step_that_is_not_finite_changes_nothing(
    toy: type[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = toy.loss

    def spoiled(self: Any, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        value, metrics = ordinary(self, trained, batch, part)
        return (value * float("nan"), metrics) if part.step in bad else (value, metrics)

    monkeypatch.setattr(toy, "loss", spoiled)
    bad = {3, 5, 6}
    train(config(tmp_path), changes=["toy.fit.max_nonfinite=3", "toy.fit.steps=8"])
    state = checkpoint.load(tmp_path / "run" / "toy.pt")
    assert state["skipped"] == 3 and state["net"]["optimiser"]["state"][0]["step"] == 5
    assert all(torch.isfinite(t).all() for t in state["net"]["average"].values())
    bad = {9, 10, 11}
    with pytest.raises(FastsdError, match="3 steps in a row up to step 11 .* lower toy.fit.rate"):
        train(config(tmp_path), resume=True, changes=["toy.fit.max_nonfinite=3", "toy.fit.steps=20"])
    saved = checkpoint.load(tmp_path / "run" / "toy-nonfinite.pt")
    assert saved["step"] == 11 and saved["batches"][0]["image"].shape == (8, 64, 64, 3)
    assert checkpoint.load(tmp_path / "run" / "toy.pt")["step"] == 8


def test_sigterm_saves_and_the_run_goes_on(toy: type[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(tmp_path / "whole"))
    ordinary = toy.loss

    def killed(self: Any, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        if part.step == 4 and not part.validation:
            os.kill(os.getpid(), signal.SIGTERM)
        return ordinary(self, trained, batch, part)

    with monkeypatch.context() as patch:
        patch.setattr(toy, "loss", killed)
        train(config(tmp_path / "halves"))
    assert len(losses(tmp_path / "halves")) == 5 and not (tmp_path / "halves" / "run" / "model").exists()
    # A kill in the middle of a line leaves half of it.
    with open(tmp_path / "halves" / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "toy", "st')
    train(config(tmp_path / "halves"), resume=True)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


def test_too_little_memory_is_one_line(toy: type[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(self: Any, part: Part) -> Batch:
        torch.empty(2**50, dtype=torch.uint8, device="cpu")
        return {}

    monkeypatch.setattr(toy, "batch", large)
    with pytest.raises(FastsdError, match="not enough memory; what helps: a smaller fit.batch_size"):
        train(config(tmp_path))
