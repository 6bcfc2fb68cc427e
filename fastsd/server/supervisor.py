"""The worker process kept alive: started, spoken to, and replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from fastsd.server import worker
from fastsd.server.jobs import BatchDone, Started

FIRST_WAIT, LONGEST_WAIT = (
    0.1,
    30.0,
)  # seconds before a worker that died is replaced; they double until one has done something
LOG = logging.getLogger("fastsd.server")


@dataclass(eq=False)
class _Child:
    process: BaseProcess
    connection: Connection
    started: bool = False


class Supervisor:
    """One worker at a time.

    Args:
        make_engine, settings: of `fastsd.server.worker.main`; a function at the top of a module.
        deliver: takes each message of the worker, in the event loop.
        died: takes the reason when a worker has died, in the event loop.

    Attributes:
        restarts: how often a worker that died was replaced.
    """

    def __init__(
        self,
        make_engine: Callable[[Any], worker.WorkerEngine],
        settings: Any,
        deliver: Callable[[Any], None],
        died: Callable[[str], None],
    ):
        self._make_engine, self._settings = make_engine, settings
        self._deliver, self._died = deliver, died
        self._child: _Child | None = None
        self._stopping = False
        self._wait = FIRST_WAIT
        self._restart: asyncio.TimerHandle | None = None
        self._send_lock = threading.Lock()
        self._turn = asyncio.Lock()
        self.restarts = 0

    @property
    def started(self) -> bool:
        """The worker takes messages."""
        return self._child is not None and self._child.started

    @property
    def pid(self) -> int | None:
        """Of the worker process."""
        return self._child.process.pid if self._child is not None else None

    def start(self) -> None:
        """Start a worker; `deliver` is called with `Started` when it takes messages."""
        self._restart = None
        context = multiprocessing.get_context("spawn")  # a fork would share the locks of threads, and CUDA cannot fork
        ours, theirs = context.Pipe()
        process = context.Process(
            target=worker.main, args=(theirs, self._make_engine, self._settings), name="fastsd-worker", daemon=True
        )
        process.start()
        theirs.close()
        self._child = _Child(process, ours)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop, self._child), name="fastsd-reader", daemon=True).start()

    async def send(self, message: Any) -> bool:
        """Send a message, after those of earlier calls; False: there is no worker now. One that has just died is
        reported by `died`, afterwards."""
        async with self._turn:
            if self._child is None:
                return False
            await asyncio.to_thread(self._send, self._child.connection, message)
            return True

    def _send(self, connection: Connection, message: Any) -> None:
        with self._send_lock, contextlib.suppress(OSError, ValueError):
            connection.send(message)

    def kill(self) -> None:
        """End the worker at once; unless `stop` was called, another one starts."""
        if self._child is not None:
            self._child.process.kill()

    async def stop(self) -> None:
        """End the worker for good: it sees the end of the pipe, or is killed."""
        self._stopping = True
        if self._restart is not None:
            self._restart.cancel()
        child, self._child = self._child, None
        if child is not None:
            await asyncio.to_thread(self._end, child)

    @staticmethod
    def _end(child: _Child) -> None:
        child.process.kill()  # models hold nothing that has to be saved
        child.process.join()
        child.connection.close()

    def _read(self, loop: asyncio.AbstractEventLoop, child: _Child) -> None:
        """The reader's thread: every message of one worker, then its end."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = child.connection.recv()
                loop.call_soon_threadsafe(self._take, child, message)
        child.process.join()
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(self._ended, child)

    def _take(self, child: _Child, message: Any) -> None:
        if child is not self._child:
            return
        if isinstance(message, Started):
            child.started = True
        elif isinstance(message, BatchDone):
            self._wait = FIRST_WAIT
        self._deliver(message)

    def _ended(self, child: _Child) -> None:
        if self._stopping or child is not self._child:
            return
        self._child = None
        child.connection.close()
        reason = f"the worker process {_ending(child.process.exitcode)}"
        self.restarts += 1
        wait, self._wait = self._wait, min(2 * self._wait, LONGEST_WAIT)
        LOG.error("worker died", extra={"reason": reason, "restart_in": wait})
        self._restart = asyncio.get_running_loop().call_later(wait, self.start)
        self._died(reason)


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code == worker.LOST_DEVICE:
        return "lost the GPU"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"was killed ({name}{', as the system does when memory runs out' if name == 'SIGKILL' else ''})"
    return f"ended with code {code}"
