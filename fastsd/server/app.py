"""The application: routes around one queue."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fastsd import __version__
from fastsd.errors import FastsdError, describe, nearest
from fastsd.files import is_full
from fastsd.server.a1111.lists import controlnet_routes, list_routes
from fastsd.server.a1111.routes import generation_routes
from fastsd.server.app_state import State
from fastsd.server.bad_body import explain, unreadable
from fastsd.server.guard import Guard, error_body
from fastsd.server.jobs import DISK_FULL, Cancelled, JobError, QueueFull, ShuttingDown
from fastsd.server.one_of_several import OneOfSeveral
from fastsd.server.openai.routes import openai_routes
from fastsd.server.page import page_routes
from fastsd.server.settings import ServerSettings
from fastsd.server.worker import WorkerEngine

LOG = logging.getLogger("fastsd.server")
CLIENT_LEFT = 499  # nobody reads this answer; the log does


class ErrorDetail(BaseModel):
    """An error in A1111's words."""

    detail: str


class OpenAIError(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    """An error in OpenAI's words, on its routes."""

    error: OpenAIError


STATUSES = (400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431, 500, 503)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorDetail | ErrorObject} for status in STATUSES}


def make_app(settings: ServerSettings, make_engine: Callable[[Any], WorkerEngine], engine_settings: Any) -> FastAPI:
    """The application of one server.

    Args:
        make_engine, engine_settings: of the worker, see `fastsd.server.worker.main`.
    """
    state = State(settings, make_engine, engine_settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.queue.start(state.catalogue.choice(state.current))
        hashing = asyncio.create_task(state.catalogue.hash_files())
        yield
        hashing.cancel()
        await state.queue.stop()

    app = FastAPI(
        title="fastsd",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        servers=[{"url": settings.root_path}] if settings.root_path else None,  # in openapi.json
        redirect_slashes=False,  # the guard takes slashes away
    )
    app.state.shared = state
    inner = app.build_middleware_stack
    layered: Any = (lambda: OneOfSeveral(inner())) if settings.shared else inner
    app.build_middleware_stack = lambda: Guard(layered(), settings, state.metrics)  # type: ignore[assignment,return-value]
    _add_basics(app, state)
    for routes in (generation_routes, list_routes, controlnet_routes, openai_routes, page_routes):
        app.include_router(routes(state))
    _add_errors(app)
    return app


def _add_basics(app: FastAPI, state: State) -> None:
    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """The server answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["server"])
    async def ready() -> JSONResponse:
        """A model is loaded and requests are taken; otherwise 503."""
        is_ready = state.queue.ready and not state.queue.draining
        loading = state.queue.loading
        body = {"ready": is_ready, "model": state.current.name, "loading": loading.name if loading else None}
        return JSONResponse(body, 200 if is_ready else 503)

    @app.get("/metrics", tags=["server"])
    async def metrics() -> Response:
        """In Prometheus' text format."""
        return PlainTextResponse(state.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """One JSON error for each kind of exception, in the dialect of the API that was called."""

    def answer(request: Request, status: int, message: str, field: str | None = None, **headers: str) -> JSONResponse:
        return JSONResponse(error_body(request.url.path, status, message, field), status, headers=headers or None)

    @app.exception_handler(FastsdError)
    async def bad_input(request: Request, error: FastsdError) -> JSONResponse:
        names = getattr(request.state, "names", {})
        field = names.get(error.argument or "", error.argument)
        by_name = getattr(request.state, "statuses", {}) if error.path is None else {}  # a path: it is there, and bad
        status = by_name.get(error.argument, 422)
        return answer(request, status, describe(error, lambda name: names.get(name, name)), field)

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        message, field = explain(error.errors()[0])
        return answer(request, 422, message, field)

    @app.exception_handler(JobError)
    async def no_images(request: Request, error: JobError) -> JSONResponse:
        if isinstance(error, QueueFull):
            return answer(request, 429, str(error), **{"Retry-After": str(error.seconds)})
        if isinstance(error, ShuttingDown):
            return answer(request, 503, str(error), **{"Retry-After": "30"})
        return answer(request, CLIENT_LEFT if isinstance(error, Cancelled) else 500, str(error))

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> JSONResponse:
        message = unreadable(error.__cause__) or _said(app, request, error)
        return answer(request, error.status_code, message, **dict(error.headers or {}))

    @app.exception_handler(OSError)
    async def no_room(request: Request, error: OSError) -> JSONResponse:
        if not is_full(error):  # a large upload waits on the disk, for example
            raise error
        LOG.error("no room", extra={"path": request.url.path, "reason": str(error)})
        return answer(request, 500, DISK_FULL)

    @app.exception_handler(Exception)
    async def mistake(request: Request, error: Exception) -> JSONResponse:
        LOG.error("mistake in the server", exc_info=error, extra={"path": request.url.path})
        return answer(request, 500, "a mistake in the server; its log says more")


def _said(app: FastAPI, request: Request, error: HTTPException) -> str:
    """What an error says, with the path or the method where the router says neither."""
    path = f"{request.url.path:.100}"
    if (error.status_code, error.detail) == (404, "Not Found"):
        hint = nearest(path, list(app.openapi()["paths"]))
        return f"no such path: {path}{hint or '; /openapi.json lists them'}"
    if error.status_code == 405 and (error.headers or {}).get("Allow"):
        return f"{request.scope['asked']:.20} {path} is not taken; {(error.headers or {})['Allow']} is"
    return str(error.detail)
