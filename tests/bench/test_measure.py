"""The arithmetic of a benchmark, and its correctness check: a wrong candidate has a distance but no time."""

from __future__ import annotations

import math
import time

import pytest
import torch

from bench.measure import (
    Candidate,
    Limit,
    Outcome,
    Spread,
    distance,
    image_limit,
    lines,
    rotation,
    run_candidates,
    spread,
    timed,
    tolerance,
)

CPU = torch.device("cpu")


def test_spread_is_median_and_quartiles() -> None:
    s = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (s.median, s.low, s.high, s.rounds) == (3.0, 2.0, 4.0, 5)
    few = spread([2.0, 8.0])
    assert (few.median, few.low, few.high) == (5.0, 2.0, 8.0)
    with pytest.raises(ValueError, match="sample"):
        spread([])


def test_distance_by_hand() -> None:
    reference = torch.tensor([3.0, 4.0, 0.0])
    d = distance(reference + torch.tensor([0.0, 0.0, 0.5]), reference)
    assert d.max == 0.5 and d.relative == pytest.approx(0.1)
    assert d.psnr == pytest.approx(20 * math.log10(4.0 / (0.5 / 3**0.5)))
    same = distance(reference, reference)
    assert (same.max, same.relative, same.psnr) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_output_is_infinitely_far(bad: float) -> None:
    assert distance(torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])).relative == math.inf
    with pytest.raises(ValueError, match="reference"):
        distance(torch.zeros(2), torch.zeros(3))


