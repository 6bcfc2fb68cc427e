"""The worker process: it alone holds models and the GPU, and may die without the server.

It takes one message at a time; between two steps of a batch it looks for those that stop it or want a preview, and
keeps the others, its next batch among them, for afterwards. Ctrl-C and SIGTERM, which a terminal or a service manager
sends to all processes, are left to the server: the worker ends when the pipe or the server does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.files import is_full
from fastsd.server import logs
from fastsd.server.jobs import (
    DISK_FULL,
    BatchDone,
    BatchFailed,
    Begun,
    Finished,
    LoadModel,
    ModelChoice,
    Order,
    RunBatch,
    Started,
    StepDone,
    StopBatch,
    Unload,
    UpscaleOrder,
    WantPreview,
)

NEWS_SECONDS = 0.1  # between two messages of steps; each costs both processes a tenth of a millisecond
PREVIEW_SHARE = 0.2  # of the time, at most, goes into previews that were asked for
LOG = logging.getLogger("fastsd.server")
LOST_DEVICE = 3  # exit code: CUDA reported an error after which the process can do nothing more


@dataclass(frozen=True)
class EngineSettings:
    """How the worker loads and runs.

    Attributes:
        options: of `Pipeline.from_pretrained`, the same for every model.
        lora_dir, embedding_dir: folders whose files prompts name, or None.
        keep: how many models stay in memory, if they fit.
        tiling: the autoencoder works in tiles; None: where the image is large.
    """

    options: dict[str, Any] = field(default_factory=dict)
    lora_dir: str | None = None
    embedding_dir: str | None = None
    keep: int = 1
    tiling: bool | None = None


class WorkerEngine(Protocol):
    """What generates."""

    def load(self, model: ModelChoice) -> None:
        """Have a model in memory."""
        ...

    def unload(self) -> None:
        """Forget all models."""
        ...

    def run(self, orders: tuple[Order, ...], size: int, watch: Watch) -> list[Finished]:
        """The images of each order; `watch.step` is called after every step, and ends the run if it says so."""
        ...

    def upscale(self, order: UpscaleOrder, watch: Watch) -> list[Finished]:
        """The image of the order, enlarged; `watch.step` is called after every tile."""
        ...

    def state(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Bytes of memory by their meaning, and the names of the models that are loaded."""
        ...

    def ran_out_of_memory(self, error: Exception) -> bool:
        """Whether an error says that memory ran out."""
        ...


@dataclass
class Watch:
    """One batch as the server steers it.

    Attributes:
        kept: messages that came while it ran and are not about it, in order.
        stopped: it was stopped and gives no images.
        ended: it was stopped and gives its images as they are.
    """

    connection: Connection
    batch: int
    kept: deque[Any]
    previews: tuple[float, ...] = ()
    stopped: bool = False
    ended: bool = False
    _wanted: bool = False
    _cost: float = 0.0
    _last: float = field(default=0.0)
    _made: int = 0
    _said: float = 0.0
    _has_message: Callable[[], bool] = field(init=False)

    def __post_init__(self) -> None:
        self._has_message = _poll_of(self.connection)

    def step(self, index: int, total: int, preview: Callable[[], Image.Image]) -> bool:
        """Tell the server of a step; returns whether the run should end here."""
        self.listen()
        image = None
        if not self.stopped and index < total and self._is_due(index, total):
            started = time.monotonic()
            image = preview()
            self._last = time.monotonic()
            self._cost, self._wanted = self._last - started, False
        now = time.monotonic()
        if image is not None or index in (1, total) or now - self._said >= NEWS_SECONDS:
            self.connection.send(StepDone(self.batch, index, total, image))
            self._said = now
        return self.stopped or self.ended

    def listen(self) -> None:
        """Take the messages that have come."""
        while self._has_message():
            self.kept.append(self.connection.recv())
        for _ in range(len(self.kept)):
            message = self.kept.popleft()
            if isinstance(message, StopBatch) and message.batch == self.batch:
                self.stopped, self.ended = not message.keep, message.keep
            elif isinstance(message, WantPreview) and message.batch == self.batch:
                self._wanted = True
            else:
                self.kept.append(message)

    def _is_due(self, index: int, total: int) -> bool:
        planned = [share for share in self.previews if index >= share * total]
        if len(planned) > self._made:
            self._made = len(planned)
            return True
        return self._wanted and time.monotonic() - self._last >= self._cost * (1 / PREVIEW_SHARE - 1)


def main(connection: Connection, make_engine: Callable[[Any], WorkerEngine], settings: Any) -> None:
    """Take messages until the pipe ends.

    Args:
        make_engine: makes the engine of `settings`, here, since models do not pass through pipes.
    """
    os.dup2(2, 1)  # standard output may be where the server speaks to an assistant
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, name="fastsd-server-watch", daemon=True).start()
    logs.set_up()
    engine, kept = make_engine(settings), deque[Any]()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(Started())
        while True:
            message = kept.popleft() if kept else connection.recv()
            if isinstance(message, LoadModel | RunBatch):
                connection.send(Begun(message.batch))
                _answer(connection, engine, message, kept)
            elif isinstance(message, Unload):
                engine.unload()


def _end_with_server() -> None:
    """End with a server that was killed, in the middle of a step too, which may take minutes."""
    server = multiprocessing.parent_process()
    if server is not None:  # None: a test runs this in its own process
        server.join()
        os._exit(0)


def _answer(connection: Connection, engine: WorkerEngine, message: LoadModel | RunBatch, kept: deque[Any]) -> None:
    """Do what a message asks, and send one answer."""
    try:
        outcomes: list[Finished] = []
        if isinstance(message, LoadModel):
            engine.load(message.model)
        else:
            watch = Watch(connection, message.batch, kept, message.orders[0].previews)
            watch.listen()
            if not watch.stopped:
                outcomes = _outcomes(engine, message, watch)
            outcomes = [] if watch.stopped else outcomes
        connection.send(BatchDone(message.batch, tuple(outcomes), *engine.state()))
    except FastsdError as error:
        connection.send(BatchFailed(message.batch, _portable(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        LOG.error("mistake in the worker", exc_info=error)
        short, why = None, DISK_FULL if is_full(error) else f"{type(error).__name__} in the worker; its log says more"
        if engine.ran_out_of_memory(error):
            short = FastsdError("not enough memory; ask for smaller or fewer images")
        connection.send(BatchFailed(message.batch, short, why))
        if short is None and "CUDA error" in str(error):  # which every later call would meet again
            os._exit(LOST_DEVICE)


def _poll_of(connection: Connection) -> Callable[[], bool]:
    """`connection.poll`, which prepares the system's call anew each time: too slow between steps of milliseconds."""
    if not hasattr(select, "poll"):  # Windows
        return connection.poll
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return lambda: bool(poller.poll(0))


def _outcomes(engine: WorkerEngine, message: RunBatch, watch: Watch) -> list[Finished]:
    """What the engine makes of a batch."""
    first = message.orders[0]
    if isinstance(first, UpscaleOrder):
        return engine.upscale(first, watch)
    return engine.run(tuple(order for order in message.orders if isinstance(order, Order)), message.size, watch)


def _portable(error: FastsdError) -> FastsdError:
    """The error as it passes through the pipe and to clients: values as texts, files by their names alone."""
    value = error.value if isinstance(error.value, str | int | float | None) else repr(error.value)
    path = None if error.path is None else Path(str(error.path)).name
    return FastsdError(error.message, argument=error.argument, value=value, path=path)
