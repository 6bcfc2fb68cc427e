"""A server's life: listen, load the first model, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import Any

from fastsd.bundled import BUNDLED
from fastsd.errors import FastsdError
from fastsd.server import logs
from fastsd.server.app import State, make_app
from fastsd.server.http import HttpServer, listen
from fastsd.server.jobs import JobError
from fastsd.server.settings import ServerSettings
from fastsd.server.worker import EngineSettings, WorkerEngine


def make_engine(settings: Any) -> WorkerEngine:
    """The engine that loads pipelines; called in the worker process."""
    from fastsd.server.engine import PipelineEngine  # imports torch, which only the worker needs

    return PipelineEngine(settings)


def engine_settings(settings: ServerSettings) -> EngineSettings:
    """What the worker needs of the flags."""
    return EngineSettings(settings.options, settings.lora_dir, settings.embedding_dir, settings.keep, settings.tiling)


async def serve(settings: ServerSettings) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        FastsdError: the port is taken, or the first model cannot be loaded.
    """
    opened = listen(settings.host, settings.port)
    check_model(settings)
    app = make_app(settings, make_engine, engine_settings(settings))
    state: State = app.state.shared
    draining: list[asyncio.Task[None]] = []

    def drain() -> None:
        if not draining:
            draining.append(asyncio.get_running_loop().create_task(state.queue.drain(settings.drain)))

    server = HttpServer(app, drain, settings.drain)
    logs.set_up()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{opened.getsockname()[1]}/"
    with contextlib.suppress(OSError):  # the log may be on a full disk
        print(f"fastsd serves at {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    watching = asyncio.create_task(_watch_first(state, server))
    await server.serve(sockets=[opened])
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return 0


async def _watch_first(state: State, server: HttpServer) -> None:
    """A server whose first model cannot be loaded ends, with the reason."""
    while not hasattr(state.queue, "first_load"):
        await asyncio.sleep(0.01)
    try:
        await asyncio.shield(state.queue.first_load)
    except FastsdError:
        server.should_exit = True
        raise
    except JobError as error:
        server.should_exit = True
        raise FastsdError(str(error), argument="model", path=state.current.name) from error


def check_model(settings: ServerSettings) -> None:
    """Refuse a path that is not there, before anything is started; a hub id is looked up by the worker."""
    given = settings.model
    if given is not None and given not in BUNDLED and not os.path.exists(given) and given.count("/") != 1:
        raise FastsdError("no such file or folder", argument="model", path=given)
