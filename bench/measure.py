"""A benchmark: candidates that do the same work, first checked against the reference, then timed in turns.

A candidate has a time only if it passes the correctness check: if its output differs from the reference path by more
than rounding explains, the report shows the difference instead. Candidates take turns (A B A B ...), so a busy or warm
machine disturbs all of them alike, and their inputs rotate, so caches do not favour any. Times are medians, with the
quartiles as their spread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

FP32_SUMS = 1e-6  # relative error of a sum of some ten thousand fp32 products
STABLE = 0.05  # the warm-up ends when two consecutive runs differ by less than this share
MAX_WARM_UP_RUNS = 8
MAX_ROUNDS = 20  # samples of each candidate
MIN_SAMPLE_SECONDS = 0.005  # a shorter sample would measure the resolution of the clock


@dataclass(frozen=True)
class Candidate:
    """An implementation of the work.

    Attributes:
        run: does the work on the i-th set of inputs; this is timed.
        prepare: runs before each sample and is not timed.
        read: converts the output of `run` to a tensor, for the correctness check.
        timed: timed instead of `run` if given; does the same work `repeats` times.
        min_seconds: known least duration of the first run (compilation).
    """

    name: str
    run: Callable[[int], Any]
    prepare: Callable[[], None] = lambda: None
    read: Callable[[Any], torch.Tensor] = lambda output: output
    timed: Callable[[int], Any] | None = None
    repeats: int = 1
    min_seconds: float = 0.0


@dataclass(frozen=True)
class Distance:
    """The difference of an output from the reference: largest difference, relative error of the norms, PSNR in dB."""

    max: float
    relative: float
    psnr: float


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of `rounds` samples, and the quartiles (the extremes of fewer than four samples)."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Limit:
    """The least work of a run: operations, bytes, the time they take at least (the floor), and the resource that binds
    ("flops", "bytes" or "exps")."""

    seconds: float
    flops: float
    bytes: float
    binds: str

    def rate(self, seconds: float) -> str:
        """The achieved rate of the resource that binds; for exponentials, that of the operations if there are any."""
        if self.binds == "bytes" or not self.flops:
            return f"{_digits(self.bytes / seconds / 1e9)} GB/s"
        return f"{_digits(self.flops / seconds / 1e12)} TFLOP/s"


@dataclass
class Outcome:
    """The result of one candidate. `problem`: why it has no time, in one line."""

    name: str
    distance: Distance | None = None
    spread: Spread | None = None
    problem: str = ""
    cut: str = ""  # why it has fewer rounds than usual
    first_call: float = 0.0  # seconds, including compilation, choice of algorithms, first access to the weights
    samples: list[float] = field(default_factory=list)


def distance(output: torch.Tensor, reference: torch.Tensor) -> Distance:
    """The difference of two tensors of one shape; infinite if `output` is not finite. The PSNR is relative to the range
    of the reference."""
    if output.shape != reference.shape:
        raise ValueError(f"the output is {list(output.shape)}, the reference {list(reference.shape)}")
    actual, expected = output.detach().double().cpu(), reference.detach().double().cpu()
    if not bool(torch.isfinite(actual).all()):
        return Distance(math.inf, math.inf, -math.inf)
    difference = actual - expected
    relative = float(difference.norm() / expected.norm().clamp_min(1e-300))
    error, peak = float(difference.square().mean()) ** 0.5, float(expected.max() - expected.min())
    psnr = 20 * math.log10(peak / error) if error > 0 and peak > 0 else math.inf
    return Distance(float(difference.abs().max()), relative, psnr)


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """The relative error that rounding explains after `depth` consecutive ops, each of which rounds its output once.

    One rounding has an error of at most eps / 2, and 0.2 eps in the root mean square; independent errors add up like a
    random walk. sqrt(depth) * eps / 2 leaves a factor of 2.5 for amplification by later ops. In fp32 the rounding
    inside sums dominates.
    """
    return math.sqrt(depth) * max(torch.finfo(dtype).eps / 2, FP32_SUMS)


def image_limit(dtype: torch.dtype, guidance: float, vae_dtype: torch.dtype | None = None) -> float:
    """The PSNR in dB that an image must reach: that of an error of eps in the network output, amplified by guidance.

    Guidance g combines g times one output and g - 1 times another, so independent errors grow by
    sqrt(g^2 + (g - 1)^2). Images have 8 bits: if half of all values round to the other side, the PSNR is 51 dB, hence
    the limit of 50. A decoder in a coarser dtype than the network's adds an independent error of its eps.
    """
    error = max(torch.finfo(dtype).eps, 2 * FP32_SUMS) * math.hypot(guidance, guidance - 1)
    if vae_dtype is not None and torch.finfo(vae_dtype).eps > torch.finfo(dtype).eps:
        error = math.hypot(error, torch.finfo(vae_dtype).eps)
    return min(50.0, -20 * math.log10(error))


def spread(samples: list[float]) -> Spread:
    """Median and quartiles.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a median needs at least one sample")
    ordered = sorted(samples)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 4:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high, len(ordered))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[int], Any], first: int, count: int, device: torch.device) -> float:
    """Seconds per run of `count` runs on inputs `first`, `first + 1`, ...: by events on a GPU, else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for i in range(count):
            run(first + i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    begin = time.perf_counter()
    for i in range(count):
        run(first + i)
    return (time.perf_counter() - begin) / count


def run_candidates(
    reference: Callable[[], torch.Tensor],
    candidates: list[Candidate],
    limit: float,
    device: torch.device,
    seconds: float,
    max_rounds: int = MAX_ROUNDS,
    measuring: bool = True,
    psnr: bool = False,
    deadline: float = math.inf,
    on_first: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Check and time the candidates.

    Args:
        reference: the output of the reference path on inputs 0.
        candidates: `run(0)` of each must match the reference.
        limit: the largest relative error that passes; with `psnr`, the smallest PSNR.
        device: where the candidates run.
        seconds: how long to take samples; every candidate gets at least one.
        max_rounds: samples of each candidate.
        measuring: False: only check.
        deadline: of `time.perf_counter`. A candidate that cannot start before it is not run, and a round that would end
            after it does not begin.
        on_first: receives the first outcome as soon as it has a time, before a peer can crash the process.

    Returns:
        An outcome for each candidate, in order.
    """
    expected = reference()
    outcomes: list[Outcome] = []
    ready: list[tuple[Candidate, Outcome, int]] = []
    for candidate in candidates:
        outcomes.append(outcome := Outcome(candidate.name))
        min_seconds = max(candidate.min_seconds, outcomes[0].first_call)
        if len(outcomes) > 1 and time.perf_counter() + min_seconds > deadline:
            outcome.problem = "not run: the budget is spent"
            continue
        _check(candidate, outcome, expected, limit, device, psnr)
        if outcome.problem or not measuring:
            continue
        with _recording_failure(outcome):
            count, warm_seconds = _warm_up(candidate, device, deadline)
            outcome.spread = spread([warm_seconds])
            ready.append((candidate, outcome, count))
            if len(outcomes) == 1:
                on_first(outcome)
    _time_in_turns(ready, device, seconds, max_rounds, deadline)
    return outcomes


