"""A batch on its way to the worker and back: what the server knows of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from fastsd.errors import FastsdError
from fastsd.server.jobs import BatchDone, Job, JobError, ModelChoice, StepDone


@dataclass(eq=False)
class WorkerBatch:
    """Jobs that the worker has, or a model that it loads.

    Attributes:
        answered: the worker's answer; None: the jobs have theirs already, or wait again.
        begun: the worker works at it. One that it has ahead is not begun.
        started: when it began, in seconds of `time.monotonic`.
        steps: that it has done, as the worker said last.
    """

    number: int
    jobs: list[Job]
    model: ModelChoice | None = None
    begun: bool = False
    answered: asyncio.Future[BatchDone | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    started: float = field(default_factory=time.monotonic)
    steps: int = 0

    @property
    def left(self) -> list[Job]:
        """The jobs that still have a client."""
        return [job for job in self.jobs if job.state != "done"]

    def start(self) -> None:
        """Its jobs run from now on."""
        self.started = time.monotonic()
        for job in self.left:
            job.state, job.started, job.index, job.total = "running", self.started, 0, 0
            job.changed.set()

    def note(self, step: StepDone) -> int:
        """A step of it has ended; returns how many have since the last message of that."""
        new, self.steps = step.index - self.steps, step.index
        for job in self.jobs:
            job.index, job.total = step.index, step.total
            if step.preview is not None:
                job.preview, job.previews = step.preview, job.previews + 1
                if job.order.previews:
                    job.planned.append(step.preview)
            job.changed.set()
        return new

    def take_back(self) -> list[Job]:
        """End it without an answer to its jobs, which wait again."""
        jobs, self.jobs = self.left, []
        for job in jobs:
            job.state = "waiting"
        if not self.answered.done():
            self.answered.set_result(None)
        return jobs

    def fail(self, error: FastsdError | JobError) -> None:
        """End it with an error for each job, unless it has its answer."""
        if self.answered.done():
            return
        for job in self.jobs:
            job.finish(error)
        if self.model is not None:
            self.answered.set_exception(error)
        else:
            self.answered.set_result(None)
