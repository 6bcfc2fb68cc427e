"""uvicorn with a bound on slow headers, and with an end that answers what still runs."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastsd.errors import FastsdError
from fastsd.files import reason

HEADER_SECONDS = 10.0  # in which the headers of a request must have arrived
HEADER_BYTES = 2**15


class PatientProtocol(H11Protocol):
    """Closes a connection whose headers do not arrive: otherwise a few clients that send a byte a minute take all."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._idle and self._timer is None:
            self._wait_for_headers()
        super().data_received(data)
        if not self._idle:
            self._forget_timer()

    @property
    def _idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._idle and not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves until a signal comes, and then calls `drain` while what runs may still end.

    A second signal ends it at once.
    """

    def __init__(self, app: Any, drain: Callable[[], None], seconds: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=PatientProtocol,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(seconds) + 5,
                h11_max_incomplete_event_size=HEADER_BYTES,
                backlog=512,
            )
        )
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """As uvicorn, but a signal that ended the server in good order is not raised again: the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        self._loop = asyncio.get_running_loop()
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        FastsdError: the port is taken, or the address is not this machine's.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only where the protocol is named. Without it the body of an answer waits until the
        # client has acknowledged the headers, which takes 40 ms on a connection that is used again.
        opened = socket.socket(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise FastsdError(f"no such address ({error.strerror or error})", argument="--host", value=host) from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(512)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        raise FastsdError(
            f"{reason(error)}; another --port, or 0 for any that is free", argument="--port", value=port
        ) from None
    return opened
