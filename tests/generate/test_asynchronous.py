"""`await pipe.generate(...)`: the same images, a loop that runs on, work that ends within a step of its cancelling."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import fastsd
from tests.support.pipelines import latents, tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> Iterator[fastsd.Pipeline]:
    yield tiny_pipeline()


def test_the_result_is_that_of_a_call(pipe: fastsd.Pipeline) -> None:
    seen: list[int] = []
    threads: set[int] = set()

    def on_step(step: fastsd.Step) -> None:
        seen.append(step.index)
        threads.add(threading.get_ident())

    async def main() -> list[fastsd.Result]:
        first = pipe.generate("a cat", seed=3, num_inference_steps=3, on_step=on_step)
        return list(await asyncio.gather(first, pipe.generate("a dog", seed=4, num_inference_steps=2)))

    found = asyncio.run(main())
    expected = [pipe("a cat", seed=3, num_inference_steps=3), pipe("a dog", seed=4, num_inference_steps=2)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(one.images[0]), np.asarray(other.images[0]))
        assert one.seeds == other.seeds
    assert seen == [1, 2, 3] and threads == {threading.get_ident()}


def test_bad_input_is_told_to_the_one_who_waits(pipe: fastsd.Pipeline) -> None:
    with pytest.raises(fastsd.FastsdError, match="width is 63"):
        asyncio.run(pipe.generate("a cat", width=63))


def test_an_error_of_on_step_ends_the_call(pipe: fastsd.Pipeline) -> None:
    seen: list[int] = []

    def on_step(step: fastsd.Step) -> None:
        seen.append(step.index)
        raise LookupError("of the caller")

    with pytest.raises(LookupError, match="of the caller"):
        asyncio.run(pipe.generate("a cat", num_inference_steps=9, on_step=on_step))
    assert seen == [1]
    assert len(pipe("a cat", num_inference_steps=2).images) == 1


class Steps:
    """A callback of a call that counts, and holds a step up until it may end."""

    def __init__(self, wait_in: int):
        self.count, self.wait_in = 0, wait_in
        self.reached, self.may_end = threading.Event(), threading.Event()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        self.count += 1
        if self.count == self.wait_in:
            self.reached.set()
            assert self.may_end.wait(60)


def test_cancelled_work_ends_with_its_step(pipe: fastsd.Pipeline) -> None:
    """Cancelled in the 2nd of 50 steps, while another call waits for its turn; that one is cancelled too."""
    steps, never = Steps(2), Steps(1)

    async def main() -> fastsd.Result:
        work = asyncio.ensure_future(pipe.generate("a cat", num_inference_steps=50, callback_on_step_end=steps))
        waiting = asyncio.ensure_future(pipe.generate("a cat", callback_on_step_end=never))
        while not steps.reached.is_set():
            await asyncio.sleep(0.01)  # the loop runs on
        for task in (work, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task  # at once: its step has not ended
        steps.may_end.set()
        return await pipe.generate("a dog", seed=4, num_inference_steps=2)

    result = asyncio.run(main())
    assert (steps.count, never.count) == (2, 0)
    assert len(result.images) == 1


def test_a_timeout_cancels(pipe: fastsd.Pipeline) -> None:
    steps = Steps(1)

    async def main() -> None:
        await asyncio.wait_for(pipe.generate("a cat", num_inference_steps=9, callback_on_step_end=steps), 0.2)

    with pytest.raises((asyncio.TimeoutError, TimeoutError)):
        try:
            asyncio.run(main())
        finally:
            steps.may_end.set()
    pipe._own_thread().submit(lambda: None).result()  # what was under way has ended
    assert steps.count <= 1


def test_a_pipeline_that_has_generated_is_copied_and_pickled(pipe: fastsd.Pipeline) -> None:
    asyncio.run(pipe.generate("a cat", num_inference_steps=1))
    expected = latents(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert other._thread is None
        assert torch.equal(latents(other), expected)


def test_threads_take_turns(pipe: fastsd.Pipeline) -> None:
    """Four threads call one pipeline; each has the image that it would have alone."""
    alone = [latents(pipe, f"a cat {i}", seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: latents(pipe, f"a cat {i % 4}", seed=i % 4), range(8)))
    assert all(torch.equal(one, alone[i % 4]) for i, one in enumerate(found))
