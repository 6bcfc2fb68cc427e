"""Every way of a call, run in a child process first: a kernel that faults the GPU takes the child with it, not us."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
KILLS = (
    "SIGKILL",
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
)  # signals that somebody else sends: the kernel, out of memory; a user


@dataclass(frozen=True)
class ProbeFault:
    """How a way ended its child; `lasting`: by what it did, and not by what may have come from elsewhere."""

    reason: str
    lasting: bool = True


class Prober:
    """Runs ways in child processes, one after the other; each child lives until a way ends it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.broken: str | None = None  # why no child can be started
        self._child: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: deque[str] = deque(maxlen=2)  # the end of what the child wrote to stderr, in parts
        self._reader: threading.Thread | None = None
        self._deaths: defaultdict[tuple[str, str], list[ProbeFault]] = defaultdict(list)
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def faults(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> dict[str, ProbeFault]:
        """The faults of the ways that ended a child."""
        with self._lock:
            found = self._faults(op, args, ways)
            if self._timer is not None:
                self._timer.cancel()
            if self._child is not None:
                self._timer = threading.Timer(IDLE, self.close)
                self._timer.daemon = True
                self._timer.start()
            return found

    def _faults(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> dict[str, ProbeFault]:
        found: dict[str, ProbeFault] = {}
        left = list(ways)
        while left and self.broken is None:
            for way in left:
                deaths = self._deaths[op.name, way.candidate.name]
                if len(deaths) >= DEATHS:
                    found[way.label] = ProbeFault(f"it ended {DEATHS} processes", all(one.lasting for one in deaths))
            left = [way for way in left if way.label not in found]
            if left:
                i, fault = self._run(op, args, left)
                if fault is None:
                    break
                self._deaths[op.name, left[i].candidate.name].append(fault)
                found[left[i].label] = fault
                left = left[i + 1 :]
        return found

    def _run(self, op: GpuOp, args: Sequence[Any], ways: Sequence[Way]) -> tuple[int, ProbeFault | None]:
        """The position of the way that ended the child, and how; None if it lives."""
        if self._child is None and not self._start():
            return 0, None
        request = {
            "module": op.reference.__module__,
            "op": op.name,
            "args": encoded(args),
            "ways": [
                {"candidate": one.candidate, "launch": one.launch} for one in (entry_of(w, {}, {}, {}) for w in ways)
            ],
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
                if isinstance(line, TimeoutError):
                    ended = self._ended(ProbeFault(f"no answer in {ANSWER:.0f} s", lasting=False))
                else:
                    ended = self._ended(None if line is None else ProbeFault(line.removeprefix("lost ")))
                if at is None:  # before any way was run
                    self.broken = ended.reason
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
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                text=True,
                errors="replace",
            )
        except OSError as error:
            self.broken = str(error)
            return False
        self._lines = queue.Queue()
        self._said.clear()
        threading.Thread(target=_pass_on, args=(self._child, self._lines), daemon=True).start()
        self._reader = threading.Thread(target=_keep_end, args=(self._child, self._said), daemon=True)
        self._reader.start()
        if self._line(START) != "ready":
            self.broken = self._ended(None).reason
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

    def _ended(self, fault: ProbeFault | None) -> ProbeFault:
        """End the child, and say how it ended, with the last line that it wrote."""
        child, self._child = self._child, None
        assert child is not None
        if fault is not None:
            child.kill()
        try:
            code = child.wait(timeout=10)
        except subprocess.TimeoutExpired:  # its end of the pipe is closed, yet it runs
            child.kill()
            code = child.wait()
        if self._reader is not None:
            self._reader.join(timeout=2)  # what the child started may still hold its end
        for pipe in (child.stdin, child.stdout, *(() if self._reader and self._reader.is_alive() else (child.stderr,))):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # what was not sent yet
        if fault is None:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            fault = ProbeFault(f"it ended the process ({name})", lasting=name not in KILLS)
        elif fault.lasting:  # it said itself what is wrong
            return fault
        last = "".join(self._said).strip().splitlines()[-1:]
        return ProbeFault(": ".join([fault.reason, *(line.strip()[:200] for line in last)]), fault.lasting)

    def close(self) -> None:
        """End the child."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._child is not None:
                self._ended(ProbeFault("closed"))


def _keep_end(child: subprocess.Popen[str], said: deque[str]) -> None:
    """Keep the end of what the child writes to stderr."""
    assert child.stderr is not None
    try:
        for part in iter(partial(child.stderr.read, 4096), ""):
            said.append(part)
    except ValueError:
        pass  # the pipe was closed


def _pass_on(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Put the child's lines into a queue, and None at their end."""
    assert child.stdout is not None
    try:
        for line in child.stdout:
            lines.put(line.rstrip("\n"))
    except ValueError:
        pass  # the pipe was closed
    lines.put(None)
