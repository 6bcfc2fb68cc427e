"""A contest: candidates that do the same work, each held against the reference first, then timed in turn.

No figure without a green gate: what differs from the reference path by more than rounding explains gets its distance
printed where its speed would stand. Candidates take turns (A B A B ...), so that a busy or warm machine disturbs all
alike, on inputs that rotate, so that no cache flatters. Times are medians, with the quartiles as their spread.
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

# What sums over some ten thousand fp32 products leave, relative; below it fp32 candidates cannot be told apart.
FP32_SUMS = 1e-6
STABLE = 0.05  # warm-up ends when two runs in a row differ by less
ROUNDS = 20  # samples of each candidate, where there is time
TRIES = 8  # and after so many runs at the latest
SHORTEST = 0.005  # seconds that one sample should last at least, so that the clock does not matter


@dataclass(frozen=True)
class Candidate:
    """`run(i)` does the work on the i-th set of inputs and is timed; `prepare` comes before a sample and is not.

    `read` makes a tensor of what `run` returns, for the gate. `timed`: what is timed instead, the same work `repeats`
    times. `needs`: seconds that the first run is known to take at least (compiling).
    """

    name: str
    run: Callable[[int], Any]
    prepare: Callable[[], None] = lambda: None
    read: Callable[[Any], torch.Tensor] = lambda output: output
    timed: Callable[[int], Any] | None = None
    repeats: int = 1
    needs: float = 0.0


@dataclass(frozen=True)
class Distance:
    """How far an output is from the reference: largest difference, relative error (of the norms), PSNR in dB."""

    max: float
    relative: float
    psnr: float


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of `rounds` samples, and the quartiles (the extremes where there are fewer than four)."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Limit:
    """What a run must at least do: operations, bytes, the seconds of that (the floor), and which of them binds
    ("flops", "bytes", "exps")."""

    seconds: float
    flops: float
    bytes: float
    binds: str

    def rate(self, seconds: float) -> str:
        """What was achieved of what binds, for a table; where exponentials bind, operations, if there are any."""
        if self.binds == "bytes" or not self.flops:
            return f"{_digits(self.bytes / seconds / 1e9)} GB/s"
        return f"{_digits(self.flops / seconds / 1e12)} TFLOP/s"


@dataclass
class Outcome:
    """What a contest says of one candidate. `problem`: why there is no speed, in one line."""

    name: str
    distance: Distance | None = None
    spread: Spread | None = None
    problem: str = ""
    cut: str = ""  # why there are fewer rounds than usual
    first_call: float = 0.0  # seconds: compilation, choice of algorithms, first touch of the weights
    samples: list[float] = field(default_factory=list)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> Distance:
    """Of two tensors of one shape; a peak signal is the reference's range. Non-finite numbers are infinitely far."""
    if found.shape != wanted.shape:
        raise ValueError(f"the output is {list(found.shape)}, the reference {list(wanted.shape)}")
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    if not bool(torch.isfinite(a).all()):
        return Distance(math.inf, math.inf, -math.inf)
    difference = a - b
    relative = float(difference.norm() / b.norm().clamp_min(1e-300))
    error, peak = float(difference.square().mean()) ** 0.5, float(b.max() - b.min())
    psnr = 20 * math.log10(peak / error) if error > 0 and peak > 0 else math.inf
    return Distance(float(difference.abs().max()), relative, psnr)


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """The relative error that rounding explains after `depth` ops in a row, each of which rounds its output once.

    One rounding errs by eps / 2 at most and by 0.2 eps in the mean square; independent ones add up as a random walk.
    sqrt(depth) * eps / 2 leaves a factor of 2.5 to what later ops amplify. fp32 counts the rounding inside its sums.
    """
    return math.sqrt(depth) * max(torch.finfo(dtype).eps / 2, FP32_SUMS)


def image_limit(dtype: torch.dtype, guidance: float) -> float:
    """The PSNR in dB that a picture must reach: a network output that is off by eps, amplified by guidance.

    Guidance g takes g of one output less g - 1 of another, so their independent errors grow sqrt(g^2 + (g - 1)^2)
    times. Pictures have 8 bits: where half of all values fall on the other side of a rounding, that is 51 dB, and no
    more than 50 is asked.
    """
    error = max(torch.finfo(dtype).eps, 2 * FP32_SUMS)
    return min(50.0, -20 * math.log10(error * math.hypot(guidance, guidance - 1)))


