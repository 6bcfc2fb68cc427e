"""Time every way to compute each op at a model's shapes on this GPU, into the user's table and a file to commit.

    python -m bench.tune --model sd15 [--batch 1] [--seconds 75] [--results FILE.json]

The model has random weights. In a first image each op's few ways are compared and timed, as at any first use; then all
launches of the kernels, until the time is over. What is known is written to `FILE-choices.json` again and again, so
that an early end loses little. It ends with a line for each op. Exit code 2: there is no GPU; 75: a kernel faulted the
GPU, and is excluded, so that another process can go on.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from bench import models
from bench.families import FAMILIES
from bench.gpu import AGAIN
from bench.options import above_zero, count
from bench.session import pipeline_components
from fastsd.errors import FastsdError
from fastsd.kernels.candidates import ChoiceMode
from fastsd.kernels.choice import decide, table
from fastsd.kernels.choice.table import Place, TableEntry
from fastsd.pipeline import Pipeline

WRITTEN_EVERY = 5.0  # seconds


def summary(entries: Mapping[Place, TableEntry]) -> list[str]:
    """A line for each op: the time of one call of each key, that of PyTorch's own op, and what was chosen how often."""
    lines = []
    for op in sorted({op for op, _ in entries}):
        timed = [entry for (name, _), entry in entries.items() if name == op and "torch" in entry.microseconds]
        best = sum(min(entry.microseconds.values()) for entry in timed) / 1000
        own = sum(entry.microseconds["torch"] for entry in timed) / 1000
        chosen = Counter(str(entry.candidate) for entry in timed)
        names = ", ".join(f"{name} {count}" for name, count in chosen.most_common())
        lines.append(f"{op}: {len(timed)} keys, {best:.3f} ms, PyTorch's own {own:.3f} ms; {names}")
        wrong = {
            f"{label}: {reason}" for (name, _), one in entries.items() if name == op for label, reason in told(one)
        }
        lines += [f"    left out: {text}" for text in sorted(wrong)[:3]]
    return lines


def told(entry: TableEntry) -> list[tuple[str, str]]:
    """What was left out because it is wrong or ends its process."""
    return [(label, reason) for label, reason in entry.excluded.items() if "wrong" in reason or "process" in reason]


class Exporter:
    """Writes what is known of a GPU to a file, not more often than every few seconds."""

    def __init__(self, device: torch.device, path: Path | None):
        self.device, self.path, self.written = device, path, 0.0

    def __call__(self, place: Place, entry: TableEntry) -> None:
        if time.monotonic() - self.written > WRITTEN_EVERY:
            self.write()

    def write(self) -> None:
        """Write now."""
        self.written = time.monotonic()
        gpu = decide.gpu_of(self.device)
        gpu.save()
        if self.path is not None and gpu.table.entries:
            table.export(gpu.identity, self.path)


def run(pipe: Pipeline, size: int, batch: int, seconds: float, export: Exporter) -> None:
    """Two images: one whose ops choose as at any first use, one while every launch is tried."""
    end = time.monotonic() + seconds
    for mode in (ChoiceMode(tell=export), ChoiceMode(probe=False, thorough=True, ends=end, tell=export)):
        pipe.choice_mode = mode
        pipe(["a lighthouse"] * batch, batch_size=batch, width=size, height=size, num_inference_steps=1, seed=0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(FAMILIES), default="sd15")
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--seconds", type=above_zero, default=75.0, help="after them no more launches are tried")
    parser.add_argument("--results", type=Path, help="of the run; the choices are written beside it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no GPU: torch sees no CUDA device", file=sys.stderr)
        return 2
    warnings.simplefilter("default")
    device, family = torch.device("cuda", torch.cuda.current_device()), FAMILIES[options.model]
    pipe = models.pipeline_of(pipeline_components(family, torch.float16, device), device, torch.float16, False)
    path = options.results and options.results.with_name(f"{options.results.stem}-choices.json")
    export = Exporter(device, path)
    try:
        run(pipe, family.size, options.batch, options.seconds, export)
    except FastsdError as error:
        if "faults the GPU" not in str(error):
            raise
        print(error)
        return AGAIN
    finally:
        export.write()
    print("\n".join(summary(decide.gpu_of(device).table.entries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
