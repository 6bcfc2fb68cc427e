"""A session: its budget, its result file, its limits."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, options, record
from bench.ceilings import Ceilings
from bench.families import FAMILIES, TINY
from bench.measure import Candidate
from bench.models import vae_dtype
from bench.options import COMPILED, MIN_BUDGET
from bench.roofline import Work
from bench.session import Session


def session_of(**given: Any) -> Session:
    return Session(options.parse(benchmark=True, **given))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return session_of(results=str(tmp_path / "r.json"))


def ones() -> torch.Tensor:
    return torch.ones(3)


CORRECT, WRONG = Candidate("fastsd", lambda i: ones()), Candidate("peer", lambda i: torch.zeros(3))


def test_the_budget_decreases() -> None:
    session = session_of(budget="30")
    assert MIN_BUDGET < session.remaining() <= 30
    session.started -= 31
    assert session.remaining() < 0
    assert session_of().remaining() == float("inf")


def test_a_benchmark_that_the_budget_cuts_short_says_so(tmp_path: Path) -> None:
    session = session_of(results=str(tmp_path / "r.json"), budget="10")
    session.started -= 9.3  # of the remaining 0.7 s, a quarter is for rounds
    slow = Candidate("fastsd", lambda i: time.sleep(0.05) or ones())
    session.run_benchmark("b", ones, [slow], torch.float32, 1, model="tiny")
    (row,) = session.results.data["records"]
    assert 1 <= row["seconds"]["rounds"] <= 4
    assert row["cut"] == f"cut to {row['seconds']['rounds']} rounds by the budget"
    assert row["cut"] in session.tables[0]
    assert session.remaining() > 0


def test_the_first_result_is_in_the_file_before_a_peer_begins(session: Session) -> None:
    def dies(i: int) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.run_benchmark("b", ones, [CORRECT, Candidate("peer", dies)], torch.float32, 1, model="tiny")
    (row,) = record.read(session.results.path)["records"]
    assert row["candidate"] == "fastsd" and row["seconds"]["median"] > 0
    assert row["cut"] == "stopped before the first round"


def test_candidates_are_recorded_and_a_failed_check_of_fastsd_is_an_error(session: Session) -> None:
    arguments: dict[str, Any] = {"dtype": torch.float32, "depth": 1, "model": "tiny", "missing": {"gone": "missing: x"}}
    session.run_benchmark("b", ones, [CORRECT, WRONG], **arguments)
    rows = {row["candidate"]: row for row in record.read(session.results.path)["records"]}
    assert rows["fastsd"]["seconds"]["median"] > 0
    assert rows["peer"]["seconds"] is None and "correctness check failed" in rows["peer"]["problem"]
    assert rows["gone"]["problem"] == "missing: x"
    with pytest.raises(AssertionError, match="correctness check failed"):
        session.run_benchmark("b", lambda: torch.zeros(3) + 2, [CORRECT, WRONG], **arguments)


def test_every_candidate_of_a_kernel_has_a_rate_and_a_share(session: Session) -> None:
    session._ceilings[torch.float32] = Ceilings(flops=1e12, bytes=1e10, exps=1e12)
    work = [Work("linear", flops=1e9, elements=1e8)]  # 1 ms of operations, 40 ms of memory traffic
    candidates = [Candidate(name, lambda i: ones()) for name in ("fastsd", "F.linear")]
    session.run_benchmark("kernel", ones, candidates, torch.float32, 1, work, model="linear-1x2x3")
    assert len(session.results.data["records"]) == 2
    for row in session.results.data["records"]:
        seconds = row["seconds"]["median"]
        assert row["binds"] == "bytes" and row["floor"] == pytest.approx(0.04)
        assert row["gb_s"] == pytest.approx(0.4 / seconds, rel=1e-3)
        assert row["tflop_s"] == pytest.approx(1e-3 / seconds, rel=1e-3)
        assert row["share"] == pytest.approx(0.04 / seconds, rel=1e-3)
    assert session.tables[0].count("GB/s") == 2


def test_without_ceilings_there_are_still_times(session: Session, monkeypatch: Any) -> None:
    def fails(device: torch.device, dtype: torch.dtype) -> Ceilings:
        raise torch.OutOfMemoryError("no memory for two matrices")

    monkeypatch.setattr("bench.session.measure_ceilings", fails)
    work = [Work("linear", flops=1e9, elements=1e8)]
    session.run_benchmark("kernel", ones, [CORRECT], torch.float32, 1, work, model="linear-1x2x3")
    (row,) = session.results.data["records"]
    assert row["seconds"]["median"] > 0 and "floor" not in row
    assert "no memory" in session.tables[0]


def test_the_kinds_of_a_step_add_up_to_its_time(session: Session) -> None:
    labels = {"benchmark": "step", "model": "tiny", "dtype": "fp32", "candidate": "fastsd"}
    assert not session.add_kinds(labels, {"conv": 0.75, "other": 0.25})
    session.results.add(**labels, seconds={"median": 0.2})
    assert session.add_kinds(labels, {"conv": 0.75, "other": 0.25})
    (row,) = session.results.data["records"]
    assert row["kinds"] == {"conv": 0.15, "other": 0.05} and row["seconds"] == {"median": 0.2}


def test_an_autoencoder_that_overflows_is_timed_in_the_dtype_that_a_pipeline_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for overflows, dtype in ((True, torch.float32), (False, torch.float16)):
        family = replace(TINY, vae=replace(TINY.vae, force_upcast=overflows))
        monkeypatch.setitem(FAMILIES, "tiny", family)
        components = session_of(models="tiny").components("tiny", torch.float16)
        assert vae_dtype(components) == dtype and components.unet.conv_in.weight.dtype == torch.float16


def test_a_process_of_the_compiled_peer_runs_nothing_else(tmp_path: Path) -> None:
    session = session_of(results=str(tmp_path / "r.json"))
    session.options = replace(session.options, peers=(COMPILED,), device=torch.device("cuda", 0))
    assert session.options.compiled_alone
    ran: list[str] = []

    def candidate(name: str) -> Candidate:
        return Candidate(name, lambda i: ran.append(name) or ones())

    with pytest.raises(pytest.skip.Exception):
        session.run_benchmark("b", ones, [candidate("fastsd")], torch.float32, 1, model="tiny")
    session.options = replace(session.options, measuring=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "synchronise", lambda device: None)
        outcomes = session.run_benchmark(
            "b", ones, [candidate("fastsd"), candidate(COMPILED)], torch.float32, 1, model="tiny"
        )
    assert ran == [COMPILED] and [outcome.name for outcome in outcomes] == [COMPILED]