def spread(samples: list[float]) -> Spread:
    """Median and quartiles.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a median needs a sample")
    ordered = sorted(samples)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 4:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high, len(ordered))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[int], Any], first: int, count: int, device: torch.device) -> float:
    """Seconds for each of `count` runs on inputs `first`, `first + 1`, ...: by events on a GPU, else by the clock."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for i in range(count):
            run(first + i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count
    tick = time.perf_counter()
    for i in range(count):
        run(first + i)
    return (time.perf_counter() - tick) / count


def hold(
    reference: Callable[[], torch.Tensor],
    candidates: list[Candidate],
    limit: float,
    device: torch.device,
    seconds: float,
    rounds: int = ROUNDS,
    measuring: bool = True,
    psnr: bool = False,
    deadline: float = math.inf,
    early: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run a contest.

    Args:
        reference: the reference path's output on inputs 0.
        candidates: who takes part; `run(0)` gives what `reference` does.
        limit: the largest relative error that passes; with `psnr`, the smallest PSNR.
        device: where the work happens.
        seconds: how long to go on timing; every candidate gets at least one sample.
        rounds: samples of each candidate at most.
        measuring: False: only the gates.
        deadline: of `time.perf_counter`. A candidate that would begin after it does not take part, and no round is
            begun that would end after it.
        early: is given the first outcome as soon as there is a figure, before others can take the time or the device.

    Returns:
        an outcome for each candidate, in order.
    """
    wanted = reference()
    outcomes: list[Outcome] = []
    fit: list[tuple[Candidate, Outcome, int]] = []
    for candidate in candidates:
        outcomes.append(outcome := Outcome(candidate.name))
        needs = max(candidate.needs, outcomes[0].first_call)
        if len(outcomes) > 1 and time.perf_counter() + needs > deadline:
            outcome.problem = "not run: the budget is spent"
            continue
        _gate(candidate, outcome, wanted, limit, device, psnr)
        if outcome.problem or not measuring:
            continue
        with _failing(outcome):
            count, warm = _warm(candidate, device, deadline)
            outcome.spread = spread([warm])
            fit.append((candidate, outcome, count))
            if len(outcomes) == 1:
                early(outcome)
    end = min(time.perf_counter() + seconds, deadline)
    last = 0.0
    for i in range(rounds):
        tick = time.perf_counter()
        if i and tick + last > end:
            break
        for candidate, outcome, count in fit:
            if not outcome.problem:
                with _failing(outcome):
                    candidate.prepare()
                    outcome.samples.append(_sample(candidate, 1 + i * count, count, device))
        last = time.perf_counter() - tick
    for _, outcome, _ in fit:
        if not outcome.problem:
            outcome.spread = spread(outcome.samples)
    return outcomes


@contextmanager
def _failing(outcome: Outcome) -> Iterator[None]:
    """Whatever a candidate raises is its own problem, not the contest's; it then has no speed."""
    try:
        yield
    except Exception as error:  # a peer may fail in any way; the line says how
        outcome.problem = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        outcome.spread = None


def _gate(
    candidate: Candidate, outcome: Outcome, wanted: torch.Tensor, limit: float, device: torch.device, psnr: bool
) -> None:
    """The candidate's first run, held against the reference."""
    with _failing(outcome):
        candidate.prepare()
        synchronise(device)
        tick = time.perf_counter()
        output = candidate.run(0)
        synchronise(device)
        outcome.first_call = time.perf_counter() - tick
        outcome.distance = d = distance(candidate.read(output), wanted)
        if psnr and not d.psnr >= limit:
            outcome.problem = f"red gate: PSNR {d.psnr:.1f} dB, needs {limit:.1f}"
        elif not psnr and not d.relative <= limit:
            outcome.problem = f"red gate: relative error {d.relative:.2e}, max {d.max:.2e}; allowed {limit:.1e}"


def _warm(candidate: Candidate, device: torch.device, deadline: float) -> tuple[int, float]:
    """Run until the time is stable; how many runs make a sample, and the last one's seconds."""
    last = math.inf
    candidate.prepare()
    for i in range(TRIES):
        now = _sample(candidate, i, 1, device)
        # A second's work is warm after the gate's run.
        if abs(now - last) < STABLE * now or now > 1.0 or time.perf_counter() > deadline:
            break
        last = now
    whole = now * candidate.repeats
    return max(1, min(1000, math.ceil(SHORTEST / max(whole, 1e-9)))), now


def _sample(candidate: Candidate, first: int, count: int, device: torch.device) -> float:
    """Seconds of the work done once."""
    return timed(candidate.timed or candidate.run, first, count, device) / candidate.repeats


def rotation(count: int, make: Callable[[int], Any]) -> Callable[[int], Any]:
    """`count` sets of inputs made once by `make`, given by any index."""
    sets = [make(i) for i in range(count)]
    return lambda i: sets[i % count]


def lines(outcomes: list[Outcome], limit: Limit | None = None) -> Iterator[str]:
    """The table of a contest, a line for each candidate; ratios are to the first one's median."""
    first = next((o.spread.median for o in outcomes[:1] if o.spread), None)
    for o in outcomes:
        gate = f"err {o.distance.relative:.0e}" if o.distance else ""
        if o.spread is None:
            yield f"  {o.name:26} {o.problem or 'checked, not timed'} {gate if not o.problem else ''}".rstrip()
            continue
        s = o.spread
        share = ""
        if limit is not None:
            by = " (exponentials)" if limit.binds == "exps" else ""
            share = f"{limit.rate(s.median):>12} {limit.seconds / s.median:5.1%} of the limit{by}"
        ratio = f"{s.median / first:.2f}x" if first else ""
        cut = f"; {o.cut}" if o.cut else ""
        times = f"{time_text(s.median):>9} ({time_text(s.low)} to {time_text(s.high)})"
        yield f"  {o.name:26} {times} {ratio:>6} {share} {gate}{cut}".rstrip()


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} µs"
