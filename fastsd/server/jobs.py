"""What the server and its worker process say to each other, and a request on its way through the queue.

Everything here is pickled or waits in the queue; nothing imports torch, so that the server's own process stays small.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.generate.together import count_of, shape_of


@dataclass(frozen=True)
class ModelChoice:
    """What is loaded for an order, as paths of files that the server listed or was started with.

    Attributes:
        name: as clients know it.
        path: of the checkpoint; None: the bundled one.
        refiner: the path of the model that does the last steps, or None.
    """

    name: str
    path: str | None = None
    refiner: str | None = None


@dataclass(frozen=True)
class ControlChoice:
    """A ControlNet of an order: its file, its image, and its numbers by the names of `fastsd.Control`.

    map_kind: which map was made of the image that was sent, by its name in `MAPS`; None: it came as a map.
    """

    name: str
    path: str
    image: Image.Image
    parts: dict[str, float]
    map_kind: str | None = None


@dataclass(frozen=True)
class UpscalerChoice:
    """An ESRGAN of an order: its name, as clients know it, and its file."""

    name: str
    path: str


@dataclass(frozen=True)
class ImagePromptChoice:
    """An IP-Adapter of an order: its file, the image that it reads, its scale and its mask."""

    name: str
    path: str
    image: Image.Image
    scale: float
    mask: Image.Image | None = None


@dataclass(frozen=True)
class Order:
    """Images that a client asks for, checked as far as that needs no model.

    Attributes:
        model: what generates them.
        arguments: of `fastsd.Pipeline.__call__`; one prompt, `num_images_per_prompt` images.
        controls: ControlNets, in order.
        image_prompts: IP-Adapters, in order.
        api: the API through which it came; orders of different APIs do not share a batch, so that an interrupt of one
            ends no work of another.
        loras: (name, strength, strength of the text) of the prompt's tags.
        upscaler: what enlarges between the passes of the hires fix; None: what the arguments say.
        previews: the shares of the steps after which a preview is made without being asked for.
        facts: what the images' files say besides the arguments: the names and hashes of images that were sent.
    """

    model: ModelChoice
    arguments: dict[str, Any]
    controls: tuple[ControlChoice, ...] = ()
    api: str = ""
    loras: tuple[tuple[str, float, float], ...] = ()
    previews: tuple[float, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict, hash=False)
    upscaler: UpscalerChoice | None = None
    image_prompts: tuple[ImagePromptChoice, ...] = ()

    @property
    def count(self) -> int:
        """How many images."""
        return count_of(self.arguments)

    @property
    def key(self) -> tuple[Any, ...] | None:
        """Orders with equal keys may share a batch; None: it runs alone."""
        shape = shape_of(self.arguments)
        if shape is None or self.controls or self.image_prompts or self.previews:
            return None
        return (self.model, self.api, self.loras, self.upscaler, shape)


@dataclass(frozen=True)
class UpscaleOrder:
    """An image to enlarge by an ESRGAN. It runs alone, and its steps are the network's tiles.

    Attributes:
        image: RGB or RGBA.
        size: (width, height) of the result.
        pixels: the most that any image on the way to it may have.
    """

    upscaler: UpscalerChoice
    image: Image.Image
    size: tuple[int, int]
    pixels: int
    api: str = ""
    count: ClassVar[int] = 1
    key: ClassVar[None] = None
    previews: ClassVar[tuple[float, ...]] = ()
    arguments: ClassVar[dict[str, Any]] = {}


AnyOrder = Order | UpscaleOrder


# From the server to the worker.


@dataclass(frozen=True)
class LoadModel:
    """Load a model, or say that it is loaded."""

    batch: int
    model: ModelChoice


@dataclass(frozen=True)
class RunBatch:
    """Generate the images of these orders, which have one key, together; or do the one that runs alone."""

    batch: int
    orders: tuple[AnyOrder, ...]
    size: int  # images that run together at most


@dataclass(frozen=True)
class StopBatch:
    """End a batch after its current step: its images as they are then, or none."""

    batch: int
    keep: bool


@dataclass(frozen=True)
class WantPreview:
    """Make a preview after the next step."""

    batch: int


@dataclass(frozen=True)
class Unload:
    """Forget every model that is loaded."""


# From the worker to the server.


@dataclass(frozen=True)
class Started:
    """The worker takes orders."""


@dataclass(frozen=True)
class Begun:
    """The worker has a batch. One that it died without beginning is given to the next worker."""

    batch: int


@dataclass(frozen=True)
class StepDone:
    """Steps of a batch have ended, `index` by now. `preview`: of the batch's first image, if one was wanted."""

    batch: int
    index: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """The images of one order.

    Attributes:
        settings: of each image, what its file stores (`fastsd.image.metadata.write_texts`).
        timings: of the batch that they were generated in, in seconds.
    """

    images: list[Image.Image]
    settings: list[dict[str, Any]]
    notes: list[str]
    timings: dict[str, float]


@dataclass(frozen=True)
class BatchDone:
    """All orders of a batch, in order; empty where it was stopped or a model was loaded."""

    batch: int
    outcomes: tuple[Finished, ...]
    memory: dict[str, int] = field(default_factory=dict)  # bytes of the GPU, or of the process, by their meaning
    loaded: tuple[str, ...] = ()  # names of the models in memory


@dataclass(frozen=True)
class BatchFailed:
    """A batch that gave no images: an error of its input, or of the program (None; the worker's log has it)."""

    batch: int
    error: FastsdError | None
    reason: str = ""


DISK_FULL = "the disk of the server is full"


class JobError(Exception):
    """Why a job gives no images, in words for the client."""


class QueueFull(JobError):
    """More jobs wait than the queue holds. `seconds`: when to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class ShuttingDown(JobError):
    """The server stops."""


class Cancelled(JobError):
    """Its client left, or asked for that."""


class WorkerFailed(JobError):
    """The worker process died, or met an error that is not the client's."""


_numbers = itertools.count(1)


@dataclass(eq=False)
class Job:
    """One order in the queue or at the worker.

    Attributes:
        id: unguessable: who knows it may watch and cancel the job.
        state: waiting, running or done.
        index, total: steps, as the worker counts them.
        preview: the latest, with its number.
        planned: every preview of an order that has asked for some (`Order.previews`).
        changed: set whenever one of these changes; whoever waits for it clears it.
    """

    order: AnyOrder
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = field(default_factory=lambda: next(_numbers))
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    state: str = "waiting"
    index: int = 0
    total: int = 0
    preview: Image.Image | None = None
    previews: int = 0
    planned: list[Image.Image] = field(default_factory=list)
    interrupted: bool = False
    result: asyncio.Future[Finished] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def finish(self, outcome: Finished | JobError | FastsdError) -> None:
        """Give the job its one answer; a second is ignored."""
        self.state = "done"
        if not self.result.done():
            if isinstance(outcome, Finished):
                self.result.set_result(outcome)
            else:
                self.result.set_exception(outcome)
                self.result.exception()  # nobody may be left to read it
        self.changed.set()

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.index / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None before the first step."""
        if self.started is None or not self.index:
            return None
        return (time.monotonic() - self.started) / self.index * (self.total - self.index)
