"""The choice at an op's first call on a GPU that is played: right first, then fast; then it stays."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import ChoiceMode, GpuOp, OpCandidate, choosing
from fastsd.kernels.choice import decide, table
from fastsd.kernels.choice.table import ChoiceTable, TableEntry
from tests.support.played_gpu import IDENTITY, PlayedGpu, doubling, played, restart, way
from tests.support.told import told

X = torch.linspace(-1, 1, 64).half()
UNPROBED = ChoiceMode(probe=False)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedGpu]:
    with played(tmp_path, PlayedGpu(), monkeypatch) as gpu, choosing(UNPROBED):
        yield gpu


def entry(op: str = "played") -> TableEntry:
    (found,) = (one for (name, _), one in decide.gpu_of(torch.device("cpu")).table.entries.items() if name == op)
    return found


def test_the_fastest_right_way_is_chosen_and_stays(gpu: PlayedGpu) -> None:
    calls: list[str] = []
    op = doubling(
        way(gpu, "slow", 3e-5, calls=calls), way(gpu, "fast", 1e-5, calls=calls), way(gpu, "torch", 2e-5, calls=calls)
    )
    assert torch.equal(candidates.run(op, X), 2 * X)
    assert entry().candidate == "fast" and entry().checked
    assert entry().microseconds == {"slow": 30.0, "fast": 10.0, "torch": 20.0}
    calls.clear()
    candidates.run(op, X)
    assert calls == ["fast"]
    restart()  # another process: nothing is timed nor compared again
    sampled = gpu.sampled
    calls.clear()
    candidates.run(op, X)
    assert calls == ["fast"] and gpu.sampled == sampled


def test_autocast_does_not_change_what_is_right(gpu: PlayedGpu) -> None:
    """Under it a product of fp32, as in a specification, is one of bf16, which is no truth to compare fp16 with."""

    def product(x: torch.Tensor) -> torch.Tensor:
        return (x.float()[:, None] @ x.float()[None, :4]).to(x.dtype)

    def off_by(share: float, seconds: float) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            gpu.takes = seconds
            return (x.double()[:, None] * x.double()[None, :4] * (1 + share)).to(x.dtype)

        return run

    # Three ulps of the largest result, 1; a half and one are allowed.
    ways = OpCandidate("ours", off_by(3 * 2**-10, 1e-5)), OpCandidate("torch", off_by(0.0, 2e-5))
    with torch.autocast("cpu", torch.bfloat16), told(match="it is wrong"):
        candidates.run(GpuOp("played", product, ways), X)
    assert entry().candidate == "torch"


@pytest.mark.parametrize("seed", range(20))
def test_no_op_is_slower_than_pytorchs_own(gpu: PlayedGpu, seed: int) -> None:
    """Whatever the times are, and however they vary by a tenth between rounds."""
    draw = random.Random(seed)
    gpu.noise = (draw.uniform(0.9, 1.1) for _ in itertools.count())
    seconds = {name: draw.uniform(1e-6, 1e-4) for name in ("ours", "cudnn", "torch")}
    calls: list[str] = []
    op = doubling(*(way(gpu, name, time, calls=calls) for name, time in seconds.items()))
    candidates.run(op, X)
    measured = entry().microseconds
    assert measured[calls[-1]] <= measured["torch"]
    assert seconds[calls[-1]] <= seconds["torch"] * 1.1 / 0.9


def test_a_wrong_way_is_excluded_and_named_however_fast(gpu: PlayedGpu) -> None:
    op = doubling(way(gpu, "ours", 1e-6, offset=0.1), way(gpu, "torch", 1e-5))
    with told(match=r"played: candidate 'ours' is excluded: it is wrong on NVIDIA H200") as lines:
        assert torch.equal(candidates.run(op, X), 2 * X)
    assert "(largest error 0.10" in lines[0] and "for float16 64" in lines[0]
    assert "it is wrong" in entry().excluded["ours"] and entry().candidate == "torch"
    restart()
    assert torch.equal(candidates.run(op, X), 2 * X)  # known: no second warning, which would be an error


@pytest.mark.parametrize("value", [0.0, 60000.0, math.nan])
def test_a_wrong_way_is_found_where_the_right_result_tells_nothing(gpu: PlayedGpu, value: float) -> None:
    """Weights that are all zero, say: the arguments are replaced by random numbers."""
    ours = candidates.OpCandidate("ours", lambda x: 3 * x)
    with told(match="it is wrong"):
        candidates.run(doubling(ours, way(gpu, "torch", 1e-5)), torch.full((64,), value).half())


class CompilationError(Exception):
    """As Triton's."""


