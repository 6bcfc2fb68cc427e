"""What a server meets in a night: workers that are killed, ends, clients that leave, and two thousand requests.

With the bundled model, in processes of their own. `pytest -m slow -s tests/server/test_endurance.py` prints the figures
that docs/server.md has.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.server import Served, opened, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked at in /proc"),
]


def ready(server: Served) -> None:
    deadline = time.monotonic() + 120
    while httpx.get(f"{server.url}ready", timeout=60).status_code != 200:
        assert time.monotonic() < deadline and server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)


def ask(server: Served, seed: int, steps: int, images: int = 1) -> tuple[int, Any]:
    """The status of a request, and its first image; 0: the connection was refused or closed without an answer."""
    body = {"prompt": "a handwritten eight", "seed": seed, "steps": steps, "batch_size": images}
    try:
        answer = httpx.post(f"{server.url}sdapi/v1/txt2img", json=body, timeout=120)
    except httpx.TransportError:
        return 0, None
    if answer.status_code != 200:
        return answer.status_code, answer.json()["detail"]
    assert json.loads(answer.json()["info"])["all_seeds"] == list(range(seed, seed + images))
    return 200, np.asarray(opened(answer.json()["images"][0]))


def worker(server: Served) -> int:
    """The process id of the worker: the child that holds torch."""
    pid = server.process.pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "libtorch" in Path(f"/proc/{child}/maps").read_text():
            return int(child)
    return 0


def test_twenty_killed_workers_cost_no_request_but_those_that_ran(tmp_path: Path) -> None:
    """Three requests at once in each round, of different steps, so that they run one after another."""
    found: Counter[int] = Counter()
    with served(tmp_path / "log") as server, ThreadPoolExecutor(3) as pool:
        ready(server)
        wanted = {steps: ask(server, 7, steps)[1] for steps in (20, 21, 22)}
        for round in range(20):
            asked = {steps: pool.submit(ask, server, 7, steps) for steps in wanted}
            time.sleep(0.02 + 0.03 * (round % 10))
            os.kill(worker(server), signal.SIGKILL)
            answers = {steps: future.result() for steps, future in asked.items()}
            for steps, (status, image) in answers.items():
                found[status] += 1
                assert status == 200 or (status == 500 and "SIGKILL" in image), (status, image)
                assert status != 200 or np.array_equal(image, wanted[steps])
            assert [status for status, _ in answers.values()].count(500) <= 1
            ready(server)
        assert ask(server, 7, 20)[0] == 200 and server.process.poll() is None
    print(f"20 kills: {dict(found)}")


def test_fifty_ends_answer_everything_that_was_taken(tmp_path: Path) -> None:
    found: Counter[int] = Counter()
    for round in range(50):
        with served(tmp_path / "log") as server, ThreadPoolExecutor(3) as pool:
            ready(server)
            asked = [pool.submit(ask, server, 7, steps) for steps in (20, 21, 22)]
            time.sleep(0.02 * (round % 10))
            server.process.send_signal(signal.SIGTERM)
            found.update(future.result()[0] for future in asked)
            assert server.process.wait(60) == 0
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
        taken = [line["status"] for line in lines if line.get("path") == "/sdapi/v1/txt2img"]
        assert set(taken) <= {200, 503} and not any("error" in line for line in lines), lines
        answered = [future.result()[0] for future in asked if future.result()[0]]
        assert sorted(answered) == sorted(taken)  # what came too late met a closed port, and nothing else was lost
    print(f"50 ends: {dict(found)} (0: after the port had closed)")


def test_a_hundred_clients_that_leave_free_the_worker(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "a handwritten eight", "steps": 500}).encode()
    head = b"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with served(tmp_path / "log") as server:
        ready(server)
        for round in range(100):
            with socket.create_connection(("127.0.0.1", server.port), 30) as own:
                own.sendall(request)
                time.sleep(0.002 * (round % 50))
        started = time.monotonic()
        assert ask(server, 7, 2)[0] == 200
        spent = time.monotonic() - started
        progress = httpx.get(f"{server.url}sdapi/v1/progress").json()
        assert progress["state"]["job_count"] == 0 and spent < 20
    print(f"100 clients left: the next request had its image after {spent:.2f} s")


def state(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    threads = int(re.search(r"Threads:\s+(\d+)", status)[1])  # type: ignore[index]
    return resident, len(os.listdir(f"/proc/{pid}/fd")), threads


def test_two_thousand_requests_leave_memory_files_and_threads_as_they_were(tmp_path: Path) -> None:
    """By four clients, in batches; every tenth asks for progress with a preview, and every hundredth is wrong.

    A batch of each size comes first: oneDNN compiles code for each shape and keeps it, 10 MiB for a batch's size here.
    Otherwise the first batch of three, which four clients seldom make, would be the worker's step at any time.
    """
    rows: dict[str, list[tuple[float, int, int]]] = {"server": [], "worker": []}
    with served(tmp_path / "log") as server, ThreadPoolExecutor(4) as pool:
        ready(server)
        for images in (1, 2, 3, 4):
            assert ask(server, 0, 4, images)[0] == 200
        pids = {"server": server.process.pid, "worker": worker(server)}
        for start in range(0, 2000, 100):
            asked: list[Future[Any]] = []
            for seed in range(start, start + 100):
                asked.append(pool.submit(ask, server, seed, 4))
                if seed % 10 == 0:
                    asked.append(pool.submit(httpx.get, f"{server.url}sdapi/v1/progress", timeout=60))
            wait(asked)
            assert all(one.result()[0] == 200 for one in asked if isinstance(one.result(), tuple))
            assert ask(server, 0, 100_000)[0] == 422
            time.sleep(0.5)  # connections close
            for name, pid in pids.items():
                rows[name].append(state(pid))
    for name, found in rows.items():
        later = np.array(found[4:])  # the first 400 requests fill caches
        numbers = np.arange(len(later))
        slope = np.polyfit(numbers, later[:, 0], 1)[0] * len(later) / later[:, 0].mean()
        print(
            f"2000 requests, {name}: {later[0, 0]:.1f} to {later[-1, 0]:.1f} MiB, slope {slope:.2%}; files and threads "
            f"{sorted(set(map(tuple, later[:, 1:].astype(int).tolist())))}"
        )
        assert slope < 0.01
        assert later[:, 1].max() - later[:, 1].min() <= 1 and later[:, 2].max() - later[:, 2].min() <= 1
