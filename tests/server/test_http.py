"""Connections that are slow, malformed, cut off or many."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from fastsd.server import guard, http
from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from tests.support.server import listening

CLOSE = b"Connection: close\r\n\r\n"
HEADERS = b"Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "HEADER_SECONDS", 0.5)
        patch.setattr(guard, "BODY_SECONDS", 0.5)
        with listening(ServerSettings(limits=Limits(body=2**16)), seconds=0.02) as found:
            yield found


def exchange(port: int, *parts: bytes, pause: float = 0.0, half_close: bool = False) -> bytes:
    """Everything that comes back until the server closes, or for two seconds."""
    with socket.create_connection(("localhost", port), 5) as own:
        own.settimeout(2)
        received = b""
        try:
            for part in parts:
                own.sendall(part)
                time.sleep(pause)
            if half_close:
                own.shutdown(socket.SHUT_WR)
            while more := own.recv(65536):
                received += more
        except (TimeoutError, ConnectionError):
            pass
        return received


def post(body: bytes, *headers: bytes) -> bytes:
    return b"POST /sdapi/v1/txt2img HTTP/1.1\r\n" + HEADERS + b"".join(headers) + b"\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def test_a_chunked_body_is_read(port: int) -> None:
    body = chunked(b'{"prompt": "a', b' cat", "send_images"', b": false}")
    assert exchange(port, post(body, b"Transfer-Encoding: chunked\r\nConnection: close\r\n")).startswith(
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (post(chunked(b"x" * 40000, b"x" * 40000), b"Transfer-Encoding: chunked\r\n"), "413"),
        (post(b"", b"Content-Length: 99999999999999999999\r\n"), "413"),
        (post(b"", b"Content-Length: 70000\r\n"), "413"),
        (post(b"", b"Content-Length: -1\r\n"), "400"),
        (post(b"", b"Content-Length: 5\r\nContent-Length: 6\r\n"), "400"),
        (post(b"ffffffffffffffff\r\nx", b"Transfer-Encoding: chunked\r\n"), "400 408"),
        (post(b"zz\r\n", b"Transfer-Encoding: chunked\r\n"), "400 422"),
        (post(b"", b"X: " + b"x" * 70000 + b"\r\n"), "400 431"),
        (b"GET / HTTP/1.1\r\n\r\n", "400"),  # without a Host
        (b"nonsense\r\n\r\n", "400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400"),  # a TLS greeting
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n" + CLOSE, "400 414 431"),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: evil.example\r\n" + CLOSE, "403"),
        (b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n" + CLOSE, "404"),
    ],
)
def test_what_is_malformed_or_too_large_is_refused_and_the_server_lives(port: int, sent: bytes, statuses: str) -> None:
    assert exchange(port, sent).split()[1].decode() in statuses.split()
    assert httpx.get(f"http://localhost:{port}/health").status_code == 200


def test_headers_that_do_not_come_cost_no_connection(port: int) -> None:
    """A byte now and then would keep it open for ever."""
    started = time.monotonic()
    assert exchange(port, b"GET /health HT", *[b"T"] * 10, pause=0.1) == b""
    assert exchange(port, b"") == b""
    assert time.monotonic() - started < 20  # the limits are a second here
    keep_alive = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert exchange(port, keep_alive, b"GET /hea").count(b"HTTP/1.1 200") == 1


def test_a_body_that_does_not_come_is_given_up(port: int) -> None:
    assert exchange(port, post(b'{"prompt"', b"Content-Length: 100\r\n")).startswith(b"HTTP/1.1 408")


def test_a_connection_that_is_half_closed_or_cut_frees_the_queue(port: int) -> None:
    body = json.dumps({"prompt": "a cat", "steps": 1000}).encode()
    request = post(body, b"Content-Length: %d\r\n" % len(body))
    for _ in range(20):
        with socket.create_connection(("localhost", port), 5) as own:
            own.sendall(request)
            time.sleep(0.02)
    deadline = time.monotonic() + 20
    while httpx.get(f"http://localhost:{port}/sdapi/v1/progress").json()["state"]["job_count"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    answer = httpx.post(f"http://localhost:{port}/sdapi/v1/txt2img", json={"prompt": "a cat", "steps": 1}, timeout=30)
    assert answer.status_code == 200


def test_answers_on_a_kept_connection_wait_for_no_acknowledgement() -> None:
    """Headers and body are two writes; without TCP_NODELAY the second waits 40 ms for the client's acknowledgement."""

    async def accepted() -> int:
        found: asyncio.Queue[socket.socket] = asyncio.Queue()
        opened = http.listen("127.0.0.1", 0)
        server = await asyncio.start_server(
            lambda _, writer: found.put_nowait(writer.get_extra_info("socket")), sock=opened
        )
        async with server:
            _, writer = await asyncio.open_connection(*opened.getsockname())
            own = await found.get()
            option = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            return option

    assert asyncio.run(accepted()) != 0


@pytest.mark.heavy
def test_two_hundred_clients_get_exactly_one_answer_each() -> None:
    """Against a queue of 32: images or 429 at once, and no image twice."""
    with listening(ServerSettings(queue=32, max_batch=4), seconds=0.005) as port:
        found: list[tuple[int, int, float]] = []

        def ask(seed: int) -> None:
            started = time.monotonic()
            body = {"prompt": "a cat", "seed": seed}
            answer = httpx.post(f"http://localhost:{port}/sdapi/v1/txt2img", json=body, timeout=60)
            own = json.loads(answer.json()["info"])["seed"] if answer.status_code == 200 else seed
            found.append((answer.status_code, own - seed, time.monotonic() - started))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(found) == 200 and {status for status, _, _ in found} <= {200, 429}
        assert all(other == 0 for _, other, _ in found)
        counts = httpx.get(f"http://localhost:{port}/metrics").text
        images = float(next(line for line in counts.splitlines() if line.startswith("fastsd_images_total")).split()[1])
        assert images == sum(status == 200 for status, _, _ in found) >= 32
