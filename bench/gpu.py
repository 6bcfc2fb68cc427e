"""Everything that a machine with a GPU is for, in order of importance and within nine minutes (`make gpu`).

    python -m bench.gpu [--minutes 9] [--results FILE.json]

First the GPU tests, then the kernels one by one, then steps, pictures and cold processes: each result is in the file as
soon as it is known, so that whatever ends the run early takes nothing with it. A summary of at most 80 lines is last.
The network is not used. Exit code 0: all green; 1: a test failed or a gate was red; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.measure import Outcome, Spread, lines
from bench.session import LEAST_BUDGET

MOST_LINES = 80
SPARE = 15.0  # seconds kept for the summary


@dataclass(frozen=True)
class Stage:
    """A run of pytest; `share` of the time that is left when it starts is its limit."""

    title: str
    arguments: tuple[str, ...]
    share: float


STAGES = (
    Stage("tests", ("-m", "gpu", "tests"), 0.3),
    Stage("SD1.5: steps, decoding", ("bench/bench_parts.py", "--models", "sd15", "--batch", "1"), 0.25),
    Stage("SD1.5: pictures", ("bench/bench_images.py", "-k", "not other_ways", "--models", "sd15", "--batch", "1",
                              "--steps", "20", "--peers", "pytorch,diffusers"), 0.2),
    Stage("SDXL: steps, decoding", ("bench/bench_parts.py", "-k", "step or decode", "--models", "sdxl", "--batch", "1",
                                    "--peers", "pytorch,diffusers"), 0.25),
    Stage("kernels", ("bench/bench_kernels.py",), 0.3),
    Stage("cold processes", ("bench/bench_cold.py", "--models", "sd15"), 0.4),
    Stage("SDXL: pictures", ("bench/bench_images.py", "-k", "not other_ways", "--models", "sdxl", "--batch", "1",
                             "--steps", "20", "--peers", "none"), 0.5),
    Stage("SD1.5: batches", ("bench/bench_parts.py", "-k", "step", "--models", "sd15", "--batch", "4,8",
                             "--peers", "pytorch,diffusers"), 0.5),
    Stage("other ways", ("bench/bench_images.py", "-k", "other_ways", "--models", "sd15"), 0.5),
    Stage("SD2.1: steps, decoding", ("bench/bench_parts.py", "-k", "step or decode", "--models", "sd21", "--batch",
                                     "1", "--peers", "pytorch,diffusers"), 1.0),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: no GPU: torch sees no CUDA device; `make test` and `pytest bench/` run without one", file=sys.stderr
        )
        return 2
    path = options.results or record.default_path(torch.device("cuda"))
    end = time.monotonic() + 60 * options.minutes - SPARE
    outcomes = [run(stage, path, end) for stage in STAGES]
    print("\n".join(summary(outcomes, record.read(path)["records"] if path.exists() else [])))
    print(f"written to {path}")
    return 0 if all(ok for ok, _ in outcomes) else 1


def run(stage: Stage, path: Path, end: float) -> tuple[bool, str]:
    """Run a stage within its share of the time; whether it was green, and a line on it."""
    seconds = (end - time.monotonic()) * stage.share
    if seconds < LEAST_BUDGET:
        return True, f"{stage.title}: not run, the time was spent"
    command = [sys.executable, "-m", "pytest", *stage.arguments, "-q", "-p", "no:cacheprovider", "--durations=5"]
    if stage.arguments[0].startswith("bench"):
        command += ["--benchmark", "--budget", f"{seconds:.0f}", "--results", str(path)]
    print(f"== {stage.title}, at most {seconds:.0f} s", flush=True)
    tick = time.monotonic()
    try:
        # A contest in progress may go on past its budget; only then is it stopped from outside.
        patience = max(seconds, min(2 * seconds, end - time.monotonic()))
        done = subprocess.run(command, cwd=record.ROOT, timeout=patience)
        ok, said = done.returncode in (0, 5), {0: "green", 5: "nothing to run"}.get(done.returncode, "RED")
    except subprocess.TimeoutExpired:
        ok, said = True, "stopped: out of time"
    return ok, f"{stage.title}: {said} ({time.monotonic() - tick:.0f} s)"


def summary(outcomes: list[tuple[bool, str]], records: list[dict[str, Any]]) -> list[str]:
    """Stages, then every contest's figures, in at most 80 lines; what does not fit is counted."""
    text = ["", "== summary", *(line for _, line in outcomes)]
    contests: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        name = " ".join(str(one[key]) for key in record.KEY[:-1] if one.get(key) is not None)
        contests.setdefault(name, []).append(one)
    for name, group in contests.items():
        kernel = group[0]["contest"] == "kernel"
        found = [_outcome(one) for one in group]
        limit = record.limit_of(group[0])
        rows = list(lines(found, limit))
        if kernel:  # one line: ours, and the best of PyTorch's
            others = [o for o in found[1:] if o.spread]
            best = min(others, key=lambda o: o.spread.median if o.spread else 0.0) if others else None
            beside = ""
            if best and best.spread:
                rate = f", {limit.rate(best.spread.median)}" if limit else ""
                beside = f"; {best.name} {best.spread.median * 1e6:.1f} µs{rate}"
            text.append(f"{group[0]['model']}:{rows[0]}{beside}")
        else:
            text += [name, *rows]
    if len(text) > MOST_LINES:
        left = len(text) - MOST_LINES + 1
        text = [*text[: MOST_LINES - 1], f"... and {left} more lines, in the file"]
    return text


def _outcome(one: dict[str, Any]) -> Outcome:
    s = one.get("seconds")
    spread = Spread(s["median"], s["low"], s["high"], s["rounds"]) if s else None
    return Outcome(one["candidate"], None, spread, one.get("problem", ""))


if __name__ == "__main__":
    sys.exit(main())
