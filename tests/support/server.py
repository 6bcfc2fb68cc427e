"""A server without a model, and one in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.testclient import TestClient

from fastsd.errors import FastsdError
from fastsd.server.app import make_app
from fastsd.server.jobs import Finished, ModelChoice, Order
from fastsd.server.queue import GenerationQueue
from fastsd.server.settings import ServerSettings
from fastsd.server.worker import Watch

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class EmptySettings:
    """How long the empty model takes."""

    seconds: float = 0.0  # a step
    steps: int = 3


class EmptyEngine:
    """Images of one colour, which their seed says. Some prompts make it misbehave."""

    def __init__(self, settings: EmptySettings):
        self.settings, self.loaded = settings, list[str]()

    def load(self, model: ModelChoice) -> None:
        if model.name == "broken":
            raise FastsdError("it is damaged", argument="model", path="/secret/folder/broken.safetensors")
        if model.name == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        self.loaded = [model.name]

    def unload(self) -> None:
        self.loaded = []

    def state(self) -> tuple[dict[str, int], tuple[str, ...]]:
        return {"free": 1}, tuple(self.loaded)

    def ran_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def run(self, orders: tuple[Order, ...], size: int, watch: Watch) -> list[Finished]:
        prompt = orders[0].arguments["prompt"]
        self.load(orders[0].model)
        if prompt == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if prompt == "mistake":
            raise ZeroDivisionError("division by zero")
        if prompt == "bad":
            raise FastsdError("it should be good", argument="prompt", value=prompt)
        steps = orders[0].arguments.get("num_inference_steps") or self.settings.steps
        done = 0
        for step in range(1, steps + 1):
            time.sleep(self.settings.seconds)
            done = step
            if watch.step(step, steps, lambda: Image.new("RGB", (4, 4))):
                break
        return [finished(order, len(orders), done) for order in orders]


def finished(order: Order, together: int, steps: int) -> Finished:
    """What the empty model makes of an order; the notes say how many ran together and for how many steps."""
    seeds = [(order.arguments.get("seed") or 0) + k for k in range(order.count)]
    size = (order.arguments.get("width") or 8, order.arguments.get("height") or 8)
    images = [Image.new("RGB", size, colour(seed)) for seed in seeds]
    shared = {name: value for name, value in order.arguments.items() if isinstance(value, str | int | float)}
    shared |= {"model": order.model.name, "width": size[0], "height": size[1], "version": "0"}
    settings = [shared | {"seed": seed} for seed in seeds]
    return Finished(images, settings, [f"together {together}", f"steps {steps}"], {"total": 0.1})


def colour(seed: int) -> tuple[int, int, int]:
    """Of the image with this seed."""
    return seed % 256, seed // 256 % 256, 7


def empty_engine(settings: EmptySettings) -> EmptyEngine:
    return EmptyEngine(settings)


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


def png(size: tuple[int, int] = (64, 64), colour: object = (9, 8, 7), mode: str = "RGB") -> str:
    """An image of one colour, as base64."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")  # type: ignore[arg-type]
    return base64.b64encode(buffer.getvalue()).decode()


def opened(encoded: str) -> Image.Image:
    """An image that the server sent as base64."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image
