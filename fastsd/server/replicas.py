"""`fastsd serve --ray`: the application as a deployment of Ray Serve, whose replicas come and go with the load.

Each replica is the whole server behind one address: its queue, its worker process, its models. Ray Serve gives a
request to the replica that has the fewest. What one replica knows and the others do not (a job's progress, what is
interrupted, the current model) cannot be asked behind several, and is refused by name: see `one_of_several.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastsd.errors import FastsdError
from fastsd.runtime.ray_cluster import PoolSize, connected, machines, pool_size
from fastsd.server.http import listen
from fastsd.server.settings import ServerSettings

NAME = "fastsd"  # of the application in Ray Serve
STARTS = 3  # of a replica, before the deployment is given up
PATIENCE = 10.0  # seconds for which too many wait, before a replica is added


def build(settings: ServerSettings) -> Any:
    """The application of a replica. It counts as started when its model is loaded."""
    from fastsd.server.app import make_app
    from fastsd.server.serve import engine_settings, make_engine

    app = make_app(settings, make_engine, engine_settings(settings))
    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def until_loaded(own: Any) -> AsyncIterator[Any]:
        async with inner(own) as found:
            await asyncio.shield(app.state.shared.queue.first_load)
            yield found

    app.router.lifespan_context = until_loaded
    return app


def deployment(settings: ServerSettings, size: PoolSize) -> Any:
    """The application for `ray.serve.run`.

    Args:
        size: what each replica takes.
    """
    from ray import serve

    @serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": size.threads, "num_gpus": size.gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch,  # those of a batch: more of them want another replica
            "upscale_delay_s": PATIENCE,
        },
        max_ongoing_requests=settings.queue,
        max_queued_requests=settings.queue * settings.max_replicas,
        graceful_shutdown_timeout_s=settings.drain,
        max_constructor_retry_count=STARTS,
    )
    @serve.ingress()
    class Replica:
        def __serve_build_asgi_app__(self) -> Any:
            self.own = build(settings)
            return self.own

        async def check_health(self) -> None:
            queue = self.own.state.shared.queue
            if not queue.ready and queue.loading is None:
                raise RuntimeError("the worker process has no model")

    return Replica.bind()  # type: ignore[attr-defined]


def serve_replicas(settings: ServerSettings) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        FastsdError: Ray or its cluster is not there, the port is taken, no replica starts.
    """
    from fastsd.server.serve import check_model

    assert settings.ray is not None
    listen(settings.host, settings.port).close()
    check_model(settings)
    with connected(settings.ray):
        try:
            from ray import serve
        except ImportError as error:
            raise FastsdError(f"it needs {error.name}; pip install 'fastsd[ray]'", argument="--ray") from None
        device = settings.options.get("device")
        size = pool_size(machines(), device, settings.max_replicas, settings.threads, "--max-replicas")
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        serve.start(http_options={"host": settings.host, "port": settings.port})
        try:
            serve.run(deployment(settings, size), name=NAME, route_prefix="/")
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or ["no reason is given"])[-1][:300]
            serve.delete(NAME)
            raise FastsdError(f"no replica starts: {said}", argument="--ray") from error
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"fastsd serves at http://{host}:{settings.port}/ (Ctrl-C ends it)", file=sys.stderr, flush=True)
        ended.wait()
        serve.delete(NAME)  # each replica ends what it has begun, for --drain seconds
    return 0