def test_a_way_that_fails_is_excluded_and_named_and_a_librarys_refusal_only_noted(gpu: PlayedGpu) -> None:
    library = way(gpu, "sdpa", 1e-6, fault=RuntimeError("No valid engine"), measured=True)
    op = doubling(way(gpu, "ours", 1e-6, fault=CompilationError("no mma")), library, way(gpu, "torch", 1e-5))
    with told(match=r"'ours' is excluded: .*CompilationError: no mma") as lines:
        assert torch.equal(candidates.run(op, X), 2 * X)
    assert len(lines) == 1 and set(entry().excluded) == {"ours", "sdpa"}


def test_a_known_choice_that_fails_later_is_replaced_for_good(gpu: PlayedGpu) -> None:
    candidates.run(doubling(way(gpu, "ours", 1e-6), way(gpu, "torch", 1e-5)), X)
    assert entry().candidate == "ours"
    restart()
    op = doubling(way(gpu, "ours", 1e-6, fault=CompilationError("no mma")), way(gpu, "torch", 1e-5))
    with told(match="candidate 'ours' fails on this machine"):
        assert torch.equal(candidates.run(op, X), 2 * X)
    restart()
    candidates.run(op, X)
    assert "CompilationError" in entry().excluded["ours"]


def test_a_way_that_faults_the_gpu_ends_the_process_and_is_known_to_the_next(gpu: PlayedGpu) -> None:
    fault = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    op = doubling(way(gpu, "ours", 1e-6, fault=fault), way(gpu, "torch", 1e-5))
    with pytest.raises(FastsdError, match="played: candidate 'ours' faults the GPU .* start once more") as error:
        candidates.run(op, X)
    assert "\n" not in str(error.value)
    candidates.forget()  # the table was written at once
    for how in (UNPROBED, ChoiceMode(reproducible=True, probe=False)):
        with choosing(how):
            assert torch.equal(candidates.run(op, X), 2 * X)


def test_what_memory_does_not_hold_is_not_compared_and_not_kept(gpu: PlayedGpu) -> None:
    op = doubling(way(gpu, "ours", 1e-6, fault=torch.OutOfMemoryError("CUDA out of memory")), way(gpu, "torch", 1e-5))
    assert torch.equal(candidates.run(op, X), 2 * X)
    assert decide.gpu_of(torch.device("cpu")).table.entries == {}


INCOMPLETE = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    OSError(28, "No space left on device"),
    AssertionError("libcuda.so cannot found!"),
]


