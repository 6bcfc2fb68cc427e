from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest

from fastsd.errors import FastsdError
from fastsd.server.jobs import Cancelled, Job, ModelChoice, QueueFull, ShuttingDown, WorkerFailed
from fastsd.server.queue import GenerationQueue
from tests.support.empty_model import colour
from tests.support.server import ROOT, order, with_queue

Queue = GenerationQueue


async def result(job: Job) -> tuple[list[tuple[int, ...]], list[str]]:
    """The colours of a job's images, and its notes."""
    outcome = await job.result
    return [image.getpixel((0, 0)) for image in outcome.images], outcome.notes


def test_every_job_gets_its_own_images_whatever_shares_its_batch() -> None:
    async def scenario(queue: Queue) -> None:
        orders = [order(f"a cat {seed}", seed * 10, num_images_per_prompt=1 + seed % 2) for seed in range(12)]
        found = await asyncio.gather(*(result(queue.submit(one)) for one in orders))
        for one, (colours, _) in zip(orders, found, strict=True):
            assert colours == [colour(one.arguments["seed"] + k) for k in range(one.count)]
        assert any("together 1" not in notes for _, notes in found)

    with_queue(scenario, max_batch=8)


def test_jobs_that_differ_run_one_after_another() -> None:
    async def scenario(queue: Queue) -> None:
        jobs = [queue.submit(order()), queue.submit(order("a dog", 2, width=16))]
        for _, notes in [await result(job) for job in jobs]:
            assert "together 1" in notes

    with_queue(scenario)


def test_a_batch_holds_no_more_images_than_it_may_and_keeps_the_order() -> None:
    async def scenario(queue: Queue) -> None:
        jobs = [queue.submit(order(seed=k, num_images_per_prompt=2)) for k in range(4)]
        ended: list[int] = []
        for job in jobs:
            job.result.add_done_callback(lambda _, number=job.number: ended.append(number))
        assert [(await result(job))[1][0] for job in jobs] == ["together 2"] * 4
        assert ended == sorted(ended)

    with_queue(scenario, max_batch=4)


def test_beyond_its_size_the_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async def scenario(queue: Queue) -> None:
        jobs = []
        with pytest.raises(QueueFull) as refused:
            for _ in range(100):
                jobs.append(queue.submit(order(num_inference_steps=len(jobs) + 1)))
        assert len(jobs) == 4 and refused.value.seconds >= 1
        assert [len((await result(job))[0]) for job in jobs] == [1] * 4
        queue.submit(order())

    with_queue(scenario, size=4)


def test_a_job_that_runs_stops_within_a_step_when_its_client_leaves() -> None:
    async def scenario(queue: Queue) -> None:
        job = queue.submit(order(num_inference_steps=1000))
        while job.index == 0:
            await job.changed.wait()
            job.changed.clear()
        started = time.monotonic()
        queue.cancel(job)
        assert queue.running == ()
        with pytest.raises(Cancelled):
            await job.result
        await result(queue.submit(order(num_inference_steps=1)))  # it did not wait for the 999 others: 50 seconds
        assert time.monotonic() - started < 25

    with_queue(scenario, seconds=0.05)


def test_a_job_that_waits_leaves_the_queue_and_one_that_shares_a_batch_harms_no_other() -> None:
    async def scenario(queue: Queue) -> None:
        first, second = queue.submit(order(seed=1)), queue.submit(order(seed=2))
        while first.state == "waiting":
            await asyncio.sleep(0.001)
        third = queue.submit(order(seed=3))
        queue.cancel(first)
        queue.cancel(third)
        assert queue.waiting == ()
        assert await result(second) == ([colour(2)], ["together 2", "steps 3"])
        for job in (first, third):
            with pytest.raises(Cancelled):
                await job.result

    with_queue(scenario, seconds=0.05)


def test_an_interrupt_ends_a_batch_of_its_own_api_with_the_images_as_they_are() -> None:
    async def scenario(queue: Queue) -> None:
        job = queue.submit(order(num_inference_steps=1000, api="a1111"))
        while job.index < 2:
            await asyncio.sleep(0.005)
        assert not queue.interrupt("openai") and queue.interrupt("a1111") and job.interrupted
        colours, notes = await result(job)
        assert colours == [colour(1)] and 2 <= int(notes[1].split()[1]) < 900
        assert not queue.interrupt("a1111")

    with_queue(scenario, seconds=0.02)


def test_a_preview_comes_when_it_is_asked_for() -> None:
    async def scenario(queue: Queue) -> None:
        job = queue.submit(order(num_inference_steps=200))
        while job.index < 2:
            await asyncio.sleep(0.005)
        assert job.previews == 0
        queue.want_preview(job)
        while not job.previews:
            await asyncio.sleep(0.005)
        assert job.state == "running" and job.preview is not None and job.seconds_left is not None
        queue.cancel(job)

    with_queue(scenario, seconds=0.02)


FAILURES = {
    "kill": "SIGKILL",
    "lost": "RuntimeError",
    "mistake": "ZeroDivisionError",
    "full": "^the disk of the server is full$",
}


