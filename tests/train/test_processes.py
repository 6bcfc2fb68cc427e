"""Two processes give the losses of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.train import checkpoint
from fastsd.train.figures import read_metrics
from fastsd.train.training import train
from tests.support.project import ROOT
from tests.support.training import write_config


def start(config: Path, out: Path, count: int) -> list[subprocess.Popen[str]]:
    """`count` processes of one run, as torchrun starts them, each with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [
        sys.executable,
        "-m",
        "fastsd",
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        "--set",
        "threads=1",
    ]
    return [
        subprocess.Popen(
            [*command, "--set", "threads=1", "--export", str(out / "model")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.heavy
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    config = write_config(tmp_path, 4, 4)
    running = start(config, tmp_path / "two", 2)
    train(config, out=tmp_path / "one")  # with two threads, so that the batch has two parts here too
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        # The sum of two numbers does not depend on their order, so nothing is rounded differently.
        assert {k: v for k, v in a.items() if k != "minutes"} == {k: v for k, v in b.items() if k != "minutes"}
    for name, player in (("vae", "vae"), ("unet", "denoiser")):
        first, second = (checkpoint.load(tmp_path / run / f"{name}.pt")[player]["average"] for run in ("one", "two"))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_an_incomplete_environment_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(FastsdError, match="do not find each other .*; start them by torchrun"):
        train(write_config(tmp_path))
