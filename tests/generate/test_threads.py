"""Threads of fastsd's own processes: one for a small model, and never another number than the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsd.generate.threads import GIVEN, SMALL, is_small, suited_threads
from fastsd.pipeline import Pipeline
from tests.support.project import ROOT


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_small_model_has_one_thread_and_the_number_comes_back(pipe: Pipeline, two_threads: None) -> None:
    with pytest.raises(KeyError), suited_threads(pipe.components, pipe.device):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_a_large_model_has_all(pipe: Pipeline, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its UNet's parameters and the size that it was trained at."""
    assert is_small(pipe.components)
    parameters = sum(each.numel() for each in pipe.components.unet.parameters())
    side = int((SMALL / parameters) ** 0.5) + 1
    monkeypatch.setattr(pipe, "components", replace(pipe.components, sample_size=side))
    with suited_threads(pipe.components, pipe.device):
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", GIVEN)
def test_a_number_that_the_user_gives_stays(pipe, two_threads, monkeypatch, name) -> None:
    monkeypatch.setenv(name, "2")
    with suited_threads(pipe.components, pipe.device):
        assert torch.get_num_threads() == 2


WATCH = """if True:
    import fastsd.cli, torch
    from fastsd.pipeline import Pipeline
    torch.set_num_threads(2)
    stream, seen = Pipeline.stream, set()
    def watched(*args, **kwargs):
        for step in stream(*args, **kwargs):
            seen.add(torch.get_num_threads())
            yield step
    Pipeline.stream = watched
"""
COMMAND = """
    assert fastsd.cli.main(["--prompt", "an eight", "--steps", "2", "--output", "a.png"]) == 0
"""
BATCH = """
    open("lines.jsonl", "w").write('{"prompt": "an eight", "num_inference_steps": 2}')
    assert fastsd.cli.main(["batch", "lines.jsonl", "--out", "images"]) == 0
"""
WORKER = """
    from fastsd.server.engine import PipelineEngine
    from fastsd.server.jobs import ModelChoice, Order
    from fastsd.server.worker import EngineSettings
    class Watch:
        def step(self, *_):
            return False
    order = Order(ModelChoice("digits", "digits"), {"prompt": "an eight", "seed": 1, "num_inference_steps": 2})
    PipelineEngine(EngineSettings({"device": "cpu"})).run((order,), 1, Watch())
"""


@pytest.mark.heavy
@pytest.mark.parametrize("act", [COMMAND, BATCH, WORKER], ids=["command", "batch", "worker"])
def test_own_processes_use_one_thread(act: str, tmp_path: Path) -> None:
    """Each in a process of its own; an import sets no number, and afterwards it is what it was."""
    code = f"{WATCH}{act}    print(seen, torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name not in GIVEN}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["{1} 2"], done.stderr