def test_tolerances_cover_rounding_but_not_an_error() -> None:
    """A chain of roundings of random numbers is within the tolerance; one wrong channel of ten is not."""
    torch.manual_seed(0)
    x = torch.randn(1000, 10, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        y = x.clone()
        for _ in range(50):
            y = (y * 1.1).to(dtype).double() / 1.1
        assert distance(y, x).relative < tolerance(dtype, 50)
        y[:, 0] *= 2.0
        assert distance(y, x).relative > tolerance(dtype, 50)
    assert tolerance(torch.float32, 400) < 1e-4


def test_a_finer_dtype_has_a_stricter_image_limit() -> None:
    limits = [image_limit(dtype, 7.5) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert limits == sorted(limits) and 20 < limits[0] < 30 and limits[2] == 50
    assert image_limit(torch.bfloat16, 1.0) > limits[0]


def test_a_coarser_decoder_has_its_own_share_of_the_image_limit() -> None:
    alone, both = image_limit(torch.float16, 7.5), image_limit(torch.float16, 7.5, torch.bfloat16)
    assert image_limit(torch.bfloat16, 7.5) < both < alone
    assert image_limit(torch.float16, 7.5, torch.float32) == image_limit(torch.float16, 7.5, torch.float16) == alone


def candidates(calls: list[str]) -> list[Candidate]:
    """Two correct ones, the second slower; one with a wrong output, one that raises."""

    def fast(i: int) -> torch.Tensor:
        calls.append("a")
        time.sleep(0.006)
        return torch.ones(4)

    def wrong(i: int) -> torch.Tensor:
        calls.append("b")
        return torch.full((4,), 1.5)

    def broken(i: int) -> torch.Tensor:
        raise RuntimeError("no such backend\nand much more")

    def slow(i: int) -> torch.Tensor:
        calls.append("c")
        time.sleep(0.012)
        return torch.ones(4)

    return [Candidate("a", fast), Candidate("b", wrong), Candidate("broken", broken), Candidate("c", slow)]


def test_a_wrong_candidate_has_a_distance_and_no_time() -> None:
    calls: list[str] = []
    a, b, broken, c = run_candidates(lambda: torch.ones(4), candidates(calls), 0.01, CPU, 10.0, max_rounds=5)
    assert a.spread and c.spread and not a.problem
    assert b.spread is None and not b.samples and b.distance and b.distance.max == 0.5
    assert "correctness check failed" in b.problem
    assert broken.spread is None and broken.problem == "failed: RuntimeError: no such backend"
    assert calls.count("b") == 1  # only the correctness check
    assert a.spread.rounds == 5 and 0.006 <= a.spread.median < c.spread.median
    assert "".join(calls[-10:]) == "ac" * 5  # in turns
    text = "\n".join(lines([a, b, broken, c], Limit(0.003, 6e9, 1e6, "flops")))
    row = next(line for line in text.splitlines() if line.strip().startswith("b"))
    assert "correctness check failed" in row and "5.00e-01" in row and " ms" not in row
    assert "of the limit" in text and "1.00x" in text


@pytest.mark.parametrize(
    ("binds", "flops", "text"),
    [
        ("flops", 5e9, "50 TFLOP/s 25.0% of the limit err"),
        ("bytes", 5e9, "300 GB/s 25.0% of the limit err"),
        ("exps", 5e9, "50 TFLOP/s 25.0% of the limit (exponentials) err"),
        ("exps", 0.0, "300 GB/s 25.0% of the limit (exponentials) err"),  # norms have no products
    ],
)
def test_a_line_has_the_rate_of_the_resource_that_binds(binds: str, flops: float, text: str) -> None:
    """0.1 ms for 5 GFLOP and 30 MB, with a floor of 25 µs."""
    outcome = Outcome("x", distance(torch.ones(1), torch.ones(1)), Spread(1e-4, 1e-4, 1e-4, 3))
    (line,) = lines([outcome], Limit(2.5e-5, flops, 3e7, binds))
    assert text in " ".join(line.split())


def test_an_image_below_its_psnr_fails_the_check() -> None:
    noisy = Candidate("noisy", lambda i: torch.linspace(0, 1, 100) + 0.1)
    (outcome,) = run_candidates(lambda: torch.linspace(0, 1, 100), [noisy], 30.0, CPU, 1.0, psnr=True)
    assert outcome.spread is None and "PSNR 20.0 dB" in outcome.problem


def test_a_nan_fails_the_check() -> None:
    nan = Candidate("nan", lambda i: torch.full((4,), math.nan))
    for psnr in (False, True):
        limit = -1e9 if psnr else 1e9
        (outcome,) = run_candidates(lambda: torch.ones(4), [nan], limit, CPU, 1.0, psnr=psnr)
        assert "correctness check failed" in outcome.problem


def test_the_time_limit_ends_the_rounds_and_a_check_has_none() -> None:
    calls: list[str] = []
    a, *_ = run_candidates(lambda: torch.ones(4), candidates(calls), 0.01, CPU, 0.0, max_rounds=50)
    assert len(a.samples) == 1
    (a,) = run_candidates(lambda: torch.ones(4), candidates(calls)[:1], 0.01, CPU, 9.0, measuring=False)
    assert a.spread is None and not a.problem


def test_a_peer_that_fails_while_it_is_timed_does_not_affect_the_others() -> None:
    def breaks(i: int) -> torch.Tensor:
        if i > 3:
            raise torch.OutOfMemoryError("no more memory")
        time.sleep(0.006)
        return torch.ones(4)

    fast, _, _, slow = candidates([])
    mixed = [fast, Candidate("breaks", breaks), slow]
    a, broken, c = run_candidates(lambda: torch.ones(4), mixed, 0.01, CPU, 10.0, max_rounds=9)
    assert a.spread and c.spread and a.spread.rounds == c.spread.rounds == 9
    assert broken.spread is None and broken.problem == "failed: OutOfMemoryError: no more memory"


def test_the_first_outcome_is_passed_on_before_a_peer_begins() -> None:
    """A peer may end the process."""
    first: list[Outcome] = []

    def fatal(i: int) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both = [candidates([])[0], Candidate("fatal", fatal)]
        run_candidates(lambda: torch.ones(4), both, 0.01, CPU, 10.0, on_first=first.append)
    (outcome,) = first
    assert outcome.name == "a" and outcome.spread and outcome.spread.median >= 0.006


def test_no_round_begins_that_would_end_after_the_deadline() -> None:
    slow = Candidate("slow", lambda i: time.sleep(0.1) or torch.ones(4))
    start = time.perf_counter()
    (outcome,) = run_candidates(lambda: torch.ones(4), [slow], 0.01, CPU, 10.0, deadline=start + 0.75)
    assert time.perf_counter() - start < 0.8
    assert 1 <= len(outcome.samples) <= 4  # the check and the warm-up take at least three runs


def test_a_candidate_that_compiles_beyond_the_deadline_does_not_begin() -> None:
    calls: list[int] = []

    def compiled(i: int) -> torch.Tensor:
        calls.append(i)
        return torch.ones(4)

    both = [candidates([])[0], Candidate("compiled", compiled, min_seconds=60.0)]
    deadline = time.perf_counter() + 30
    own, late = run_candidates(lambda: torch.ones(4), both, 0.01, CPU, 0.1, deadline=deadline)
    assert own.spread and not calls and late.problem == "not run: the budget is spent"


def test_repeated_work_is_timed_per_repetition() -> None:
    many = Candidate("many", lambda i: torch.ones(4), timed=lambda i: time.sleep(0.05), repeats=10)
    (outcome,) = run_candidates(lambda: torch.ones(4), [many], 0.01, CPU, 1.0, max_rounds=3)
    assert outcome.spread and 0.005 <= outcome.spread.median < 0.02


def test_prepare_is_not_timed_and_inputs_rotate() -> None:
    seen: list[int] = []
    candidate = Candidate("x", lambda i: seen.append(i) or torch.ones(1), lambda: time.sleep(0.02))
    (outcome,) = run_candidates(lambda: torch.ones(1), [candidate], 0.1, CPU, 10.0, max_rounds=3)
    assert outcome.spread and outcome.spread.median < 0.01
    assert len(set(seen)) > 3
    made: list[int] = []
    inputs = rotation(3, lambda i: made.append(i) or i)
    assert [inputs(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0] and made == [0, 1, 2]


def test_timed_is_per_run() -> None:
    assert 0.01 <= timed(lambda i: time.sleep(0.01), 0, 3, CPU) < 0.02


def test_on_a_gpu_the_time_is_between_two_events_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake device, on which each run takes 2 ms."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool = False):
            assert enable_timing

        def record(self) -> None:
            self.at = log.count("run")
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0 * (end.at - self.at)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("idle"))
    seconds = timed(lambda i: log.append("run"), 0, 3, torch.device("cuda"))
    assert seconds == pytest.approx(0.002)
    assert log == ["idle", "record", "run", "run", "run", "record", "wait"]
