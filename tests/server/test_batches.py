"""The worker has its next batch, if that is full, before the results of the last are encoded and delivered."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from multiprocessing import Pipe
from typing import Any

import pytest
from PIL import Image

from fastsd.server import worker
from fastsd.server.jobs import (
    BatchDone,
    Cancelled,
    Job,
    QueueFull,
    RunBatch,
    ShuttingDown,
    StepDone,
    StopBatch,
    Unload,
    WorkerFailed,
)
from fastsd.server.queue import GenerationQueue
from fastsd.server.worker import Watch
from tests.support.empty_model import colour
from tests.support.server import order, with_queue

Queue = GenerationQueue


async def colours(job: Job) -> list[tuple[int, ...]]:
    return [image.getpixel((0, 0)) for image in (await job.result).images]


async def ahead(queue: Queue, **arguments: Any) -> tuple[Job, Job]:
    """A job that runs, and one of another width that the worker has ahead."""
    first, second = queue.submit(order(seed=1, **arguments)), queue.submit(order(seed=2, width=16))
    while first.index == 0:
        await asyncio.sleep(0.005)
    assert (queue.running, queue.waiting, second.state) == ((first,), (second,), "waiting")
    return first, second


def test_the_worker_has_its_next_batch_before_the_last_ones_results_are_delivered() -> None:
    async def scenario(queue: Queue) -> None:
        said: list[str] = []
        send, deliver = queue.supervisor.send, queue.supervisor._deliver

        async def sent(message: Any) -> bool:
            said.append(f"run {message.batch}")
            return await send(message)

        def delivered(message: Any) -> None:
            if isinstance(message, BatchDone):
                time.sleep(0.1)  # as long as results hold up the server
                said.append(f"done {message.batch}")
            deliver(message)

        await colours(queue.submit(order()))
        queue.supervisor.send, queue.supervisor._deliver = sent, delivered  # type: ignore[method-assign]
        jobs = [queue.submit(order(seed=k)) for k in range(4)]
        assert [await colours(job) for job in jobs] == [[colour(k)] for k in range(4)]
        a, b, c, d = range(int(said[0].split()[1]), int(said[0].split()[1]) + 4)
        assert said == [
            f"run {a}",
            f"run {b}",
            f"done {a}",
            f"run {c}",
            f"done {b}",
            f"run {d}",
            f"done {c}",
            f"done {d}",
        ]

    with_queue(scenario, seconds=0.05, max_batch=1)


def test_a_batch_with_room_stays_in_the_queue_so_that_others_may_join_it() -> None:
    async def scenario(queue: Queue) -> None:
        first = queue.submit(order(seed=1, num_images_per_prompt=2))
        while first.index == 0:
            await asyncio.sleep(0.005)
        second = queue.submit(order(seed=2))
        while first.index < 2:
            await asyncio.sleep(0.005)
        third = queue.submit(order(seed=3))
        notes = [(await job.result).notes[0] for job in (first, second, third)]
        assert notes == ["together 1", "together 2", "together 2"]

    with_queue(scenario, seconds=0.05, max_batch=2)


def test_a_job_that_is_cancelled_ahead_is_never_begun() -> None:
    async def scenario(queue: Queue) -> None:
        first, second = await ahead(queue)
        queue.cancel(second)
        third = queue.submit(order(seed=3))
        assert queue.waiting == (third,)
        with pytest.raises(Cancelled):
            await second.result
        assert (await colours(first), await colours(third)) == ([colour(1)], [colour(3)])
        assert second.started is None and second.index == 0

    with_queue(scenario, seconds=0.1, max_batch=1)


def test_an_interrupt_ends_the_batch_that_runs_and_not_the_one_ahead() -> None:
    async def scenario(queue: Queue) -> None:
        first, second = await ahead(queue, num_inference_steps=1000)
        assert queue.interrupt("") and not second.interrupted
        assert int((await first.result).notes[1].split()[1]) < 900
        assert (await second.result).notes[1] == "steps 3"

    with_queue(scenario, seconds=0.02, max_batch=1)


def test_a_worker_that_dies_costs_the_batch_that_ran_and_the_one_ahead_runs_first_afterwards() -> None:
    async def scenario(queue: Queue) -> None:
        first, second = await ahead(queue, num_inference_steps=1000)
        third = queue.submit(order(seed=3))
        assert queue.waiting == (second, third) and queue.supervisor.pid is not None
        os.kill(queue.supervisor.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed):
            await first.result
        assert queue.waiting == (second, third)
        assert (await colours(second), third.result.done(), await colours(third)) == ([colour(2)], False, [colour(3)])

    with_queue(scenario, seconds=0.02, max_batch=1)


def test_what_is_ahead_counts_as_waiting_and_is_refused_when_the_server_stops() -> None:
    async def scenario(queue: Queue) -> None:
        first, second = await ahead(queue)
        third = queue.submit(order(seed=3))
        with pytest.raises(QueueFull):
            queue.submit(order(seed=4))
        assert not await queue.unload()
        await queue.drain(30)
        assert await colours(first) == [colour(1)]
        for job in (second, third):
            with pytest.raises(ShuttingDown):
                await job.result

    with_queue(scenario, seconds=0.1, max_batch=1, size=2)


def test_a_watch_keeps_what_is_not_about_its_batch_in_order() -> None:
    ours, theirs = Pipe()
    kept: deque[Any] = deque()
    watch = Watch(theirs, 1, kept)
    others = [RunBatch(2, (), 1), StopBatch(2, keep=False), Unload()]
    for message in (others[0], StopBatch(1, keep=True), *others[1:]):
        ours.send(message)
    assert watch.step(1, 3, lambda: pytest.fail("nobody asked for it")) and watch.ended and list(kept) == others
    assert ours.recv() == StepDone(1, 1, 3)
    second = Watch(theirs, 2, kept)
    second.listen()
    assert second.stopped and list(kept) == [others[0], others[2]]


def test_steps_are_told_now_and_then_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, the last, and those with a preview, however little time has passed."""
    monkeypatch.setattr(worker, "NEWS_SECONDS", 1000.0)
    ours, theirs = Pipe()
    watch = Watch(theirs, 1, deque(), previews=(0.5,))
    for step in range(1, 11):
        watch.step(step, 10, lambda: Image.new("RGB", (4, 4)))
    told = [ours.recv() for _ in range(3)]
    assert [(one.index, one.preview is not None) for one in told] == [(1, False), (5, True), (10, False)]
    assert not ours.poll()

    async def scenario(queue: Queue) -> None:
        for _ in range(2):
            await colours(queue.submit(order(num_inference_steps=50)))
        assert b"fastsd_steps_total 100.0" in queue.metrics.text()

    with_queue(scenario)
