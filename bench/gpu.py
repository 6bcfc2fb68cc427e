"""The checks and benchmarks that need a GPU, in order of importance, within nine minutes (`make gpu`).

    python -m bench.gpu [--minutes 9] [--results FILE.json] [--rehearse]

First the preflight: what the GPU is, every kernel compiled, one image right. Then each op's ways are timed at the
models' shapes, into a table that can be committed. Then the checks of kernels and graphs, then steps as users get them,
decodes, images, and the rest. Each result is written as soon as it is known, so an early end of the run loses nothing.
A test that hangs, dies or loses the GPU is killed, and a new process continues after it. diffusers under torch.compile
has a process of its own. The run ends with a summary of at most 80 lines. It does not use the network. `--rehearse`
runs the plan on the CPU, with a tiny model. Exit code 0: everything passed; 1: a test or a correctness check failed; 2:
there is no GPU.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import progress, record
from bench.clocks import state_text
from bench.measure import time_text
from bench.options import COMPILED, MIN_BUDGET, above_zero
from fastsd.errors import FastsdError

MAX_LINES = 80
SUMMARY_SECONDS = 15.0  # reserved for the summary
POLL_SECONDS = 0.2
OUT_OF_TIME = "stopped: out of time"
FAULTED = "a kernel faulted the GPU, and is excluded"
AGAIN = 75  # exit code of a module that says so
NO_TEST = "between tests"  # what was running, if no test was
NO_TESTS_COLLECTED = 5  # an exit code of pytest


@dataclass(frozen=True)
class GpuStage:
    """A command with a part of the time: pytest, or a module of `bench`.

    Attributes:
        arguments: of pytest or of the module; "{sm}" and "{seconds}" are filled in.
        share: the limit of the stage, as a share of the time that remains at its start.
        timeout: seconds for one test or benchmark; after that it is killed, and the stage continues without it.
        package: a package that the stage needs.
        module: run instead of pytest; `timeout` is that of the whole.
        rehearsal: arguments that make it small enough for the CPU; None: it needs a GPU.
        hidden: its process sees no GPU.
    """

    title: str
    arguments: tuple[str, ...]
    share: float
    timeout: float = 120.0
    package: str = "torch"
    module: str = ""
    rehearsal: tuple[str, ...] | None = None
    hidden: bool = False

    def command(self, seconds: float, path: Path, sm: int) -> list[str]:
        """The command line, for a process that may take `seconds` and writes to `path`."""
        arguments = [part.format(sm=sm, seconds=f"{seconds:.0f}", results=path) for part in self.arguments]
        if self.module:
            return [sys.executable, "-m", self.module, *arguments]
        # -W default: an unknown warning of a library must not become an error.
        command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        command += ["-p", "bench.progress", "-W", "default", "--continue-on-collection-errors", "--durations=5"]
        if self.arguments[0].startswith("bench"):
            command += ["--benchmark", "--budget", f"{seconds:.0f}", "--results", str(path)]
        return command


DENOISE, PARTS, IMAGES = "bench/bench_denoise.py", "bench/bench_parts.py", "bench/bench_images.py"
VERIFY, GRAPHS = "tests/verify/test_gpu.py::test_verify_passes", "tests/gpu/test_graphs.py"
FIRST_IMAGE = "tests/gpu/test_first_image.py"
EAGER = ("--peers", "pytorch,diffusers")
OWN = ("--peers", "pytorch")
ALONE = ("--peers", COMPILED)  # in a process of its own
SD15, SD21, SDXL = (("--models", model, "--batch", "1") for model in ("sd15", "sd21", "sdxl"))
# On the CPU; of a flag that stands twice the last one counts.
SMALL = ("--models", "tiny", "--batch", "1", "--dtype", "fp32", "--peers", "none")
COLLECTED = ("--collect-only",)
TUNED = ("--seconds", "{seconds}", "--results", "{results}")
CHOICE = "fastsd.kernels.choice.decide"
STAGES = (
    GpuStage("preflight: every kernel compiled", ("--sm", "{sm}", "--seconds", "{seconds}"), 0.12, 120.0, "triton",
             "bench.warm", ("--first", "2")),
    GpuStage("preflight: an image of the bundled model", ("-m", "gpu", FIRST_IMAGE), 0.1, rehearsal=COLLECTED),
    GpuStage("SD1.5: the ways of each op", ("--model", "sd15", *TUNED), 0.2, 200.0, CHOICE,
             "bench.tune"),
    GpuStage("kernels, layers, images: verification", ("-m", "gpu", VERIFY), 0.2, rehearsal=COLLECTED),
    GpuStage("tests of CUDA graphs", ("-m", "gpu", GRAPHS), 0.12, rehearsal=COLLECTED),
    GpuStage("SD1.5: a step as users get it", (DENOISE, *SD15, *OWN), 0.12, rehearsal=SMALL),
    GpuStage("SD1.5: the UNet, decode", (PARTS, "-k", "step or decode", *SD15, *EAGER), 0.2, rehearsal=SMALL),
    GpuStage("SD1.5: images", (IMAGES, *SD15, "--steps", "20", *EAGER), 0.2, rehearsal=(*SMALL, "--steps", "2")),
    GpuStage("SDXL: the ways of each op", ("--model", "sdxl", *TUNED), 0.2, 200.0, CHOICE,
             "bench.tune"),
    GpuStage("SDXL: a step as users get it", (DENOISE, *SDXL, *OWN), 0.2),
    GpuStage("SDXL: the UNet, decode", (PARTS, "-k", "step or decode", *SDXL, *EAGER), 0.25),
    GpuStage("SD1.5: a step beside torch.compile", (PARTS, "-k", "step", *SD15, *ALONE), 0.4, 240.0, "diffusers"),
    GpuStage("SD1.5: time by kind of op", ("bench/bench_kinds.py", *SD15), 0.25, rehearsal=SMALL),
    GpuStage("kernels", ("bench/bench_kernels.py",), 0.3, rehearsal=(*SMALL, "-k", "layernorm-2048x1280")),
    GpuStage("cold processes", ("bench/bench_cold.py", "--models", "sd15"), 0.4, 150.0, rehearsal=SMALL),
    GpuStage("SDXL: images", (IMAGES, *SDXL, "--steps", "20", "--peers", "none"), 0.3),
    GpuStage("SD1.5: batches", (DENOISE, "--models", "sd15", "--batch", "4,8", *OWN), 0.3),
    GpuStage("SDXL: a step beside torch.compile", (PARTS, "-k", "step", *SDXL, *ALONE), 0.7, 240.0, "diffusers"),
    GpuStage("SD1.5: a decode beside torch.compile", (PARTS, "-k", "decode", *SD15, *ALONE), 0.5, 240.0, "diffusers"),
    GpuStage("other modes", ("bench/bench_modes.py", "--models", "sd15", "--steps", "20", *EAGER), 0.5,
             rehearsal=(*SMALL, "--steps", "2", "-k", "turbo")),
    GpuStage("SD2.1: the UNet, decode", (PARTS, "-k", "step or decode", *SD21, *EAGER), 0.5),
    GpuStage("tests of the kernels", ("tests/kernels/triton",), 0.7, rehearsal=COLLECTED),
    GpuStage("the other GPU tests", ("-m", "gpu", "tests", "--deselect", VERIFY, "--ignore", GRAPHS, "--ignore",
                                     FIRST_IMAGE), 1.0),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=above_zero, default=9.0)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    options = parser.parse_args(arguments)
    if 60 * options.minutes < SUMMARY_SECONDS + MIN_BUDGET:
        parser.error(f"argument --minutes: {options.minutes:g}; the summary alone takes {SUMMARY_SECONDS:.0f} s")
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "error: no GPU: torch sees no CUDA device; `make test` and `pytest bench/` run without one, and "
            "`--rehearse` runs this plan on the CPU",
            file=sys.stderr,
        )
        return 2
    device, stages, (major, minor) = torch.device("cpu"), rehearsed(STAGES), (9, 0)
    if not options.rehearse:
        device, stages, (major, minor) = torch.device("cuda"), STAGES, torch.cuda.get_device_capability()
    path = (options.results or record.default_path(device)).resolve()
    unwritable = record.why_unwritable(path)
    if unwritable is not None:
        parser.error(f"argument --results: {path}: {unwritable}")
    print("\n".join(preflight_lines(record.environment(device))), flush=True)
    outcomes = run_stages(stages, path, time.monotonic() + 60 * options.minutes - SUMMARY_SECONDS, 10 * major + minor)
    print("\n".join(summary(outcomes, _records(path))))
    print(f"written to {path}" if path.exists() else "nothing was measured, nothing was written")
    return 0 if all(passed for passed, _ in outcomes) else 1


def rehearsed(stages: tuple[GpuStage, ...]) -> tuple[GpuStage, ...]:
    """The plan for the CPU: the stages that can be small, in processes that see no GPU."""
    return tuple(
        replace(stage, arguments=(*stage.arguments, *stage.rehearsal), hidden=True)
        for stage in stages
        if stage.rehearsal is not None
    )


def preflight_lines(environment: dict[str, Any]) -> list[str]:
    """What is measured on, a line each: the device, its driver, the versions, clocks."""
    parts = {name: value for name, value in environment.items() if not isinstance(value, dict)}
    versions = {name: version or "not installed" for name, version in environment["versions"].items()}
    clocks = {name: f"{mhz['now']} of {mhz['max']}" for name, mhz in environment.items() if name.endswith("_mhz")}
    return ["== preflight", *(f"{name}: {value}" for name, value in {**parts, **versions, **clocks}.items())]


def run_stages(stages: tuple[GpuStage, ...], path: Path, end: float, sm: int = 90) -> list[tuple[bool, str]]:
    """Run all stages in order. After an interrupt, the outcomes so far are returned."""
    outcomes: list[tuple[bool, str]] = []
    for stage in stages:
        try:
            outcomes.append(run_stage(stage, path, end, sm))
        except KeyboardInterrupt:
            outcomes.append((False, f"{stage.title}: interrupted; the stages after it were not run"))
            break
        except Exception as error:  # of this program, not of a test; the next stages can still run
            outcomes.append((False, f"{stage.title}: not run: {type(error).__name__}: {error}"))
    return outcomes


def run_stage(stage: GpuStage, path: Path, end: float, sm: int = 90) -> tuple[bool, str]:
    """Run a stage within its share of the time; returns whether it passed, and a line for the summary.

    A test that hangs, dies or loses the GPU is skipped: a new process continues after it.
    """
    began = time.monotonic()
    seconds = (end - began) * stage.share
    if seconds < MIN_BUDGET:
        return True, f"{stage.title}: not run, the time was spent"
    if not is_there(stage.package):
        return True, f"{stage.title}: not run, {stage.package} is not installed"
    print(f"== {stage.title}, at most {seconds:.0f} s", flush=True)
    # A benchmark in progress may exceed its budget by half; then its process is stopped.
    finish = min(began + 1.5 * seconds, end)
    interruptions: list[str] = []
    codes: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        progress_file = Path(folder) / "progress"
        while True:
            before = progress.started(progress_file)
            budget = max(MIN_BUDGET, began + seconds - time.monotonic())
            code, interruption = _run_process(stage, stage.command(budget, path, sm), progress_file, finish)
            interruptions += [interruption] if interruption else []
            codes.append(code if not interruption else int(progress.failed(progress_file)))
            advanced = progress.started(progress_file) != before or interruption == FAULTED
            if not interruption or not advanced or began + seconds - time.monotonic() <= MIN_BUDGET:
                break
            print(f"   {interruption}; continuing after it", flush=True)
    failed = any(code not in (0, NO_TESTS_COLLECTED) for code in codes)
    passed = not failed and all(interruption == OUT_OF_TIME for interruption in interruptions)
    text = "; ".join((["FAILED"] if failed else []) + interruptions)
    if not text:
        text = "nothing to run" if codes[-1] == NO_TESTS_COLLECTED else "passed"
    return passed, f"{stage.title}: {text} ({time.monotonic() - began:.0f} s)"


def is_there(package: str) -> bool:
    """Whether a package, or a module in one, can be imported; without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that should hold it
        return False


