"""A small server that speaks the part of the hub's protocol that downloads use, and writes down every request."""

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
    """What a repository holds at each commit, and what its branches and tags stand for."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    token: str | None = None  # private to who has it


@dataclass
class Hub:
    """The server's state.

    Attributes:
        seen: (method, path, headers) of each request.
        breaks: how many answers break off halfway, by file name.
        status: what every request is answered with, if not by what it asks for; 0: not at all.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    url: str = ""
    silence: threading.Event = field(default_factory=threading.Event)  # set when it is over

    def add(self, name: str, files: dict[str, bytes], commit: str = "c" * 40, **options: object) -> None:
        """Put files at a commit that `main` stands for from now on."""
        repository = self.repositories.setdefault(name, Repository({}, {}, **options))  # type: ignore[arg-type]
        repository.commits[commit] = files
        repository.refs["main"] = commit

    def files(self, method: str = "GET") -> list[str]:
        """The names of the files that were asked for."""
        asked = (path for verb, path, _ in self.seen if verb == method)
        found = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for path in asked)
        return [one[1] for one in found if one]


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
            self.hub.silence.wait(30)
            self.close_connection = True
            return None
        if self.hub.status is not None:
            return self._send(self.hub.status, b"", {}, body)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path)
        found = listing or file
        repository = self.hub.repositories.get(found[1]) if found else None
        wanted = f"Bearer {repository.token}" if repository and repository.token else None
        if repository is None or found is None or (wanted and self.headers.get("Authorization") != wanted):
            return self._refuse(401, "RepoNotFound", body)
        revision = found[2] or "main"
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound", body)
        if listing:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            answer = {"id": found[1], "sha": commit, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        if repository.gated:
            return self._refuse(403, "GatedRepo", body)
        if found[3] not in files:
            return self._refuse(404, "EntryNotFound", body, {"X-Repo-Commit": commit})
        self._send_file(found[3], files[found[3]], commit, body)

    def _send_file(self, name: str, data: bytes, commit: str, body: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        if body and self.hub.breaks.get(name, 0) > 0:
            self.hub.breaks[name] -= 1
            self._send(206 if asked else 200, rest, headers, False)
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True  # in the middle of what was announced
            return
        self._send(206 if asked else 200, rest, headers, body)

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
def serving() -> Iterator[Hub]:
    """A hub that answers at `hub.url` until it is left."""
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
        hub.silence.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def taken_for_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the hub, with its cache in a folder; it reads its variables at import."""
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(folder / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 from the start would be."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