@pytest.mark.parametrize("fault", INCOMPLETE, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_what_an_installation_lacks_is_said_once_and_no_fault_of_a_way(
    gpu: PlayedGpu, fault: Exception, known: bool
) -> None:
    """Without a C compiler no kernel starts; once there is one, all are measured as on a new GPU."""
    whole = doubling(way(gpu, "ours", 1e-6), way(gpu, "torch", 1e-5))
    if known:
        candidates.run(whole, X)
        restart()
    op = doubling(way(gpu, "ours", 1e-6, fault=fault), way(gpu, "torch", 1e-5))
    with told(match="Triton needs a C compiler") as lines:
        for x in (X, X, X[:32]):
            assert torch.equal(candidates.run(op, x), 2 * x)
    assert len(lines) == 1
    restart()
    calls: list[str] = []
    candidates.run(doubling(way(gpu, "ours", 1e-6, calls=calls), way(gpu, "torch", 1e-5)), X)
    assert calls and entry().candidate == "ours" and not entry().excluded


def test_results_that_not_even_pytorch_has_are_not_judged(gpu: PlayedGpu) -> None:
    op = doubling(way(gpu, "ours", 1e-6, offset=math.inf), way(gpu, "torch", 1e-5, offset=math.inf))
    candidates.run(op, X)
    assert decide.gpu_of(torch.device("cpu")).table.entries == {}


def test_nothing_is_timed_nor_waited_for_inside_a_capture(gpu: PlayedGpu) -> None:
    calls: list[str] = []
    op = doubling(way(gpu, "ours", 1e-6, calls=calls), way(gpu, "torch", 1e-5, calls=calls))
    gpu.is_capturing = True
    candidates.run(op, X)
    assert calls == ["torch"] and gpu.sampled == gpu.waits == 0
    gpu.is_capturing = False
    candidates.run(op, X)
    assert calls[-1] == "ours"
    gpu.is_capturing = True
    candidates.run(op, X)
    assert calls[-1] == "ours"  # known by now


def test_a_single_candidate_and_forced_backends_measure_nothing(gpu: PlayedGpu) -> None:
    candidates.run(doubling(way(gpu, "torch", 1e-5)), X)
    with dispatch.forced("triton"):
        candidates.run(doubling(way(gpu, "ours", 1e-6), way(gpu, "torch", 1e-5)), X)
    assert gpu.sampled == gpu.waits == 0


@dataclass(frozen=True)
class PlayedLaunch:
    """A launch that takes so long."""

    seconds: float


FEW, ALL = [PlayedLaunch(5e-5), PlayedLaunch(3e-5)], [PlayedLaunch(n * 1e-5) for n in (5, 3, 1, 2)]


def test_the_launches_of_a_kernel_are_candidates_and_tuning_tries_them_all(gpu: PlayedGpu) -> None:
    calls: list[str] = []
    ours = way(
        gpu, "ours", 0, calls=calls, launches=lambda thorough, x: ALL if thorough else FEW, launch_types=(PlayedLaunch,)
    )
    op = doubling(ours, way(gpu, "torch", 4e-5, calls=calls))
    candidates.run(op, X)
    assert calls[-1] == "ours PlayedLaunch(seconds=3e-05)"
    told = []
    with choosing(ChoiceMode(probe=False, thorough=True, tell=lambda place, entry: told.append((place, entry)))):
        candidates.run(op, X)
        candidates.run(op, X)
    ((place, chosen),) = told
    assert place == ("played", "float16 64") and chosen.launch == {"kind": "PlayedLaunch", "seconds": 1e-05}
    restart()
    candidates.run(op, X)
    assert calls[-1] == "ours PlayedLaunch(seconds=1e-05)"


def test_a_launch_that_this_version_does_not_know_is_measured_anew(gpu: PlayedGpu) -> None:
    op = doubling(
        way(gpu, "ours", 0, launches=lambda thorough, x: FEW, launch_types=(PlayedLaunch,)), way(gpu, "torch", 4e-5)
    )
    known = {("played", "float16 64"): TableEntry("ours", {"kind": "OldLaunch"}, {}, True)}
    table.save(ChoiceTable(IDENTITY, known))
    candidates.run(op, X)
    assert entry().launch == {"kind": "PlayedLaunch", "seconds": 3e-05}


def committed(folder: Path, **entries: str) -> None:
    known = {(op, "float16 64"): TableEntry(candidate, None, {}, True) for op, candidate in entries.items()}
    (folder / "committed").mkdir(exist_ok=True)
    (folder / "committed" / "h200.json").write_text(ChoiceTable({**IDENTITY, "driver": "9"}, known).text())


def test_a_committed_choice_is_compared_with_the_specification_but_not_timed(gpu: PlayedGpu, tmp_path: Path) -> None:
    committed(tmp_path, good="ours", bad="ours")
    calls: list[str] = []
    good = doubling(way(gpu, "ours", 9e-5, calls=calls), way(gpu, "torch", 1e-5, calls=calls), name="good")
    candidates.run(good, X)
    assert gpu.sampled == 0 and calls[-1] == "ours" and entry("good").checked
    bad = doubling(way(gpu, "ours", 9e-5, offset=1), way(gpu, "torch", 1e-5), name="bad")
    with told(match="bad: candidate 'ours' is excluded"):
        assert torch.equal(candidates.run(bad, X), 2 * X)


def test_reproducible_takes_the_committed_choice_and_times_nothing(gpu: PlayedGpu, tmp_path: Path) -> None:
    calls: list[str] = []

    def op(name: str, offset: float = 0.0) -> candidates.GpuOp:
        ours, other = (way(gpu, which, 1e-6, offset, calls=calls) for which in ("ours", "other"))
        return doubling(ours, other, way(gpu, "torch", 1e-5, calls=calls), name=name)

    candidates.run(op("stated"), X)
    assert entry("stated").candidate == "ours"
    committed(tmp_path, stated="torch")
    restart()
    sampled = gpu.sampled
    with choosing(ChoiceMode(reproducible=True, probe=False)):
        for name, expected in (("stated", "torch"), ("unstated", "ours")):
            candidates.run(op(name), X)
            assert calls[-1] == expected
        with told(match="is wrong"):
            candidates.run(op("wrong", offset=1.0), X)
        assert calls[-1] == "torch"
    assert gpu.sampled == sampled
    candidates.run(op("stated"), X)
    assert calls[-1] == "ours"  # the choice of this machine stays beside it
