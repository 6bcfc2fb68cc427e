"""A server that speaks S3 (moto), in a thread of the test's process, whose answers can be made to fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import pytest

ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>%s</Message></Error>'
BUSY = ("503 Slow Down", b"SlowDown", b"Please reduce your request rate.")
BROKEN = ("500 Internal Error", b"InternalError", b"We encountered an internal error. Please try again.")


class S3Server:
    """Requests go to moto, except those that fail.

    Attributes:
        puts: of objects, their keys in order, whether they failed or not.
        fails: given the number of a request and its method, an error to answer with, or None.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.requests = 0
        self.puts: list[str] = []
        self.fails: Any = lambda number, method: None

    def __call__(self, environ: Any, start: Any) -> Any:
        """WSGI."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests += 1
        if method == "PUT":
            self.puts.append(path.encode("latin1").decode())
        failing = self.fails(self.requests, method)
        if failing is None:
            return self.moto(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code, message = failing
        body = ERROR % (code, message)
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def tell(self, name: str, data: bytes = b"") -> None:
        """Moto's own requests: `reset`; `reset-auth`, how many requests go before keys are looked at."""
        request = Request(f"{self.url}/moto-api/{name}", data, {"Content-Type": "text/plain"})
        urlopen(request, timeout=10).close()


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server, for as long as the context lasts, that S3's packages find by the variables of their environment."""
    served = S3Server()
    thread = threading.Thread(target=served.server.serve_forever)
    thread.start()
    served.tell("reset")  # what moto holds is the process's
    patch.setenv("AWS_ENDPOINT_URL", served.url)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    use_key(patch, "testing", "testing")
    try:
        yield served
    finally:
        served.server.shutdown()
        thread.join()
        served.server.server_close()


def use_key(patch: pytest.MonkeyPatch, name: str, secret: str) -> None:
    """Have the next store sign in with this key; s3fs keeps its connections otherwise."""
    import s3fs

    patch.setenv("AWS_ACCESS_KEY_ID", name)
    patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()
