"""The figures of a run: metrics.jsonl, TensorBoard events, a progress bar, lines in log.txt."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fastsd.files import write_whole
from fastsd.train.settings import Fit
from fastsd.train.stage import Stage

LINE_EVERY = 50  # steps


class Training(Protocol):
    """What the figures are of: see `loop.Trainer`."""

    stage: Stage
    fit: Fit
    step: int
    minutes: float
    finished: bool


class RunningMeans:
    """Means of the metrics over the steps since the last `take`."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> str:
        line = "  ".join(f"{name} {total / self._counts[name]:.4g}" for name, total in self._totals.items())
        self._totals, self._counts = {}, {}
        return line


class Figures:
    """Where the figures of a stage go, step by step. Use it in a `with` statement.

    metrics.jsonl has a line for every step: stage, step, minutes, and what the loss returned. A resumed run takes away
    the lines after its checkpoint first, so the file is that of an uninterrupted run.
    """

    def __init__(self, out: Path, trainer: Training, report: Callable[[str], None]):
        self.out, self.trainer, self.report, self.name = out, trainer, report, trainer.stage.name
        self.means = RunningMeans()
        self.started, self.first = time.monotonic(), trainer.step
        self._bar: Any = None
        self._events: Any = None

    def __enter__(self) -> Figures:
        path = self.out / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["stage"] != self.name or line["step"] <= self.trainer.step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode(), overwrite=True)
        self._file = open(path, "a", encoding="utf-8", buffering=1)
        self._events = _open_events(self.out / "events", self.trainer.step, self.report)
        if sys.stderr.isatty():
            steps = self.trainer.fit.steps
            self._bar = tqdm(total=steps, initial=self.trainer.step, desc=self.name, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.close()

    def add(self, metrics: dict[str, float]) -> None:
        """Take the figures of the step that `trainer` has just finished."""
        trainer, step = self.trainer, self.trainer.step
        line: dict[str, Any] = {"stage": self.name, "step": step, "minutes": round(trainer.minutes, 4)}
        line |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self.means.add(metrics)
        speed = trainer.fit.batch_size * (step - self.first) / max(time.monotonic() - self.started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {_main(metrics):.4f}, {speed:.0f} images/s", refresh=False)
            self._bar.update(1)
        due = step % LINE_EVERY == 0 or trainer.finished
        if self._events is not None and (due or any(name.startswith("val_") for name in metrics)):
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._events.add_scalar(f"{self.name}/{name}", value, step)
        if due:
            left = (trainer.fit.steps - step) * trainer.fit.batch_size / max(speed, 1e-9) / 60
            rest = "" if trainer.finished else f", {left:.0f} min left"
            progress = f"{self.name} {step}/{trainer.fit.steps}  {trainer.minutes:.1f} min"
            self.report(f"{progress}  {speed:.1f} images/s{rest}  {self.means.take()}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line that a kill has cut is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _main(metrics: dict[str, float]) -> float:
    """The figure for the progress bar: "loss", or the first after the rate."""
    return metrics.get("loss", next(value for name, value in metrics.items() if name != "rate"))


def _open_events(folder: Path, step: int, report: Callable[[str], None]) -> Any:
    """TensorBoard's writer, or None where its package is missing, which is said."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        report("no TensorBoard events, the package is missing: pip install 'fastsd[train]'")
        return None
    return SummaryWriter(logdir=str(folder), purge_step=step + 1 if step else None)
