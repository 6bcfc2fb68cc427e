"""A server without a model, and one in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from starlette.testclient import TestClient

from fastsd.server.app import make_app
from fastsd.server.http import HttpServer, listen
from fastsd.server.jobs import ModelChoice, Order
from fastsd.server.queue import GenerationQueue
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import EmptySettings, empty_engine

ROOT = Path(__file__).parent.parent.parent


def order(prompt: str = "a cat", seed: int = 1, model: str = "one", api: str = "", **arguments: Any) -> Order:
    return Order(ModelChoice(model), {"prompt": prompt, "seed": seed, **arguments}, api=api)


def with_queue(scenario: Callable[[GenerationQueue], Awaitable[None]], seconds: float = 0.0, **options: Any) -> None:
    """Run a scenario with a queue whose worker takes so many seconds a step, and end it within a minute."""

    async def run() -> None:
        queue = GenerationQueue(empty_engine, EmptySettings(seconds), **options)
        await queue.start(ModelChoice("one"))
        try:
            await asyncio.wait_for(scenario(queue), 60)
        finally:
            await queue.stop()

    asyncio.run(run())


@dataclass
class Served:
    """A running `fastsd serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1].rstrip("/"))


@contextlib.contextmanager
def served(log: Path, *flags: object, **environment: str) -> Iterator[Served]:
    """`fastsd serve` at a port that is free, until the context ends."""
    command = [sys.executable, "-m", "fastsd", "serve", "--port", "0", *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=log.parent, env=env, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://\S+", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield Served(process, found[0], log)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def called(settings: ServerSettings, seconds: float = 0.0) -> Iterator[TestClient]:
    """A client of a server whose worker has an empty model and is ready."""
    app = make_app(settings, empty_engine, EmptySettings(seconds))
    with TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False) as client:
        deadline = time.monotonic() + 60
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield client


@contextlib.contextmanager
def listening(settings: ServerSettings, seconds: float = 0.0, auth: tuple[str, str] | None = None) -> Iterator[int]:
    """A server with an empty model in a thread, at a port, which it gives, and ready."""
    opened = listen("127.0.0.1", 0)
    app = make_app(settings, empty_engine, EmptySettings(seconds))
    server = HttpServer(app, lambda: None, 1)
    thread = threading.Thread(target=lambda: server.run([opened]))
    thread.start()
    port = opened.getsockname()[1]
    try:
        while httpx.get(f"http://localhost:{port}/ready", auth=auth).status_code != 200:
            time.sleep(0.02)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


def walk(routes: list[Any]) -> Iterator[Any]:
    """Every route of an application; newer versions of FastAPI keep included routers as they are."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from (walk(inner.routes) if inner is not None else (route,))


def png(size: tuple[int, int] = (64, 64), colour: object = (9, 8, 7), mode: str = "RGB") -> str:
    """An image of one colour, as base64."""
    return encoded(Image.new(mode, size, colour))  # type: ignore[arg-type]


def encoded(image: Image.Image) -> str:
    """An image as a PNG file, as base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(sent: str) -> Image.Image:
    """An image that the server sent as base64."""
    image = Image.open(io.BytesIO(base64.b64decode(sent)))
    image.load()
    return image
