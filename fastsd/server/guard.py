"""The outermost layer: who may call, how large and how slow a request may be, one line of log for each."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from fastsd.server.access import is_known, refusal_of_site
from fastsd.server.metrics import Metrics
from fastsd.server.settings import ServerSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = "/health"  # the one route that needs no key
HEADERS = 2**15  # bytes of the address and the headers
BODY_SECONDS = 60.0  # in which a body must have arrived
BODIES = 8  # times the largest body: what all requests together may hold in memory
LOG = logging.getLogger("fastsd.server")
PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"content-security-policy", PAGE_POLICY.encode()),
)


class BadTransfer(HTTPException):
    """Headers or a body are larger than the limit, compressed, or did not arrive in time.

    It is raised where the application reads the body, which gives HTTP's exceptions through.
    """


class Guard:
    """An ASGI layer around the whole application."""

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics):
        self.app, self.settings, self.metrics = app, settings, metrics
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(self, self._as_routed(scope), receive, send).run()
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _as_routed(self, scope: Scope) -> Scope:
        """The scope with this server's own path; proxies leave theirs in front of it, or take it away.

        Slashes that a base address and a path have both, and one at the end, are none. HEAD is GET here: uvicorn, which
        keeps its own scope, leaves the body out.
        """
        root, path = self.settings.root_path, re.sub("//+", "/", scope["path"])
        path = path[len(root) :] if root and path.startswith(f"{root}/") else path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        return {**scope, "path": path.rstrip("/") or "/", "method": method, "asked": scope["method"]}

    def hold(self, size: int) -> None:
        """Count the bytes of a body in; negative: out.

        Raises:
            BadTransfer: all together are too many.
        """
        if size > 0 and self._held + size > BODIES * self.settings.limits.body:
            raise BadTransfer(503, "too many large requests at once; try again in a few seconds")
        self._held += size


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.id = secrets.token_hex(6)
        scope.setdefault("state", {})["request_id"] = self.id
        self.started, self.status, self.size, self.held = time.monotonic(), 0, 0, 0
        self.deadline: float | None = None

    async def run(self) -> None:
        settings = self.guard.settings
        try:
            if (why := refusal_of_site(settings, self.headers)) is not None:
                await self._refuse(403, why)
            elif self._is_preflight():
                await self._answer_preflight()
            elif self.scope["path"] != OPEN and not is_known(settings, self.headers):
                await self._refuse(401, "a key is needed: Authorization: Bearer KEY, or HTTP basic")
            else:
                self._check_headers()
                await self.guard.app(self.scope, self.receive, self.send)
        except BadTransfer as error:  # before the application was asked
            await self._refuse(error.status_code, error.detail)
        finally:
            self.guard.hold(-self.held)
            self._log()

    def _is_preflight(self) -> bool:
        return self.scope["method"] == "OPTIONS" and "access-control-request-method" in self.headers

    def _check_headers(self) -> None:
        size = len(self.scope.get("raw_path", b"")) + len(self.scope.get("query_string", b""))
        if size + sum(len(name) + len(value) for name, value in self.scope["headers"]) > HEADERS:
            raise BadTransfer(431, f"the address and the headers are too large; at most {HEADERS} bytes are read")
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.guard.settings.limits.body:
            raise BadTransfer(413, self._limit())
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise BadTransfer(415, f"Content-Encoding is {encoding:.40}, which is not read; send the body as it is")

    def _limit(self) -> str:
        return f"the body is too large; at most {self.guard.settings.limits.body / 2**20:g} MiB are read"

    async def receive(self) -> Message:
        """The next part of the body, counted; chunked bodies state no length."""
        if self.deadline is None:
            self.deadline = time.monotonic() + BODY_SECONDS
        if self.deadline < 0:  # the body is complete: what comes is that the client left
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self.deadline - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            raise BadTransfer(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.size += size
            if self.size > self.guard.settings.limits.body:
                raise BadTransfer(413, self._limit())
            self.guard.hold(size)
            self.held += size
        if not message.get("more_body", False):
            self.deadline = -1.0
        return message

    async def send(self, message: Message) -> None:
        """The answer, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name, value) for name, value in SECURITY if name not in own]
            extra.append((b"x-request-id", self.id.encode()))
            if self.status in (408, 413):
                extra.append((b"connection", b"close"))  # the rest of the body is not read
            message = {**message, "headers": [*message.get("headers", ()), *extra, *self._cors()]}
        await self._send(message)

    def _cors(self) -> list[tuple[bytes, bytes]]:
        origin = self.headers.get("origin", "").rstrip("/")
        if origin not in self.guard.settings.cors:
            return []
        allow = (b"access-control-allow-origin", self.headers["origin"].encode("latin-1"))
        return [allow, (b"access-control-allow-credentials", b"true"), (b"vary", b"Origin")]

    async def _answer_preflight(self) -> None:
        headers = [(b"content-length", b"0")]
        if self._cors():
            headers += [
                (b"access-control-allow-methods", b"GET, POST, DELETE"),
                (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
                (b"access-control-max-age", b"600"),
            ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})

    async def _refuse(self, status: int, why: str) -> None:
        """An error in the words of the API that was called."""
        body = json.dumps(error_body(self.scope["path"], status, why)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b'Basic realm="fastsd", charset="UTF-8"'))
        if status == 503:
            headers.append((b"retry-after", b"5"))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _log(self) -> None:
        route = getattr(self.scope.get("route"), "path", "other")
        self.guard.metrics.requests.labels(route, str(self.status or 499)).inc()
        state = self.scope.get("state", {})
        extra = {
            "request": self.id,
            "method": self.scope["asked"],
            "path": self.scope["path"],
            "status": self.status or 499,  # the client left
            "seconds": round(time.monotonic() - self.started, 4),
            "client": (self.scope.get("client") or ("",))[0],
        }
        LOG.info("request", extra=extra | state.get("log", {}))


def error_body(path: str, status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """One error in the dialect of the API that was called: OpenAI's under /v1, else A1111's."""
    if not path.startswith("/v1/"):
        return {"detail": message}
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(status)
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