@pytest.mark.parametrize("prompt", FAILURES)
def test_a_worker_that_fails_costs_its_request_alone(prompt: str) -> None:
    async def scenario(queue: Queue) -> None:
        good = queue.submit(order(seed=4))
        bad, after = queue.submit(order(prompt, width=16)), queue.submit(order(seed=5, width=24))
        assert (await result(good))[0] == [colour(4)]
        with pytest.raises(WorkerFailed, match=FAILURES[prompt]):
            await bad.result
        assert (await result(after))[0] == [colour(5)]
        assert queue.supervisor.restarts == (1 if prompt in ("kill", "lost") else 0) and queue.ready

    with_queue(scenario)


def test_the_worker_logs_as_the_server_does(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(queue: Queue) -> None:
        with pytest.raises(WorkerFailed):
            await queue.submit(order("mistake")).result
        await queue.submit(order("warn")).result

    with_queue(scenario)
    mistake, warning = (json.loads(line) for line in capfd.readouterr().err.splitlines())
    assert (mistake["level"], mistake["event"]) == ("error", "mistake in the worker")
    assert mistake["error"].endswith("ZeroDivisionError: division by zero")
    assert (warning["level"], warning["event"], warning["kernel"]) == ("warning", "a kernel is slow", "linear")


def test_a_worker_that_is_killed_while_nothing_runs_is_replaced() -> None:
    async def scenario(queue: Queue) -> None:
        for round in range(3):
            assert (await result(queue.submit(order(seed=round))))[0] == [colour(round)]
            assert queue.supervisor.pid is not None
            os.kill(queue.supervisor.pid, signal.SIGKILL)
        assert (await result(queue.submit(order(seed=9))))[0] == [colour(9)]
        assert queue.loaded == ("one",)

    with_queue(scenario)


def test_an_error_of_the_input_is_the_requests_and_the_worker_lives() -> None:
    async def scenario(queue: Queue) -> None:
        with pytest.raises(FastsdError, match="should be good"):
            await queue.submit(order("bad")).result
        await result(queue.submit(order()))
        assert queue.supervisor.restarts == 0

    with_queue(scenario)


def test_a_model_is_loaded_between_two_jobs_and_one_that_cannot_be_changes_nothing() -> None:
    async def scenario(queue: Queue) -> None:
        await queue.load(ModelChoice("two"))
        assert queue.loaded == ("two",) and queue.ready
        with pytest.raises(FastsdError) as refused:
            await queue.load(ModelChoice("broken"))
        assert str(refused.value) == "model broken.safetensors: it is damaged"  # the folder is nobody's business
        with pytest.raises(WorkerFailed):
            await queue.load(ModelChoice("deadly"))
        assert (await result(queue.submit(order(seed=6))))[0] == [colour(6)]

    with_queue(scenario)


def test_draining_finishes_what_runs_and_answers_the_rest() -> None:
    async def scenario(queue: Queue) -> None:
        running = queue.submit(order(seed=1))
        while running.state == "waiting":
            await asyncio.sleep(0.001)
        waiting = queue.submit(order(seed=2))
        await queue.drain(30)
        assert running.result.done() and (await result(running))[0] == [colour(1)]
        with pytest.raises(ShuttingDown):
            await waiting.result
        with pytest.raises(ShuttingDown):
            queue.submit(order())

    with_queue(scenario, seconds=0.05)


def test_what_does_not_end_in_time_is_answered_too() -> None:
    async def scenario(queue: Queue) -> None:
        job = queue.submit(order(num_inference_steps=1000))
        while job.index < 1:
            await asyncio.sleep(0.005)
        await queue.drain(0.1)
        with pytest.raises(ShuttingDown):
            await job.result

    with_queue(scenario, seconds=0.05)


ABANDONED = """if True:
    import asyncio, os, signal
    from fastsd.server.jobs import ModelChoice
    from fastsd.server.queue import GenerationQueue
    from tests.support.empty_model import EmptySettings, empty_engine
    from tests.support.server import order

    async def main():
        queue = GenerationQueue(empty_engine, EmptySettings(1000.0))
        await queue.start(ModelChoice("one"))
        job = queue.submit(order())
        while not queue._running or not queue._running.begun or job.state != "running":
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed by a signal")
def test_a_worker_ends_with_a_server_that_was_killed_in_the_middle_of_a_step() -> None:
    """A step here takes 1000 s. The pipe that both have as standard error ends with the last of them."""
    command = [sys.executable, "-c", ABANDONED]
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT) as process:
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGKILL, b"")


@pytest.mark.slow  # a time, which only an idle machine keeps
def test_the_queue_adds_less_than_five_milliseconds() -> None:
    """With an empty model, one request after the other, beside the time in which it waits for others of its shape."""

    async def scenario(queue: Queue) -> None:
        await result(queue.submit(order()))
        spent = []
        for seed in range(50):
            started = time.perf_counter()
            await result(queue.submit(order(seed=seed, num_images_per_prompt=queue.max_batch)))
            spent.append(time.perf_counter() - started)
        assert statistics.median(spent) < 0.005

    with_queue(scenario)