def _time_in_turns(
    ready: list[tuple[Candidate, Outcome, int]], device: torch.device, seconds: float, max_rounds: int, deadline: float
) -> None:
    """Take a sample of each candidate in every round, and set the spreads; `ready` has the runs of a sample, too."""
    end = min(time.perf_counter() + seconds, deadline)
    last_round = 0.0
    for i in range(max_rounds):
        begin = time.perf_counter()
        if i and begin + last_round > end:
            break
        for candidate, outcome, count in ready:
            if not outcome.problem:
                with _recording_failure(outcome):
                    candidate.prepare()
                    outcome.samples.append(_sample(candidate, 1 + i * count, count, device))
        last_round = time.perf_counter() - begin
    for _, outcome, _ in ready:
        if not outcome.problem:
            outcome.spread = spread(outcome.samples)


@contextmanager
def _recording_failure(outcome: Outcome) -> Iterator[None]:
    """Record an exception of a candidate as its problem; the benchmark goes on without it."""
    try:
        yield
    except Exception as error:  # a peer may fail in any way
        outcome.problem = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        outcome.spread = None


def check_failed(detail: str) -> str:
    """The problem of a candidate whose output is wrong. A table cell shows the part before the colon."""
    return f"correctness check failed: {detail}"


def _check(
    candidate: Candidate, outcome: Outcome, expected: torch.Tensor, limit: float, device: torch.device, psnr: bool
) -> None:
    """Run the candidate for the first time, and compare its output with the reference."""
    with _recording_failure(outcome):
        candidate.prepare()
        synchronise(device)
        begin = time.perf_counter()
        output = candidate.run(0)
        synchronise(device)
        outcome.first_call = time.perf_counter() - begin
        outcome.distance = d = distance(candidate.read(output), expected)
        if psnr and not d.psnr >= limit:
            outcome.problem = check_failed(f"PSNR {d.psnr:.1f} dB, required {limit:.1f}")
        elif not psnr and not d.relative <= limit:
            outcome.problem = check_failed(f"relative error {d.relative:.2e}, max {d.max:.2e}; allowed {limit:.1e}")


