"""A pipeline among coroutines: `await pipe.generate(...)`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastsd.generate.progress import Step
from fastsd.generate.result import Result


class Asynchronous:
    """What a coroutine calls. The work is done in one thread of the pipeline's own, so calls take turns."""

    _thread: ThreadPoolExecutor | None = None

    async def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        on_step: Callable[[Step], object] | None = None,
        **arguments: Any,
    ) -> Result:
        """Generate images, as a call does, while the event loop runs on.

        Cancelled (a timeout, a client that left), it raises `CancelledError` at once; the work ends after its current
        step, without decoding. A call that has not begun never begins.

        Args:
            prompt, arguments: as in a call.
            on_step: called in the event loop after each step. An error that it raises ends the call.

        Raises:
            FastsdError: as a call does.
        """
        loop, cancelled = asyncio.get_running_loop(), threading.Event()
        failures: list[Exception] = []

        def call(step: Step) -> None:
            if on_step is not None and not failures:
                try:
                    on_step(step)
                except Exception as error:
                    failures.append(error)
                    cancelled.set()

        def tell(step: Step) -> None:
            if not cancelled.is_set() and not loop.is_closed():
                loop.call_soon_threadsafe(call, step)

        def work() -> Result | None:
            result, steps = None, self.stream(prompt, **arguments)
            try:
                for step in steps:
                    if cancelled.is_set():
                        return None
                    tell(step)
                    result = step.result
            finally:
                steps.close()
            return result

        try:
            result = await loop.run_in_executor(self._own_thread(), work)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        if failures:
            raise failures[0]
        assert result is not None
        return result

    def stream(self, prompt: str | list[str] | None = None, **arguments: Any) -> Any:
        """The steps of a call, as a generator."""
        raise NotImplementedError

    def _own_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastsd")
        return self._thread
