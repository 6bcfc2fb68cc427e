"""Every way of a call, run in a child process first: a kernel that faults the GPU takes the child with it, not us."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastsd.kernels.choice.op import GpuOp, Way, encoded
from fastsd.kernels.choice.table import entry_of

START = 120.0  # seconds that a child may take to start
ANSWER = 120.0  # seconds that a way may take there, with its compilation
IDLE = 20.0  # seconds without a request, after which the child ends: it holds memory of the GPU
DEATHS = 3  # of children by one candidate of an op, after which it is not tried any more
MODULE = "fastsd.kernels.choice.child"


class Prober:
    """Runs ways in child processes, one after the other; each child lives until a way ends it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.broken: str | None = None  # why no child can be started
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def faults(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> dict[str, str]:
        """Reasons by way, of those that ended a child."""
        with self._lock:
            found = self._faults(op, args, ways)
            if self._timer is not None:
                self._timer.cancel()
            if self._child is not None:
                self._timer = threading.Timer(IDLE, self.close)
                self._timer.daemon = True
                self._timer.start()
            return found

    def _faults(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> dict[str, str]:
        found: dict[str, str] = {}
        left = list(ways)
        while left and self.broken is None:
            weary = [way for way in left if self._deaths[op.name, way.candidate.name] >= DEATHS]
            found |= {way.label: f"it ended {DEATHS} processes" for way in weary}
            left = [way for way in left if way not in weary]
            if left:
                i, reason = self._run(op, args, left)
                if reason is None:
                    break
                self._deaths[op.name, left[i].candidate.name] += 1
                found[left[i].label] = reason
                left = left[i + 1 :]
        return found

    def _run(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> tuple[int, str | None]:
        """The position of the way that ended the child, and how; None if it lives."""
        if self._child is None and not self._start():
            return 0, None
        request = {
            "module": op.reference.__module__,
            "op": op.name,
            "args": encoded(args),
            "ways": [{"candidate": one.candidate, "launch": one.launch} for one in (entry_of(w, {}, {}) for w in ways)],
        }
        self._send(json.dumps(request))
        at: int | None = None
        while True:
            line = self._line(START if at is None else ANSWER)
            if isinstance(line, str) and line.startswith("about "):
                at = int(line.split()[1])
            elif line == "done":
                return 0, None
            else:
                ended = self._ended(
                    f"no answer in {ANSWER:.0f} s"
                    if isinstance(line, TimeoutError)
                    else line and line.removeprefix("lost ")
                )
                if at is None:  # before any way was run
                    self.broken = ended
                    return 0, None
                return at, ended

    def _start(self) -> bool:
        package = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(self.device)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
            )
        except OSError as error:
            self.broken = str(error)
            return False
        self._lines = queue.Queue()
        threading.Thread(target=_pass_on, args=(self._child, self._lines), daemon=True).start()
        if self._line(START) != "ready":
            self.broken = self._ended(None)
            return False
        return True

    def _send(self, line: str) -> None:
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it died; reading tells how

    def _line(self, seconds: float) -> str | None | TimeoutError:
        """A line of the child; None if it ended."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return TimeoutError()

    def _ended(self, reason: str | None) -> str:
        """End the child, and say how it ended."""
        child, self._child = self._child, None
        assert child is not None
        if reason is not None:
            child.kill()
        try:
            code = child.wait(timeout=10)
        except subprocess.TimeoutExpired:  # its end of the pipe is closed, yet it runs
            child.kill()
            code = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # what was not sent yet
        if reason is not None:
            return reason
        return f"it ended the process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._child is not None:
                self._ended("closed")


def _pass_on(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put the child's lines into a queue, and None at their end."""
    assert child.stdout is not None
    try:
        for line in child.stdout:
            lines.put(line.rstrip("\n"))
    except ValueError:
        pass  # the pipe was closed
    lines.put(None)
