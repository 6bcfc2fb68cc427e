"""What cannot be asked of a server with several replicas: each has its own jobs, its own models, its own counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from fastsd.server.guard import error_body

# What one replica alone knows or does: (method, path); a path with a slash at its end stands for all below it.
OF_ONE = {
    ("GET", "/sdapi/v1/progress"),
    ("POST", "/sdapi/v1/interrupt"),
    ("POST", "/sdapi/v1/skip"),
    ("POST", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/unload-checkpoint"),
    ("POST", "/sdapi/v1/reload-checkpoint"),
    ("GET", "/sdapi/v1/memory"),
    ("GET", "/metrics"),
    ("GET", "/jobs/"),
    ("DELETE", "/jobs/"),
    ("GET", "/"),
    ("GET", "/page/"),
}


class OneOfSeveral:
    """An ASGI layer that refuses what a replica cannot answer for the others."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer 501 or go on."""
        if scope["type"] == "http" and is_of_one(scope["method"], scope["path"]):
            said = f"{scope['method']} {scope['path']:.100}: one replica's alone, and this server may have several"
            await JSONResponse(error_body(scope["path"], 501, said, None), 501)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_of_one(method: str, path: str) -> bool:
    """Whether a request is about one replica."""
    below = f"{path[: path.find('/', 1)]}/" if path.find("/", 1) > 0 else ""
    return (method, path.rstrip("/") or "/") in OF_ONE or (method, below) in OF_ONE
