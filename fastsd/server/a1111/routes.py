"""txt2img, img2img, progress, interrupt."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from fastsd.errors import FastsdError
from fastsd.image.metadata import write_texts
from fastsd.server.a1111.answers import make_info
from fastsd.server.a1111.bodies import Generation, ImageToImage, TextToImage
from fastsd.server.a1111.translate import NAMES, translate
from fastsd.server.app_state import State
from fastsd.server.images import encode_all, encode_plain
from fastsd.server.jobs import Job
from fastsd.server.orders import make_order

API = "a1111"


def generation_routes(state: State) -> APIRouter:
    """The routes that generate, and those that watch."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])

    @router.post("/txt2img")
    async def txt2img(request: Request, body: TextToImage) -> dict[str, Any]:
        """Text to image."""
        return await generate(state, request, body)

    @router.post("/img2img")
    async def img2img(request: Request, body: ImageToImage) -> dict[str, Any]:
        """Image to image, and inpainting."""
        return await generate(state, request, body)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the running work is, and a preview of it."""
        return await report(state, skip_current_image)

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """End the running batch after its step; its images come as they are then."""
        state.queue.interrupt(API)
        return {}

    @router.post("/skip")
    async def skip() -> dict[str, Any]:
        """The same: a batch here is all that runs of a request."""
        state.queue.interrupt(API)
        return {}

    return router


async def generate(state: State, request: Request, body: Generation) -> dict[str, Any]:
    """Translate, wait, answer."""
    request.state.names, request.state.statuses = NAMES, {"sampler": 404}  # as in A1111
    state.queue.check_room()  # before images are decoded
    if state.settings.shared and body.override_settings_restore_afterwards is False:
        raise FastsdError("not supported with several replicas", argument="override_settings_restore_afterwards")
    own = state.settings.limits
    given = (body, state.options, state.catalogue, state.styles, own)
    holds_images = isinstance(body, ImageToImage) or body.alwayson_scripts
    draft = await asyncio.to_thread(translate, *given) if holds_images else translate(*given)
    order = make_order(draft, API, state.current, state.catalogue, own)
    finished = await state.generate(request, order, body.force_task_id or None)
    model = draft.model or state.current
    if body.override_settings_restore_afterwards is False and draft.model is not None:
        state.keep(draft.model)
    texts = [write_texts(own) for own in finished.settings]
    images = await encode_all(finished.images, texts) if body.send_images is not False else []
    echo = body.model_dump(exclude=set() if getattr(body, "include_init_images", True) else {"init_images", "mask"})
    return {
        "images": images,
        "parameters": echo,
        "info": make_info(finished, texts, model, [*draft.notes, *finished.notes]),
    }


async def report(state: State, without_image: bool) -> dict[str, Any]:
    """The object of /progress. A preview is of this API's work alone, and made only when somebody asks."""
    queue = state.queue
    running, image = queue.running, None
    job = next((one for one in running if one.order.api == API), running[0] if running else None)
    found: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "job": "", "step": 0, "steps": 0}
    if job is not None:
        found = {
            "progress": max(job.progress, 0.001),
            "eta_relative": job.seconds_left or 0.0,
            "job": job.id,
            "step": job.index,
            "steps": job.total,
        }
        if not without_image and job.order.api == API:
            image = await preview(state, job)
    elif queue.loading is not None:
        found |= {"progress": 0.01, "job": f"loading {queue.loading.name}"}
    count = len(running) + len(queue.waiting) + (queue.loading is not None)
    interrupted = bool(job and job.interrupted)
    return {
        "progress": found["progress"],
        "eta_relative": found["eta_relative"],
        "state": {
            "skipped": False,
            "interrupted": interrupted,
            "stopping_generation": interrupted,
            "job": found["job"],
            "job_count": count,
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": found["step"],
            "sampling_steps": found["steps"],
        },
        "current_image": image,
        "textinfo": f"loading {queue.loading.name}" if queue.loading is not None else None,
    }


async def preview(state: State, job: Job) -> str | None:
    """The job's latest preview as base64, encoded once; and another one is asked for."""
    state.queue.want_preview(job)
    if job.preview is None:
        return None
    number, encoded = state.encoded_previews.get(job, (0, ""))
    if number != job.previews:
        number, encoded = job.previews, await encode_plain(job.preview)
        state.encoded_previews[job] = (number, encoded)
    return encoded