def _warm_up(candidate: Candidate, device: torch.device, deadline: float) -> tuple[int, float]:
    """Run until the time is stable; returns the number of runs in a sample, and the seconds of the last run."""
    last = math.inf
    candidate.prepare()
    for i in range(MAX_WARM_UP_RUNS):
        now = _sample(candidate, i, 1, device)
        # Work of more than a second is warm after the correctness check.
        if abs(now - last) < STABLE * now or now > 1.0 or time.perf_counter() > deadline:
            break
        last = now
    call_seconds = now * candidate.repeats
    return max(1, min(1000, math.ceil(MIN_SAMPLE_SECONDS / max(call_seconds, 1e-9)))), now


def _sample(candidate: Candidate, first: int, count: int, device: torch.device) -> float:
    """Seconds of the work, done once."""
    return timed(candidate.timed or candidate.run, first, count, device) / candidate.repeats


def rotation(count: int, make: Callable[[int], Any]) -> Callable[[int], Any]:
    """Create `count` sets of inputs with `make`; returns a function that takes any index, modulo `count`."""
    sets = [make(i) for i in range(count)]
    return lambda i: sets[i % count]


def lines(outcomes: list[Outcome], limit: Limit | None = None) -> Iterator[str]:
    """The table of a benchmark, a line for each candidate; ratios are relative to the first candidate's median."""
    first = next((o.spread.median for o in outcomes[:1] if o.spread), None)
    for o in outcomes:
        error = f"err {o.distance.relative:.0e}" if o.distance else ""
        if o.spread is None:
            yield f"  {o.name:26} {o.problem or 'checked, not timed'} {error if not o.problem else ''}".rstrip()
            continue
        s = o.spread
        share = ""
        if limit is not None:
            resource = " (exponentials)" if limit.binds == "exps" else ""
            share = f"{limit.rate(s.median):>12} {limit.seconds / s.median:5.1%} of the limit{resource}"
        ratio = f"{s.median / first:.2f}x" if first else ""
        cut = f"; {o.cut}" if o.cut else ""
        times = f"{time_text(s.median):>9} ({time_text(s.low)} to {time_text(s.high)})"
        yield f"  {o.name:26} {times} {ratio:>6} {share} {error}{cut}".rstrip()


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"
