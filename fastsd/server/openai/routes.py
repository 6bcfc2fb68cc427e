"""/v1/images/generations, /v1/images/edits, /v1/models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL.Image import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from fastsd.errors import FastsdError, describe
from fastsd.image.metadata import write_texts
from fastsd.server.app_state import State
from fastsd.server.guard import error_body
from fastsd.server.images import encode_all, encode_plain
from fastsd.server.jobs import Finished, Job, JobError
from fastsd.server.openai.bodies import ImageEdit, ImageGeneration, ImageRequest
from fastsd.server.openai.translate import NAMES, translate
from fastsd.server.orders import Draft, make_order

API = "openai"
IMAGES = ("image", "image[]")
MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        "prompt": {"type": "string"},
                    },
                }
            }
        },
    }
}

EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "a JSON object"}},
}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


def openai_routes(state: State) -> APIRouter:
    """The routes of OpenAI's clients."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The checkpoints that may be chosen."""
        return {"object": "list", "data": [_model(one.name) for one in (await state.listed()).models]}

    @router.get("/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One of them."""
        request.state.statuses = {"model": 404}
        return _model(state.catalogue.find_model(name).name)

    @router.post("/images/generations", responses=EVENTS)
    async def generations(request: Request, body: ImageGeneration) -> Response:
        """Text to image."""
        request.state.names, request.state.statuses = NAMES | body.spellings, {"model": 404}
        state.queue.check_room()
        draft = translate(body, state.catalogue, state.settings.limits)
        return await answer(state, request, body, draft, "image_generation")

    @router.post("/images/edits", openapi_extra=MULTIPART, responses=EVENTS)
    async def edits(request: Request) -> Response:
        """Image to image, and inpainting where a mask is transparent."""
        request.state.names, request.state.statuses = NAMES, {"model": 404}
        state.queue.check_room()
        body, files = await read_form(request)
        request.state.names = NAMES | body.spellings
        mask = files["mask"][0] if "mask" in files else None
        draft = await asyncio.to_thread(
            translate, body, state.catalogue, state.settings.limits, files["image"][0], mask
        )
        return await answer(state, request, body, draft, "image_edit")

    return router


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fastsd"}


async def read_form(request: Request) -> tuple[ImageEdit, dict[str, list[bytes]]]:
    """The fields and the files of edits.

    Raises:
        FastsdError, RequestValidationError: not a form, a field that is wrong, no image or several.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise FastsdError("the body should be a form, multipart/form-data")
    files: dict[str, list[bytes]] = {}
    fields: dict[str, Any] = {}
    async with request.form(max_files=20, max_fields=100) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault("image" if name in IMAGES else name, []).append(await value.read())
            elif name in fields:
                raise FastsdError("given twice", argument=name)
            else:
                fields[name] = value
    for name, found in files.items():
        if name not in ("image", "mask"):
            raise FastsdError("no such file is taken; image and mask are", argument=name)
        if len(found) > 1:
            raise FastsdError(f"{len(found)} files; one is edited", argument=name)
    if "image" not in files:
        raise FastsdError("it should be a file, the image to edit", argument="image")
    try:
        return ImageEdit.model_validate(fields), files
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def answer(state: State, request: Request, body: ImageRequest, draft: Draft, kind: str) -> Response:
    """The images, at once or as a stream of events.

    kind: of the events, image_generation or image_edit.
    """
    order = make_order(draft, API, state.current, state.catalogue, state.settings.limits)
    job = state.queue.submit(order)
    if body.stream:
        events = stream(state, request, body, job, kind, draft.notes)
        at_once = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second is for nginx
        return StreamingResponse(events, media_type="text/event-stream", headers=at_once)
    finished = await state.wait(request, job)
    texts = [write_texts(own) for own in finished.settings]
    encoded = await encode_all(finished.images, texts, body.suffix)
    data = [_datum(body, text, own["seed"]) for text, own in zip(encoded, finished.settings, strict=True)]
    found = _described(body, finished) | {"created": int(time.time()), "data": data}
    return JSONResponse(found | {"notes": [*draft.notes, *finished.notes]})


def _datum(body: ImageRequest, encoded: str, seed: int) -> dict[str, Any]:
    """One image. A `url` holds the image itself: the server keeps no files that a second request could fetch."""
    if body.response_format == "url":
        return {"url": f"data:image/{body.output_format or 'png'};base64,{encoded}", "seed": seed}
    return {"b64_json": encoded, "seed": seed}


def _described(body: ImageRequest, finished: Finished) -> dict[str, Any]:
    size = finished.images[0].size if finished.images else (0, 0)
    return {
        "background": "opaque",
        "output_format": body.output_format or "png",
        "quality": body.quality or "auto",
        "size": f"{size[0]}x{size[1]}",
    }


async def stream(
    state: State, request: Request, body: ImageRequest, job: Job, kind: str, notes: list[str]
) -> AsyncIterator[bytes]:
    """Server-sent events: previews, then the images; or an error."""
    waiting = asyncio.create_task(state.wait(request, job))
    try:
        number = 0
        async for image, encoded in _previews(job, waiting, body):
            yield _event(
                f"{kind}.partial_image",
                b64_json=encoded,
                partial_image_index=number,
                created_at=int(time.time()),
                background="opaque",
                output_format=body.output_format or "png",
                quality=body.quality or "auto",
                size=f"{image.width}x{image.height}",
            )
            number += 1
        finished = await waiting
        found = _described(body, finished) | {"created_at": int(time.time())}
        texts = [write_texts(own) for own in finished.settings]
        for encoded, own in zip(await encode_all(finished.images, texts, body.suffix), finished.settings, strict=True):
            own_notes = [*notes, *finished.notes]
            yield _event(f"{kind}.completed", b64_json=encoded, seed=own["seed"], notes=own_notes, **found)
    except FastsdError as error:
        names = request.state.names
        message = describe(error, lambda name: names.get(name, name))
        yield _event("error", **error_body("/v1/", 422, message, names.get(error.argument or "", error.argument)))
    except JobError as error:
        yield _event("error", **error_body("/v1/", 500, str(error)))
    finally:
        waiting.cancel()
        state.queue.cancel(job)


async def _previews(job: Job, waiting: asyncio.Task[Finished], body: ImageRequest) -> AsyncIterator[tuple[Image, str]]:
    """Each preview that was asked for, and its file, also where the next one is there already."""
    seen, ended = 0, False
    while not ended:
        changed = asyncio.create_task(job.changed.wait())
        await asyncio.wait({changed, waiting}, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()
        job.changed.clear()
        ended = waiting.done()
        while seen < min(len(job.planned), len(job.order.previews)):
            image, seen = job.planned[seen], seen + 1
            yield image, await encode_plain(image, body.suffix)


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
