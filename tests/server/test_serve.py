"""A real server: two processes and a port."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cli import refused
from tests.support.server import Served, served


def wait_until_ready(server: Served, **headers: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}ready", headers=headers).status_code != 200:
        assert time.monotonic() < deadline and server.process.poll() is None, server.log.read_text()
        time.sleep(0.05)


@pytest.mark.heavy
def test_a_server_loads_answers_and_ends_in_good_order(model: Path, tmp_path: Path) -> None:
    key = "a key of some length"
    with served(tmp_path / "log", "--model", model, FASTSD_API_KEY=key) as server:
        assert httpx.get(f"{server.url}health").json() == {"status": "ok"}  # before the model is loaded
        headers = {"Authorization": f"Bearer {key}"}
        wait_until_ready(server, **headers)
        assert httpx.get(f"{server.url}ready", headers=headers).json()["model"] == "tiny"
        assert b"fastsd_queue_waiting 0.0" in httpx.get(f"{server.url}metrics", headers=headers).content
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    log = (tmp_path / "log").read_text()
    assert key not in log and "Traceback" not in log
    assert {json.loads(line)["path"] for line in log.splitlines()[1:]} == {"/health", "/ready", "/metrics"}


@pytest.mark.heavy
def test_a_first_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with served(tmp_path / "log", "--model", tmp_path / "model.safetensors") as server:
        assert server.process.wait(60) == 2
    assert "fastsd: error: --model model.safetensors: " in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_port_that_is_taken_is_one_line(cli: Callable[..., Any]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(cli("serve", "--port", port), f"--port is {port}; address already in use; ")
