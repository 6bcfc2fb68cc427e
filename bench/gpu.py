"""Everything that a machine with a GPU is for, in order of importance and within nine minutes (`make gpu`).

    python -m bench.gpu [--minutes 9] [--results FILE.json]

First what verifies kernels and graphs, then steps, pictures, kernels and cold processes, then the rest: each result is
in the file as soon as it is known, so that whatever ends the run early takes nothing with it. What hangs, dies or takes
the GPU from its process is killed, and a fresh process goes on after it. A summary of at most 80 lines is last.
The network is not used. Exit code 0: all green; 1: a test failed or a gate was red; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import progress, record
from bench.measure import time_text
from bench.session import LEAST_BUDGET
from fastsd.errors import FastsdError

MOST_LINES = 80
SPARE = 15.0  # seconds kept for the summary
POLL = 0.2  # seconds between two looks at a stage
OUT_OF_TIME = "stopped: out of time"
NO_TEST = "at its start or end"


@dataclass(frozen=True)
class Stage:
    """Runs of pytest in processes of their own.

    Attributes:
        arguments: pytest's.
        share: of the time that is left when the stage starts, its limit.
        patience: seconds that one test or benchmark may take before it is killed and the stage goes on without it.
        package: what has to be installed for it.
    """

    title: str
    arguments: tuple[str, ...]
    share: float
    patience: float = 120.0
    package: str = "torch"


PARTS, IMAGES = "bench/bench_parts.py", "bench/bench_images.py"
EAGER = ("--peers", "pytorch,diffusers")
STAGES = (
    Stage("kernels, layers, pictures: verified", ("-m", "gpu", "-k", "passes", "tests/verify/test_gpu.py"), 0.25),
    Stage("tests of CUDA graphs", ("-m", "gpu", "tests/gpu/test_graphs.py"), 0.15),
    Stage("SD1.5: steps, decoding", (PARTS, "--models", "sd15", "--batch", "1", *EAGER), 0.25),
    Stage("SD1.5: pictures", (IMAGES, "--models", "sd15", "--batch", "1", "--steps", "20",
                              *EAGER), 0.2),
    Stage("SDXL: steps, decoding", (PARTS, "-k", "step or decode", "--models", "sdxl", "--batch", "1", *EAGER), 0.25),
    Stage("kernels", ("bench/bench_kernels.py",), 0.3),
    Stage("cold processes", ("bench/bench_cold.py", "--models", "sd15"), 0.4, 150.0),
    Stage("SDXL: pictures", (IMAGES, "--models", "sdxl", "--batch", "1", "--steps", "20",
                             "--peers", "none"), 0.3),
    Stage("SD1.5: batches", (PARTS, "-k", "step", "--models", "sd15", "--batch", "4,8", *EAGER), 0.3),
    Stage("SD1.5: a step beside torch.compile", (PARTS, "-k", "step", "--models", "sd15", "--batch", "1",
                                                 "--peers", "diffusers-compiled"), 0.7, 240.0, "diffusers"),
    Stage("SD1.5: time by kind", ("bench/bench_kinds.py", "--models", "sd15", "--batch", "1"), 0.4),
    Stage("other ways", ("bench/bench_ways.py", "--models", "sd15", "--steps", "20", *EAGER), 0.5),
    Stage("SD2.1: steps, decoding", (PARTS, "-k", "step or decode", "--models", "sd21", "--batch", "1", *EAGER), 0.5),
    Stage("tests of the kernels", ("-k", "triton", "tests/kernels"), 0.7),
    Stage("the other GPU tests", ("-m", "gpu", "-k", "not passes and not graphs", "tests"), 1.0),
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
    path = (options.results or record.default_path(torch.device("cuda"))).resolve()
    outcomes = everything(STAGES, path, time.monotonic() + 60 * options.minutes - SPARE)
    print("\n".join(summary(outcomes, _records(path))))
    print(f"written to {path}")
    return 0 if all(ok for ok, _ in outcomes) else 1


def everything(stages: tuple[Stage, ...], path: Path, end: float) -> list[tuple[bool, str]]:
    """All stages, one after the other; an interrupt ends them, and what is known is still told."""
    outcomes: list[tuple[bool, str]] = []
    for stage in stages:
        try:
            outcomes.append(run(stage, path, end))
        except KeyboardInterrupt:
            outcomes.append((False, f"{stage.title}: interrupted; nothing after it was run"))
            break
        except Exception as error:  # of this program's own: the stages after it are worth running all the same
            outcomes.append((False, f"{stage.title}: not run: {type(error).__name__}: {error}"))
    return outcomes


def run(stage: Stage, path: Path, end: float) -> tuple[bool, str]:
    """Run a stage within its share of the time; whether it was green, and a line on it.

    What hangs or takes the process or the GPU down with it is left behind, and another process goes on after it.
    """
    began = time.monotonic()
    seconds = (end - began) * stage.share
    if seconds < LEAST_BUDGET:
        return True, f"{stage.title}: not run, the time was spent"
    if importlib.util.find_spec(stage.package) is None:
        return True, f"{stage.title}: not run, {stage.package} is not installed"
    print(f"== {stage.title}, at most {seconds:.0f} s", flush=True)
    # A contest in progress may go on past its budget; only then is it stopped from outside.
    finish = min(began + 1.5 * seconds, end)
    wounds: list[str] = []
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        progress_file = Path(folder) / "progress"
        while True:
            before = progress.started(progress_file)
            code, why = _watched(
                stage, path, progress_file, max(LEAST_BUDGET, began + seconds - time.monotonic()), finish
            )
            wounds += [why] if why else []
            codes.append(code if not why else int(progress.failed(progress_file)))
            going = progress.started(progress_file) != before and began + seconds - time.monotonic() > LEAST_BUDGET
            if not why or not going:
                break
            print(f"   {why}; going on after it", flush=True)
    red = any(code not in (0, 5) for code in codes)
    said = "; ".join((["RED"] if red else []) + wounds) or {5: "nothing to run"}.get(codes[-1], "green")
    ok = not red and all(wound == OUT_OF_TIME for wound in wounds)
    return ok, f"{stage.title}: {said} ({time.monotonic() - began:.0f} s)"


def _watched(stage: Stage, path: Path, progress_file: Path, budget: float, finish: float) -> tuple[int, str]:
    """One process of a stage; its exit code, and in a few words what ended it before its end, if anything did."""
    # -W default: a warning of a library that we never saw should not make an error of what works.
    command = [sys.executable, "-m", "pytest", *stage.arguments, "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    command += ["-p", "bench.progress", "-W", "default", "--continue-on-collection-errors", "--durations=5"]
    if stage.arguments[0].startswith("bench"):
        command += ["--benchmark", "--budget", f"{budget:.0f}", "--results", str(path)]
    environment = os.environ | {progress.FILE: str(progress_file)}
    process = subprocess.Popen(command, cwd=record.ROOT, env=environment, start_new_session=True)
    began, why = time.time(), ""
    try:
        while process.poll() is None and not why:
            time.sleep(POLL)
            name, since = progress.running(progress_file) or (NO_TEST, progress.last(progress_file))
            since = max(since, began)
            if time.time() - since > stage.patience:
                why = f"killed after {stage.patience:.0f} s: {short(name)}"
            elif time.monotonic() > finish:
                why = OUT_OF_TIME
    finally:
        _end(process)
    lost = next((line["lost"] for line in progress.read(progress_file)[-1:] if "lost" in line), None)
    if lost:
        why = f"the GPU was lost: {short(lost)}"
    elif not why and (process.returncode < 0 or progress.running(progress_file)):
        name, _ = progress.running(progress_file) or (NO_TEST, 0.0)
        why = f"died with exit code {process.returncode}: {short(name)}"
    return process.returncode, why


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def short(nodeid: str) -> str:
    """A test's name without its folder."""
    return nodeid.rsplit("/", 1)[-1]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return record.read(path)["records"] if path.exists() else []
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return []


