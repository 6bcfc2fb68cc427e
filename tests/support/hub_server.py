"""A small server for the part of the hub's protocol that downloads use. It records every request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Repository:
    """The files of a repository at each commit, and the commits of its branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None  # a private repository needs it


@dataclass
class Hub:
    """The server's state.

    Attributes:
        seen: (method, path, headers) of each request.
        breaks: how many of its next answers stop halfway, by file name.
        status: the status that every request gets; None: the right answer; 0: no answer.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    url: str = ""
    shutdown: threading.Event = field(default_factory=threading.Event)  # ends the requests that get no answer

    def add(self, name: str, files: dict[str, bytes], commit: str = "c" * 40, **options: object) -> None:
        """Add a commit with these files and point `main` to it."""
        repository = self.repositories.setdefault(name, Repository({}, {}, **options))  # type: ignore[arg-type]
        repository.commits[commit] = files
        repository.refs["main"] = commit

    def files(self, method: str = "GET") -> list[str]:
        """The names of the files that were requested."""
        paths = (path for verb, path, _ in self.seen if verb == method)
        matches = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for path in paths)
        return [match[1] for match in matches if match]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if self.hub.status == 0:
            self.hub.shutdown.wait(30)
            self.close_connection = True
            return None
        if self.hub.status is not None:
            return self._send(self.hub.status, b"", {}, body)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path)
        match = listing or file
        repository = self.hub.repositories.get(match[1]) if match else None
        login = f"Bearer {repository.token}" if repository and repository.token else None
        if repository is None or match is None or (login and self.headers.get("Authorization") != login):
            return self._refuse(401, "RepoNotFound", body)
        revision = match[2] or "main"
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound", body)
        if listing:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            answer = {"id": match[1], "sha": commit, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        if repository.gated:
            return self._refuse(403, "GatedRepo", body)
        name = match[3]
        if name not in files:
            return self._refuse(404, "EntryNotFound", body, {"X-Repo-Commit": commit})
        self._send_file(name, files[name], commit, body)

    def _send_file(self, name: str, data: bytes, commit: str, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(part[1]) if part else 0
        if part:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if body and self.hub.breaks.get(name, 0) > 0:
            self.hub.breaks[name] -= 1
            self._send(206 if part else 200, rest, headers, False)
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True  # after half of the announced bytes
            return
        self._send(206 if part else 200, rest, headers, body)

    def _refuse(self, status: int, code: str, body: bool, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, **(headers or {})}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A hub that answers at `hub.url` until the context ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def local_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A served hub that huggingface_hub uses, with its cache in `folder`.

    huggingface_hub reads its environment variables at import, so its constants are patched.
    """
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(folder / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def set_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of HF_HUB_OFFLINE=1 in the environment."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
