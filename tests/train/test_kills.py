"""kill -9 at random moments: the checkpoint loads, at most a step is lost, and the run ends as any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.train import checkpoint
from fastsd.train.figures import read_metrics
from fastsd.train.training import train
from tests.support.kills import kill_at_random
from tests.support.training import write_config

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "minutes"} for line in lines]


def check(folder: Path, steps: int, kills: int, longest: float) -> list[str]:
    config = write_config(folder, steps, steps)
    text = config.read_text().replace("checkpoint_minutes = 100.0", "checkpoint_minutes = 0.0")
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("export")))
    whole = folder / "whole"
    train(config, out=whole)
    lines = kill_at_random(config, folder / "killed", kills, longest)
    assert len(lines) == kills
    for killed in (folder / "killed").iterdir():
        assert metrics_of(whole) == metrics_of(killed)
        for name, player in (("vae", "vae"), ("unet", "denoiser")):
            first, second = (checkpoint.load(run / f"{name}.pt")[player] for run in (whole, killed))
            for kind in ("model", "average"):
                assert all(torch.equal(tensor, second[kind][key]) for key, tensor in first[kind].items())
        left = [path.name for path in killed.rglob(".fastsd-*")]
        assert not left, left
    return lines


@pytest.mark.heavy
def test_a_few_kills(tmp_path: Path) -> None:
    check(tmp_path, steps=6, kills=4, longest=0.7)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    lines = check(tmp_path, steps=20, kills=100, longest=2.0)
    in_the_second_stage = sum("unet.pt" in line for line in lines)
    assert 5 <= in_the_second_stage <= 95, lines
    print(f"{in_the_second_stage} of {len(lines)} kills in the second stage")