def _run_process(stage: GpuStage, command: list[str], progress_file: Path, finish: float) -> tuple[int, str]:
    """Run one process of a stage; returns its exit code, and what interrupted it, if anything did."""
    environment = os.environ | {progress.FILE: str(progress_file)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if stage.hidden else {}
    process = subprocess.Popen(command, cwd=record.ROOT, env=environment, start_new_session=True)
    began, interruption = time.time(), ""
    try:
        while process.poll() is None and not interruption:
            time.sleep(POLL_SECONDS)
            name, since = progress.running(progress_file) or (_part(stage), progress.last(progress_file))
            since = max(since, began)
            if time.time() - since > stage.timeout:
                interruption = f"killed after {stage.timeout:.0f} s: {short(name)}"
            elif time.monotonic() > finish:
                interruption = OUT_OF_TIME
    finally:
        _kill(process)
    lost = next((line["lost"] for line in progress.read(progress_file)[-1:] if "lost" in line), None)
    if lost:
        interruption = f"the GPU was lost: {short(lost)}"
    elif not interruption and process.returncode == AGAIN:
        interruption = FAULTED
    elif not interruption and (process.returncode < 0 or progress.running(progress_file)):
        name, _ = progress.running(progress_file) or (_part(stage), 0.0)
        interruption = f"died with exit code {process.returncode}: {short(name)}"
    return process.returncode, interruption


def _part(stage: GpuStage) -> str:
    """What runs while no test does."""
    return stage.module or NO_TEST


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, if it still runs, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def short(nodeid: str) -> str:
    """The id of a test without its folder."""
    return nodeid.rsplit("/", 1)[-1]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return record.read(path)["records"] if path.exists() else []
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return []


def summary(outcomes: list[tuple[bool, str]], records: list[dict[str, Any]]) -> list[str]:
    """A line for each stage, then for each benchmark; at most `MAX_LINES`, with a count of the lines left out."""
    text = ["", "== summary", *(line for _, line in outcomes)]
    benchmarks: dict[str, list[dict[str, Any]]] = {}
    for row in records:
        labels = (row.get(key) for key in record.KEY[:-1])
        name = " ".join(str(label) for label in labels if label is not None and label != "kernel")
        benchmarks.setdefault(name, []).append(row)
    for name, rows in benchmarks.items():
        own = min(rows, key=lambda row: (row["candidate"] != "fastsd", not row["candidate"].startswith("fastsd")))
        others = [_other_text(row, own) for row in rows if row is not own]
        text.append("; ".join([f"{name}: {_own_text(own)}", *others]))
    if len(text) > MAX_LINES:
        count = len(text) - MAX_LINES + 1
        text = [*text[: MAX_LINES - 1], f"... and {count} more lines, in the file"]
    return text


def _own_text(own: dict[str, Any]) -> str:
    """fastsd's time, rate, share of the limit and memory; or why there is no time."""
    seconds, limit = own.get("seconds"), record.limit_of(own)
    if not seconds:
        return str(own.get("problem", "no time"))
    parts = [time_text(seconds["median"])]
    if limit is not None:
        parts += [limit.rate(seconds["median"]), f"{limit.seconds / seconds['median']:.1%} of the limit"]
    if gpu := state_text(own.get("gpu", {})):
        parts.append(gpu)
    if own.get("peak"):
        parts.append("peak " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in own["peak"].items()))
    return ", ".join(parts)


def _other_text(other: dict[str, Any], own: dict[str, Any]) -> str:
    """The time of another candidate, also as a multiple of fastsd's."""
    seconds, own_seconds = other.get("seconds"), own.get("seconds")
    if not seconds:
        return f"{other['candidate']}: {str(other.get('problem', 'no time'))[:60]}"
    ratio = f" ({seconds['median'] / own_seconds['median']:.2f}x)" if own_seconds else ""
    return f"{other['candidate']} {time_text(seconds['median'])}{ratio}"


if __name__ == "__main__":
    sys.exit(main())
