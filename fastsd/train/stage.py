"""What a stage of training is: networks, batches, a loss, a sample grid. One loop trains them all."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from fastsd.model.tokenizer import Tokenizer
from fastsd.runtime.devices import cpu_has_bf16
from fastsd.train.images import RowOrder, Rows, TrainingImages
from fastsd.train.parts import Part, Workers
from fastsd.train.processes import Processes
from fastsd.train.settings import Fit, TrainingSettings

Batch = dict[str, Any]  # tensors and lists; a loss may add entries for the losses after it
Metrics = dict[str, float]


class Stopped(Exception):
    """Training was asked to end: its state is saved."""


@dataclass
class TrainingJob:
    """What the stages of a run share.

    Attributes:
        settings: the whole config. out: folder of the run.
        images: the training data.
        workers: threads, on which `Stage.prepare` may spread its work.
        report: prints a line and appends it to log.txt.
        modules: networks by name ("vae", "unet", "text_encoder"), those of finished stages with averaged weights.
        tokenizer: of the text encoder, once a stage has made or loaded it.
        stop: set when the run should end soon.
        processes: those that share the batch; only the main one writes files.
    """

    settings: TrainingSettings
    out: Path
    images: TrainingImages
    workers: Workers
    report: Callable[[str], None]
    device: torch.device
    modules: dict[str, nn.Module] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    processes: Processes = field(default_factory=Processes)

    def check_stop(self) -> None:
        """Raises Stopped where the run should end; for long preparations."""
        if self.stop.is_set():
            raise Stopped

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16; "auto" means where the processor supports it."""
        precision = self.settings.precision
        known = cpu_has_bf16() if self.device.type == "cpu" else torch.cuda.is_bf16_supported(False)
        return precision == "bf16" or (precision == "auto" and known)

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in bf16 where the config says so; weights, sums and the loss stay fp32.

        Where no gradient is taken, the CPU stays in fp32: its fused ops take weights of one dtype with the input.
        """
        trains = self.device.type != "cpu" or torch.is_grad_enabled()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 and trains)


class Stage(ABC):
    """One stage of a run. `docs/training.md` shows how to write one.

    The loop calls `build` once for all stages, then for each stage in turn: `prepare`, and in every step `batch` and
    one `loss` for each entry of `trained`, with a part of the batch at a time, on several threads at once.

    Attributes:
        name: of its table in the config, its checkpoint and its figures.
        table: the dataclass of its table; it has a field `fit`.
        stream: what its random numbers are keyed by.
        shardable: whether its networks may be divided over the processes: it trains one player, and the losses call
            whole networks.
        trained: the networks in training, by name, each with its own optimiser, in the order of their updates.
    """

    name: ClassVar[str]
    table: ClassVar[type]
    stream: ClassVar[str]
    shardable: ClassVar[bool] = False

    def __init__(self, settings: Any, job: TrainingJob):
        self.settings, self.job = settings, job
        self.fit: Fit = settings.fit
        self.trained: dict[str, nn.Module] = {}

    @property
    def sharded(self) -> bool:
        """Whether its networks are divided over the processes."""
        return self.shardable and self.job.settings.shard and self.job.processes.count > 1

    @abstractmethod
    def build(self) -> None:
        """Make or load the networks: set `trained`, and add to `job.modules`. Only parameters that require a gradient
        are trained, averaged and saved in checkpoints."""

    def prepare(self) -> None:  # noqa: B027
        """What takes long and is needed before the first step, such as encoding the images."""

    @abstractmethod
    def batch(self, part: Part) -> Batch:
        """The data of a part. All randomness comes from `part.random`."""

    @abstractmethod
    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """The scalar that the network `trained` should make small, a mean over the samples, and figures for the log.

        A scalar that does not depend on the network leaves it as it is in this step.
        """

    def rows(self, part: Part) -> Rows:
        """The images of a part, in epochs or with replacement as the config says; others for the validation."""
        return self.order.rows(part)

    @cached_property
    def order(self) -> RowOrder:
        """The order of the images, or with `data.passes` above 1 of their encoded copies where those are trained on."""
        return RowOrder(
            self.job.images.groups(),
            self.job.settings.seed,
            self.fit.validate_share,
            self.job.settings.data.replacement,
            self.copies,
        )

    @property
    def copies(self) -> int:
        """How many copies of every image the rows stand for, one set after another."""
        return 1

    def grid(self) -> Image.Image | None:
        """An image that shows how far training is; the networks have their averaged weights. None: nothing to show."""
        return None

    def finish(self) -> None:  # noqa: B027
        """Called once the stage is trained; the networks have their averaged weights."""

    def export(self, folder: Path) -> bool:
        """Write the finished model to an empty folder; returns whether the stage has one to write."""
        return False

    def exported(self, folder: Path) -> bool:
        """Whether `folder` holds what `export` writes and nothing else, so that it may be replaced."""
        return (folder / "model_index.json").is_file()
