"""Options and budget: what cannot be is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import record
from bench.ceilings import Ceilings
from bench.measure import Candidate
from bench.roofline import Work
from bench.session import LEAST_BUDGET, Session, check_options
from fastsd.errors import FastsdError

ROOT = Path(__file__).parent.parent.parent
NOTHING: dict[str, Any] = dict.fromkeys(
    ["models", "batch", "size", "steps", "dtype", "peers", "budget", "model", "results", "profile"]
)


def options(**changes: Any) -> Any:
    return check_options(NOTHING | {"benchmark": True} | changes)


def test_defaults_measure_and_a_check_is_tiny() -> None:
    assert options(models="sd15,sdxl", batch="1,4").batches == (1, 4)
    assert check_options(NOTHING | {"benchmark": False, "models": "sdxl"}).models == ("tiny",)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("models", "sd99", "sd99.*sd15"),
        ("peers", "onediff", "onediff.*diffusers"),
        ("dtype", "fp4", "fp4.*bf16"),
        ("budget", "1", "--budget.*10"),
        ("budget", "soon", "--budget.*soon"),
        ("batch", "0", "--batch"),
        ("size", "100", "--size.*64"),
        ("model", "no/such/folder", "--model.*no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(name: str, text: str, said: str) -> None:
    with pytest.raises(FastsdError, match=said) as error:
        options(**{name: text})
    assert "\n" not in str(error.value)


def test_the_budget_runs_down() -> None:
    session = Session(options(budget="30"))
    assert LEAST_BUDGET < session.remaining() <= 30
    session.started -= 31
    assert session.remaining() < 0
    assert Session(options()).remaining() == float("inf")


def test_a_contest_that_the_budget_cuts_says_so(tmp_path: Path) -> None:
    session = Session(options(results=str(tmp_path / "r.json"), budget="10"))
    session.started -= 9.3  # 0.7 s are left, a quarter of them for rounds
    slow = Candidate("fastsd", lambda i: time.sleep(0.05) or torch.ones(3))
    session.contest("c", lambda: torch.ones(3), [slow], torch.float32, 1, model="tiny")
    (found,) = session.results.data["records"]
    assert 1 <= found["seconds"]["rounds"] <= 4
    assert found["cut"] == f"cut to {found['seconds']['rounds']} rounds by the budget"
    assert found["cut"] in session.tables[0]
    assert session.remaining() > 0


def test_a_figure_is_in_the_file_before_a_peer_begins(tmp_path: Path) -> None:
    session = Session(options(results=str(tmp_path / "r.json")))

    def dies(i: int) -> torch.Tensor:
        raise KeyboardInterrupt

    candidates = [Candidate("fastsd", lambda i: torch.ones(3)), Candidate("peer", dies)]
    with pytest.raises(KeyboardInterrupt):
        session.contest("c", lambda: torch.ones(3), candidates, torch.float32, 1, model="tiny")
    (found,) = record.read(tmp_path / "r.json")["records"]
    assert found["candidate"] == "fastsd" and found["seconds"]["median"] > 0
    assert found["cut"] == "stopped before the first round"


def test_a_contest_is_recorded_and_its_own_red_gate_is_an_error(tmp_path: Path) -> None:
    session = Session(options(results=str(tmp_path / "r.json")))
    right, wrong = Candidate("fastsd", lambda i: torch.ones(3)), Candidate("peer", lambda i: torch.zeros(3))
    arguments: dict[str, Any] = {"dtype": torch.float32, "depth": 1, "model": "tiny", "missing": {"gone": "missing: x"}}
    session.contest("c", lambda: torch.ones(3), [right, wrong], **arguments)
    found = {r["candidate"]: r for r in session.results.data["records"]}
    assert found["fastsd"]["seconds"]["median"] > 0
    assert found["peer"]["seconds"] is None and "red gate" in found["peer"]["problem"]
    assert found["gone"]["problem"] == "missing: x"
    with pytest.raises(AssertionError, match="red gate"):
        session.contest("c", lambda: torch.zeros(3) + 2, [right, wrong], **arguments)
    assert session.results.path.exists()


def test_every_candidate_of_a_kernel_has_its_rate_and_its_share(tmp_path: Path) -> None:
    session = Session(options(results=str(tmp_path / "r.json")))
    session._ceilings[torch.float32] = Ceilings(flops=1e12, bytes=1e10, exps=1e12)
    work = [Work("linear", flops=1e9, elements=1e8)]  # 1 ms of products, 40 ms of moving
    candidates = [Candidate(name, lambda i: torch.ones(3)) for name in ("fastsd", "F.linear")]
    session.contest("kernel", lambda: torch.ones(3), candidates, torch.float32, 1, work, model="linear-1x2x3")
    for found in session.results.data["records"]:
        seconds = found["seconds"]["median"]
        assert found["binds"] == "bytes" and found["floor"] == pytest.approx(0.04)
        assert found["gb_s"] == pytest.approx(0.4 / seconds, rel=1e-3)
        assert found["tflop_s"] == pytest.approx(1e-3 / seconds, rel=1e-3)
        assert found["share"] == pytest.approx(0.04 / seconds, rel=1e-3)
    assert session.tables[0].count("GB/s") == 2


def test_a_device_whose_best_cannot_be_measured_still_has_times(tmp_path: Path, monkeypatch: Any) -> None:
    def fails(device: torch.device, dtype: torch.dtype) -> Ceilings:
        raise torch.OutOfMemoryError("no room for two matrices")

    monkeypatch.setattr("bench.session.measure_ceilings", fails)
    session = Session(options(results=str(tmp_path / "r.json")))
    work = [Work("linear", flops=1e9, elements=1e8)]
    own = Candidate("fastsd", lambda i: torch.ones(3))
    session.contest("kernel", lambda: torch.ones(3), [own], torch.float32, 1, work, model="linear-1x2x3")
    (found,) = session.results.data["records"]
    assert found["seconds"]["median"] > 0 and "floor" not in found
    assert "no room" in session.tables[0]


def test_the_parts_of_a_step_add_up_to_what_was_measured(tmp_path: Path) -> None:
    session = Session(options(results=str(tmp_path / "r.json")))
    labels = {"contest": "step", "model": "tiny", "dtype": "fp32", "candidate": "fastsd"}
    assert not session.amend_kinds(labels, {"conv": 0.75, "other": 0.25})
    session.results.add(**labels, seconds={"median": 0.2})
    assert session.amend_kinds(labels, {"conv": 0.75, "other": 0.25})
    (found,) = session.results.data["records"]
    assert found["kinds"] == {"conv": 0.15, "other": 0.05} and found["seconds"] == {"median": 0.2}


@pytest.mark.parametrize("flags", [["--models", "sd99"], ["--budget", "0.1"]])
def test_pytest_says_one_line_and_exits_with_2(flags: list[str]) -> None:
    run = [sys.executable, "-m", "pytest", "bench", "--benchmark", *flags]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert f"error: {flags[0]}" in found.stdout + found.stderr
    assert "Traceback" not in found.stdout + found.stderr
