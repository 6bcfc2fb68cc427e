"""How long a job waits for others of its shape."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest

from fastsd.server import gathering
from fastsd.server.gathering import Gathering
from fastsd.server.jobs import Job
from fastsd.server.queue import GenerationQueue
from tests.support.server import order, with_queue

FOREVER = 10_000.0


async def together(*jobs: Job) -> set[str]:
    """How many jobs each of these ran with."""
    return {(await job.result).notes[0] for job in jobs}


def test_as_many_are_expected_as_there_were_for_as_long_as_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(gathering, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = Gathering()
    assert (found.expected, found.patience) == (math.inf, 0.003)
    found.note_end(3, 0.4)
    now[0] += 0.39
    assert (found.expected, found.patience) == (3, pytest.approx(0.04))
    now[0] += 0.02
    assert (found.expected, found.patience) == (math.inf, pytest.approx(0.012))
    found.note_end(1, 100.0)
    assert (found.expected, found.patience) == (1, 0.05)


def test_a_batch_waits_for_those_that_may_be_expected_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wait of hours, a job would never run if it waited for somebody who is not there."""
    monkeypatch.setattr(gathering, "LEAST", FOREVER)
    monkeypatch.setattr(gathering, "MOST", FOREVER)

    async def scenario(queue: GenerationQueue) -> None:
        expect = queue._gathering.note_end
        expect(1, FOREVER)  # one client
        assert await together(queue.submit(order(seed=1))) == {"together 1"}
        expect(3, FOREVER)
        jobs = [queue.submit(order(seed=seed)) for seed in (2, 3)]
        await asyncio.sleep(0.2)
        assert [job.state for job in jobs] == ["waiting", "waiting"]
        jobs.append(queue.submit(order(seed=4)))
        assert await together(*jobs) == {"together 3"}
        expect(9, FOREVER)
        jobs = [queue.submit(order(seed=seed)) for seed in range(4)]  # a full batch
        assert await together(*jobs) == {"together 4"}
        expect(2, FOREVER)
        job = queue.submit(order(seed=5))
        await asyncio.sleep(0.1)
        queue.cancel(job)  # while it waits for the other one
        expect(1, FOREVER)
        assert await together(queue.submit(order(seed=6))) == {"together 1"}

    with_queue(scenario, max_batch=4)


def test_the_queue_counts_those_that_ran_and_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(Gathering, "note_end", lambda _, jobs, seconds: counted.append(jobs))

    async def scenario(queue: GenerationQueue) -> None:
        first = queue.submit(order(seed=1))
        while first.state == "waiting":
            await asyncio.sleep(0.01)
        others = [queue.submit(order(seed=2)), queue.submit(order(seed=3, num_inference_steps=2))]  # of two shapes
        await together(first, *others)
        assert counted[:2] == [3, 2]

    with_queue(scenario, seconds=0.1, max_batch=4)
