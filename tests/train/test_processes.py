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
from fastsd.train.stages.unet import UNetStage
from fastsd.train.training import train
from tests.support.project import ROOT
from tests.support.training import write_config


def start(config: Path, out: Path, count: int, *changes: str) -> list[subprocess.Popen[str]]:
    """`count` processes of one run, as torchrun starts them, each with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "fastsd", "train", "--config", str(config), "--out", str(out)]
    command += [part for change in ("threads=1", *changes) for part in ("--set", change)]
    return [
        subprocess.Popen(
            [*command, "--export", str(out / "model")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for the processes; what each printed."""
    printed = []
    for process in running:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        printed.append(output + errors)
    return printed


VALIDATION = ("unet.fit.validate_every=4", "unet.fit.validate_share=0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, `two`, and its config."""
    folder = tmp_path_factory.mktemp("processes")
    finish(start(write_config(folder, 4, 4), folder / "two", 2, *VALIDATION))
    return folder


@pytest.mark.heavy
def test_two_processes_give_the_losses_of_one(folder: Path) -> None:
    config = write_config(folder, 4, 4)
    train(config, out=folder / "one", changes=VALIDATION)  # with two threads, so that the batch has two parts here too
    one, two = (read_metrics(folder / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8 and "val_loss" in one[-1]
    for a, b in zip(one, two):
        # The sum of two numbers does not depend on their order, so nothing is rounded differently.
        assert {k: v for k, v in a.items() if k != "minutes"} == {k: v for k, v in b.items() if k != "minutes"}
    for name, player in (("vae", "vae"), ("unet", "denoiser")):
        first, second = (checkpoint.load(folder / run / f"{name}.pt")[player]["average"] for run in ("one", "two"))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.heavy
def test_divided_weights_give_the_same_losses(folder: Path) -> None:
    """Each process has a share of the UNet; the checkpoint is one file, which one process resumes."""
    config, out = write_config(folder, 4, 4), folder / "divided"
    first, _ = finish(start(config, out, 2, "shard=true", *VALIDATION))
    assert "vae: every process keeps the whole" in first and "exported unet" in first
    whole, divided = (checkpoint.load(folder / run / "unet.pt")["denoiser"] for run in ("two", "divided"))
    for kind in ("model", "average"):
        assert [(k, v.shape) for k, v in divided[kind].items()] == [(k, v.shape) for k, v in whole[kind].items()]
    more = ("threads=1", "unet.fit.steps=6", *VALIDATION)
    train(config, out=out, resume=True, changes=more)
    train(config, out=folder / "two", resume=True, changes=more)
    two, parts = (read_metrics(folder / run / "metrics.jsonl") for run in ("two", "divided"))
    assert len(parts) == len(two) == 10 and "val_loss" in parts[7]
    for a, b in zip(two, parts):
        # The gradients are the same; the norm, by which they are clipped, is summed up in another order, over some
        # 20,000 numbers: sqrt(20000) * 2^-24 = 1e-5 of it at most, and a step changes the loss by less than itself.
        figures = [name for name in a if name.endswith(("loss", "low", "middle", "high", "norm", "l1", "kl"))]
        assert figures and all(abs(a[name] - b[name]) <= 1e-5 * abs(a[name]) for name in figures)


def test_no_process_samples_with_a_share_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNetStage, "sharded", True)
    with pytest.raises(FastsdError, match="unet.fit.sample_every should be 0 with shard"):
        train(write_config(tmp_path), changes=["unet.fit.sample_every=2"])


def test_an_incomplete_environment_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(FastsdError, match="do not find each other .*; start them by torchrun"):
        train(write_config(tmp_path))