def summary(outcomes: list[tuple[bool, str]], records: list[dict[str, Any]]) -> list[str]:
    """Stages, then a line for every contest, at most 80 in all; what does not fit is counted."""
    text = ["", "== summary", *(line for _, line in outcomes)]
    contests: dict[str, list[dict[str, Any]]] = {}
    for one in records:
        labels = (one.get(key) for key in record.KEY[:-1])
        name = " ".join(str(label) for label in labels if label is not None and label != "kernel")
        contests.setdefault(name, []).append(one)
    for name, group in contests.items():
        own = min(group, key=lambda one: (one["candidate"] != "fastsd", not one["candidate"].startswith("fastsd")))
        others = [_beside(one, own) for one in group if one is not own]
        text.append("; ".join([f"{name}: {_own(own)}", *others]))
    if len(text) > MOST_LINES:
        left = len(text) - MOST_LINES + 1
        text = [*text[: MOST_LINES - 1], f"... and {left} more lines, in the file"]
    return text


def _own(one: dict[str, Any]) -> str:
    """Time, rate, share of the limit, memory; or why there is none."""
    seconds, limit = one.get("seconds"), record.limit_of(one)
    if not seconds:
        return str(one.get("problem", "no speed"))
    found = [time_text(seconds["median"])]
    if limit is not None:
        found += [limit.rate(seconds["median"]), f"{limit.seconds / seconds['median']:.1%} of the limit"]
    if one.get("peak"):
        found.append("peak " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in one["peak"].items()))
    return ", ".join(found)


def _beside(one: dict[str, Any], own: dict[str, Any]) -> str:
    """Another candidate in a few words: its time, and that as a multiple of fastsd's."""
    seconds, base = one.get("seconds"), own.get("seconds")
    if not seconds:
        return f"{one['candidate']}: {str(one.get('problem', 'no speed'))[:60]}"
    ratio = f" ({seconds['median'] / base['median']:.2f}x)" if base else ""
    return f"{one['candidate']} {time_text(seconds['median'])}{ratio}"


if __name__ == "__main__":
    sys.exit(main())
