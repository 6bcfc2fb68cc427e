"""The ways of a model's ops, timed on a GPU that is played: the whole run on the CPU, with the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import gpu, models, tune
from bench.families import TINY
from fastsd.errors import FastsdError
from fastsd.kernels import dispatch
from fastsd.kernels.choice import decide, table
from fastsd.kernels.choice.op import GPU_OPS
from fastsd.kernels.choice.table import TableEntry
from tests.support.played_gpu import PlayedGpu, played

CPU = torch.device("cpu")


def test_without_a_gpu_the_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_summary_is_a_line_for_each_op_and_what_is_wrong() -> None:
    entries = {
        ("conv2d", "a"): TableEntry("triton", None, {"triton": 10.0, "torch": 15.0}, True),
        ("conv2d", "b"): TableEntry("torch", None, {"torch": 20.0}, True, {"triton": "it is wrong on this GPU"}),
        ("conv2d", "c"): TableEntry("torch", None, {}, True, {"sdpa": "no engine"}),
    }
    assert tune.summary(entries) == [
        "conv2d: 2 keys, 0.030 ms, PyTorch's own 0.035 ms; triton 1, torch 1",
        "    left out: triton: it is wrong on this GPU",
    ]


@pytest.mark.heavy
def test_a_run_fills_the_table_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of ours cannot run on a CPU: each refuses, so that PyTorch's own ops are compared and timed."""

    def backend(x: torch.Tensor, *_: object, **named: object) -> str:
        return dispatch.forced_name() or "triton"

    monkeypatch.setattr(dispatch, "backend", backend)
    for op in GPU_OPS.values():
        for candidate in op.candidates[:-1]:
            if candidate.name not in ("two products", "doubling"):
                monkeypatch.setitem(vars(candidate), "refuses", lambda *_: "there is no GPU")
                monkeypatch.setitem(vars(candidate), "partial", True)
    with played(tmp_path, PlayedGpu(), monkeypatch) as clock:
        clock.takes = 1e-5
        pipe = models.pipeline_of(models.random_components(TINY, torch.float32, CPU), CPU, torch.float32)
        known = table.save(table.ChoiceTable(clock.identity(CPU), {("op", "key"): TableEntry("torch")}))
        assert known.exists()  # a GPU that was seen before: no child
        export = tune.Exporter(CPU, tmp_path / "run-choices.json")
        tune.run(pipe, 64, 1, 60.0, export)
        export.write()
        shared = table.read_file(tmp_path / "run-choices.json")
    ops = {op for op, _ in shared.entries}
    assert {"linear", "upsample2x_conv"} <= ops
    assert shared.entries == table.read_file(known).entries


@pytest.mark.parametrize("words", ["candidate 'triton' faults the GPU (illegal access); start once more", "else"])
def test_what_was_measured_before_a_fault_is_written_and_another_process_goes_on(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, entry = ("layernorm", "float16 2x320"), TableEntry("torch", None, {"triton": 3.0, "torch": 2.0}, True)

    def run(*_: object) -> None:
        decide.gpu_of(CPU)._note(place, entry)
        raise FastsdError(words)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "pipeline_components", lambda *_: None)
    monkeypatch.setattr(tune.models, "pipeline_of", lambda *_: None)
    monkeypatch.setattr(tune.torch, "device", lambda *_: CPU)
    monkeypatch.setattr(tune, "run", run)
    with played(tmp_path, PlayedGpu(), monkeypatch):
        if words == "else":
            with pytest.raises(FastsdError, match="else"):
                tune.main(["--results", str(tmp_path / "day.json")])
        else:
            assert tune.main(["--results", str(tmp_path / "day.json")]) == gpu.AGAIN
        assert table.read_file(tmp_path / "day-choices.json").entries[place] == entry
