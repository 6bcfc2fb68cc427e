"""The queue: bounded, in order, with jobs of one shape run together, and an answer for each job, exactly one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from fastsd.errors import FastsdError
from fastsd.server.batches import WorkerBatch
from fastsd.server.gathering import Gathering
from fastsd.server.jobs import (
    AnyOrder,
    BatchDone,
    BatchFailed,
    Begun,
    Cancelled,
    Job,
    JobError,
    LoadModel,
    ModelChoice,
    QueueFull,
    RunBatch,
    ShuttingDown,
    Started,
    StepDone,
    StopBatch,
    Unload,
    WantPreview,
    WorkerFailed,
)
from fastsd.server.metrics import Metrics
from fastsd.server.supervisor import Supervisor
from fastsd.server.worker import WorkerEngine

LOG = logging.getLogger("fastsd.server")


class GenerationQueue:
    """Jobs wait here for the one worker.

    While a batch runs, the worker is sent the next one ahead if that is full, and begins it before the results of the
    first are encoded and delivered. A batch with room waits here, since more jobs may come that fit into it.

    Args:
        make_engine, settings: of the worker, see `fastsd.server.worker.main`.
        size: how many jobs may wait.
        max_batch: how many images run together.

    Attributes:
        loaded: the names of the models that the worker has in memory.
        loading: the model that it loads now, or None.
        ready: the worker has loaded a model.
        model: what a new worker loads at once; None: nothing.
        first_load: ends when the first worker has loaded it, or could not.
    """

    def __init__(
        self,
        make_engine: Callable[[Any], WorkerEngine],
        settings: Any,
        size: int = 32,
        max_batch: int = 8,
        metrics: Metrics | None = None,
    ):
        self.size, self.max_batch = size, max_batch
        self.metrics = Metrics() if metrics is None else metrics
        self.supervisor = Supervisor(make_engine, settings, self._deliver, self._died)
        self.loaded: tuple[str, ...] = ()
        self.ready = False
        self.draining = False
        self._waiting: list[Job] = []
        self._loads: list[tuple[ModelChoice, asyncio.Future[None]]] = []
        self._running: WorkerBatch | None = None
        self._ahead: WorkerBatch | None = None  # what the worker begins when the running batch has ended
        self._wake = asyncio.Event()
        self._numbers = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._seconds = 1.0  # of a job, on average
        self._gathering = Gathering()

    # What the rest of the server calls.

    async def start(self, first: ModelChoice | None = None) -> None:
        """Start the worker and the loop; `first` is loaded at once."""
        self.model = first
        self.first_load: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.supervisor.start()
        self._task = asyncio.create_task(self._work())

    def submit(self, order: AnyOrder, number: str | None = None) -> Job:
        """A new job at the end of the queue.

        Args:
            number: its id; None: an unguessable one.

        Raises:
            QueueFull, ShuttingDown, FastsdError: it was not taken.
        """
        self.check_room()
        if number is not None and self.find(number) is not None:
            raise FastsdError("another job has this id now", argument="force_task_id", value=number)
        job = Job(order) if number is None else Job(order, number)
        self._waiting.append(job)
        self._changed()
        return job

    def check_room(self) -> None:
        """Raises as `submit` would now."""
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        if len(self.waiting) >= self.size:
            self.metrics.refused.inc()
            raise QueueFull(max(math.ceil(self._seconds * len(self.waiting)), 1))

    def cancel(self, job: Job, why: JobError | None = None) -> None:
        """The job's client left: it gives its place free at once, and the worker stops if no other job shares its
        batch.

        Args:
            why: what the job is answered; None: that it was cancelled.
        """
        if job.state == "done":
            return
        job.finish(why or Cancelled("cancelled"))
        if job in self._waiting:
            self._waiting.remove(job)
        for batch in self._batches:
            if job in batch.jobs and not batch.left:
                self._tell(StopBatch(batch.number, keep=False))
        self._changed()

    def interrupt(self, api: str) -> bool:
        """End the running batch after its step, its images as they are then, if it came through this API."""
        running = self._running
        if running is None or not running.jobs or running.jobs[0].order.api != api:
            return False
        for job in running.jobs:
            job.interrupted = True
        self._tell(StopBatch(running.number, keep=True))
        return True

    def want_preview(self, job: Job) -> None:
        """Ask for a preview of the batch that the job is in."""
        if self._running is not None and job in self._running.jobs:
            self._tell(WantPreview(self._running.number))

    async def load(self, model: ModelChoice) -> None:
        """Load a model when the running batch has ended; returns when it is loaded.

        Raises:
            FastsdError, JobError: it cannot be loaded.
        """
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loads.append((model, done))
        self._wake.set()
        await done

    async def unload(self) -> bool:
        """Free the memory of all models; False: one is in use."""
        if self._running is not None:
            return False
        await self.supervisor.send(Unload())
        self.loaded = ()
        return True

    @property
    def waiting(self) -> tuple[Job, ...]:
        """In the order in which they run."""
        return (*(self._ahead.left if self._ahead else ()), *self._waiting)

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs that the worker works at and that still have a client."""
        return tuple(self._running.left if self._running else ())

    def find(self, number: str) -> Job | None:
        """The job with this id, while it waits or runs."""
        return next((job for job in (*self.running, *self.waiting) if job.id == number), None)

    @property
    def loading(self) -> ModelChoice | None:
        """The model that is being loaded, or waits for that."""
        if self._running is not None and self._running.model is not None:
            return self._running.model
        return self._loads[0][0] if self._loads else None

    async def drain(self, seconds: float) -> None:
        """Stop: jobs that wait get `ShuttingDown`; what runs may end within these seconds."""
        self.draining = True
        for job in self.waiting:
            self.cancel(job, ShuttingDown("the server is shutting down"))
        for _, done in self._loads:
            _refuse(done, ShuttingDown("the server is shutting down"))
        self._loads.clear()
        self._changed()
        deadline = time.monotonic() + seconds
        while self._running is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._running is not None:
            self._running.fail(ShuttingDown(f"the server is shutting down; {seconds:g} s were not enough"))

    async def stop(self) -> None:
        """End the loop and the worker."""
        self.draining = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for job in (*self.waiting, *self.running):
            job.finish(ShuttingDown("the server is shutting down"))
        await self.supervisor.stop()

    # The loop.

    async def _work(self) -> None:
        """One batch after the other."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._running is not None or (self.supervisor.started and (self._loads or self._waiting)):
                if self._running is not None:
                    await self._finish(self._running)
                    continue
                if self._loads:
                    await self._run_load(*self._loads.pop(0))
                    continue
                await self._gather()
                if jobs := self._take_batch():
                    self._running = WorkerBatch(next(self._numbers), jobs)
                    self._running.start()
                    self._changed()
                    await self._send(self._running)

    async def _gather(self) -> None:
        """Wait for others that fit into the next batch, until it is full or those that may be expected are there."""
        end = time.monotonic() + self._gathering.patience
        while self._has_room() and len(self._waiting) < self._gathering.expected and time.monotonic() < end:
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), end - time.monotonic())

    def _send_ahead(self) -> None:
        """Give the worker its next batch while it works at one, if that is full and nothing else comes first."""
        running = self._running
        if running is None or not running.begun or running.model is not None or self._ahead is not None:
            return
        if self._waiting and not self._loads and not self.draining and not self._has_room():
            self._ahead = WorkerBatch(next(self._numbers), self._take_batch())
            asyncio.get_running_loop().create_task(self._send(self._ahead))

    def _has_room(self) -> bool:
        """Whether the next batch could take more jobs than those that wait."""
        key = self._waiting[0].order.key if self._waiting else None
        same = sum(job.order.count for job in self._waiting if job.order.key == key)
        return key is not None and same < self.max_batch

    def _take_batch(self) -> list[Job]:
        """The first job, and those further back that fit into its batch."""
        taken: list[Job] = []
        images, key = 0, None
        for job in self._waiting:
            fits = key is not None and job.order.key == key and images + job.order.count <= self.max_batch
            if not taken or fits:
                taken.append(job)
                images += job.order.count
                key = job.order.key
        self._waiting = [job for job in self._waiting if job not in taken]
        return taken

    async def _send(self, batch: WorkerBatch) -> None:
        """Send it to the worker; without one, its jobs wait again."""
        if not await self.supervisor.send(
            RunBatch(batch.number, tuple(job.order for job in batch.jobs), self.max_batch)
        ):
            self._give_back(batch)

    async def _finish(self, running: WorkerBatch) -> None:
        """Wait for the answer of the batch that runs, and give each job its own."""
        answer = await running.answered
        spent = time.monotonic() - running.started
        self._running, self._ahead = self._ahead, None
        if answer is None:
            self._changed()
            return
        self._gathering.note_end(len(running.jobs) + len(self.waiting), spent)
        self._seconds += 0.2 * (spent / len(running.jobs) - self._seconds)
        self._note(answer)
        self.metrics.count(answer.outcomes)
        for job, outcome in zip(running.jobs, answer.outcomes, strict=False):
            job.finish(outcome)
        for job in running.jobs:  # a batch that was stopped just when another job of it was cancelled has none
            job.finish(Cancelled("cancelled"))
        self._changed()

    async def _run_load(self, model: ModelChoice, done: asyncio.Future[None]) -> None:
        running = self._running = WorkerBatch(next(self._numbers), [], model)
        if not await self.supervisor.send(LoadModel(running.number, model)):
            running.fail(WorkerFailed("the worker process has just died; a new one starts"))
        try:
            answer = await running.answered
            if answer is None:
                raise WorkerFailed("the worker process died while it loaded the model; a new one starts")
            self._note(answer)
            if not done.done():
                done.set_result(None)
        except (FastsdError, JobError) as error:
            _refuse(done, error)
        finally:
            self._running = None
            self._changed()

    def _note(self, answer: BatchDone) -> None:
        self.ready, self.loaded = True, answer.loaded
        self.metrics.set_memory(answer.memory)

    # What the worker says.

    def _deliver(self, message: Any) -> None:
        if isinstance(message, Started):
            if self.model is not None:
                again: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._loads.insert(0, (self.model, again if self.first_load.done() else self.first_load))
            self._wake.set()
            return
        batch = next((one for one in self._batches if one.number == message.batch), None)
        if batch is None:
            return
        if isinstance(message, Begun):
            batch.begun = True
            if batch is self._ahead:
                batch.start()
            self._send_ahead()
        elif isinstance(message, StepDone):
            self.metrics.steps.inc(batch.note(message))
        elif isinstance(message, BatchDone):
            if not batch.answered.done():
                batch.answered.set_result(message)
        elif isinstance(message, BatchFailed):
            batch.fail(WorkerFailed(message.reason) if message.error is None else message.error)

    def _died(self, reason: str) -> None:
        self.ready, self.loaded = False, ()
        self.metrics.restarts.inc()
        for batch in reversed(self._batches):  # those that are given back keep their order
            if not batch.begun and batch.model is None and not self.draining:
                self._give_back(batch)
            batch.fail(WorkerFailed(f"{reason}; a new one starts, and the other requests go on"))

    def _give_back(self, batch: WorkerBatch) -> None:
        """Put the jobs of a batch that no worker began to the front again."""
        self._waiting[:0] = batch.take_back()
        if batch is self._ahead:
            self._ahead = None
        self._changed()

    @property
    def _batches(self) -> tuple[WorkerBatch, ...]:
        """What the worker has, in order."""
        return tuple(batch for batch in (self._running, self._ahead) if batch is not None)

    def _tell(self, message: Any) -> None:
        asyncio.get_running_loop().create_task(self.supervisor.send(message))

    def _changed(self) -> None:
        self._send_ahead()
        self.metrics.set_queue(len(self.waiting), len(self.running))
        self._wake.set()


def _refuse(done: asyncio.Future[None], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # nobody may wait for it
