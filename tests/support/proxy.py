"""A reverse proxy that offers a server under a path, as nginx does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP = ("connection", "keep-alive", "transfer-encoding")


@contextlib.contextmanager
def proxied(port: int, path: str, strip: bool, name: str = "") -> Iterator[str]:
    """The address under which the server at this port is offered; other paths are answered 404.

    Args:
        path: it begins with "/" and does not end so.
        strip: the server is asked without this path, as with `proxy_pass http://127.0.0.1:7860/;`.
        name: the `Host` that the server is told; "": the one that the client asked for (`$http_host`).
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            if not self.path.startswith(f"{path}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {key: value for key, value in self.headers.items() if key.lower() not in HOP}
            own = HTTPConnection("127.0.0.1", port, timeout=60)
            own.request(
                self.command,
                self.path.removeprefix(path) if strip else self.path,
                body,
                headers | ({"Host": name} if name else {}),
            )
            answer = own.getresponse()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in HOP:
                    self.send_header(key, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while part := answer.read1(65536):  # as it comes, for streams
                self.wfile.write(part)
            self.close_connection = True

        do_GET = do_POST = do_DELETE = pass_on

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{path}"
    finally:
        server.shutdown()
        server.server_close()
