"""What the routes of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import Request

from fastsd.server.catalogue import Catalogue, Listed
from fastsd.server.jobs import AnyOrder, Cancelled, Finished, Job
from fastsd.server.metrics import Metrics
from fastsd.server.queue import GenerationQueue
from fastsd.server.settings import ServerSettings
from fastsd.server.styles import Styles
from fastsd.server.worker import WorkerEngine


class State:
    """What the routes share.

    Attributes:
        current: the model of requests that name none.
        options: A1111's, as far as clients have set them.
        encoded_previews: of jobs, the number of a preview and its base64.
    """

    def __init__(self, settings: ServerSettings, make_engine: Callable[[Any], WorkerEngine], engine_settings: Any):
        self.settings = settings
        self.metrics = Metrics()
        self.catalogue = Catalogue(settings)
        self.styles = Styles(settings.styles)
        self.options: dict[str, Any] = {}
        self.encoded_previews: WeakKeyDictionary[Job, tuple[int, str]] = WeakKeyDictionary()
        self.current = self.catalogue.models[0]
        self.queue = GenerationQueue(make_engine, engine_settings, settings.queue, settings.max_batch, self.metrics)

    async def listed(self) -> Catalogue:
        """What the folders hold now, for the lists that clients choose from."""
        await asyncio.to_thread(self.catalogue.refresh)
        return self.catalogue

    async def switch(self, model: Listed) -> None:
        """Load a model and make it the one of requests that name none; requests go on meanwhile.

        Raises:
            FastsdError, JobError: it cannot be loaded; all is as it was.
        """
        await self.queue.load(self.catalogue.choice(model))
        self.keep(model)

    def keep(self, model: Listed) -> None:
        """Make a model that is loaded the one of requests that name none."""
        self.current, self.queue.model = model, self.catalogue.choice(model)

    async def generate(self, request: Request, order: AnyOrder, number: str | None = None) -> Finished:
        """An order's images. If its client leaves meanwhile, it is cancelled.

        Raises:
            FastsdError, JobError: it gives none.
        """
        return await self.wait(request, self.queue.submit(order, number))

    async def wait(self, request: Request, job: Job) -> Finished:
        """A job's images; raises as `generate`."""
        request.state.log = {"job": job.id, "images": job.order.count}
        if self.settings.log_prompts:
            request.state.log["prompt"] = job.order.arguments.get("prompt")
        gone = asyncio.create_task(until_gone(request))
        both: set[asyncio.Future[Any]] = {job.result, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not job.result.done():
                raise Cancelled("the client left")
            return job.result.result()
        finally:
            gone.cancel()
            self.queue.cancel(job)


async def until_gone(request: Request) -> None:
    """Returns when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
