"""`fastsd serve --ray`: what is refused without Ray; with it (`-m slow`) replicas come with the load, and drain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cli import refused

ROOT = str(Path(__file__).parents[2])


def test_what_is_not_there(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    words = ("serve", "--port", free)
    refused(cli(*words, "--ray", f"127.0.0.1:{free}"), f"--ray 127.0.0.1:{free}: no cluster of Ray there")
    refused(cli(*words, "--ray", "--model", "no/such/model"), "no such file or folder")
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(cli(*words, "--ray"), "--ray: it needs ray; pip install 'fastsd[ray]'")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_replicas_come_with_the_load_and_drain(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    paths = os.pathsep.join([ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    words = ["--ray", "--port", str(port), "--max-replicas", "2", "--threads", "1", "--drain", "60"]
    words += ["--model", str(model)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "fastsd", "serve", *words]
        process = subprocess.Popen(command, env=os.environ | own, cwd=tmp_path, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while "fastsd serves at" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)

    def ask(seed: int) -> int:
        body = {"prompt": "x", "seed": seed, "steps": 150, "cfg_scale": 3}
        return httpx.post(f"{url}/sdapi/v1/txt2img", json=body, timeout=300).status_code

    def replicas() -> int:
        found = 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = own["RAY_AUTH_TOKEN"].encode() in (path / "environ").read_bytes()
                found += mine and (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:fastsd")
            except OSError:
                continue
        return found

    assert replicas() == 1 and httpx.get(f"{url}/sdapi/v1/progress").status_code == 501
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, seed) for seed in range(16)]
        while replicas() < 2:
            assert time.monotonic() < deadline, log.read_text()
            asked += [pool.submit(ask, 0) for _ in range(16 - sum(not one.done() for one in asked))]
            time.sleep(0.5)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)  # what has begun, and what waits in a replica, is answered
        codes = [one.result() for one in asked]
    assert process.wait(120) == 0, log.read_text()
    assert set(codes) == {200}, log.read_text()
