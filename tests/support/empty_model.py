"""A model that is none, for tests of the server. Worker processes import this module alone, which is light."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from dataclasses import dataclass

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.server.jobs import Finished, ModelChoice, Order, UpscaleOrder
from fastsd.server.worker import Watch


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

    def upscale(self, order: UpscaleOrder, watch: Watch) -> list[Finished]:
        watch.step(1, 1, lambda: order.image)
        return [Finished([order.image.resize(order.size)], [{}], [f"by {order.upscaler.name}"], {"total": 0.1})]

    def run(self, orders: tuple[Order, ...], size: int, watch: Watch) -> list[Finished]:
        prompt = orders[0].arguments["prompt"]
        self.load(orders[0].model)
        if prompt == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if prompt == "mistake":
            raise ZeroDivisionError("division by zero")
        if prompt == "warn":
            logging.getLogger("fastsd.kernels").warning("a kernel is slow", extra={"kernel": "linear"})
        if prompt == "full":
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/folder/cache")
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
