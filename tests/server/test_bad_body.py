"""A body that does not fit is told in one line that names the field and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastsd.server.settings import ServerSettings
from tests.support.server import called


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with called(ServerSettings()) as found:
        yield found


def said(answer: Any) -> str:
    """An error's message, in either dialect."""
    body = answer.json()
    return str(body["detail"] if "detail" in body else body["error"]["message"])


ROUTES = ("/sdapi/v1/txt2img", "/v1/images/generations")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON: "),
        (b"\xff\xfe", "the body"),
        (b"", "the body is missing; send a JSON object"),
        (b"[]", "the body: it should be an object"),
        (b"3", "the body is 3; it should be an object"),
        (b'{"prompt": "a", "steps": "many"}', "steps is 'many'; it should be a whole number"),
        (b'{"prompt": 3}', "prompt is 3; it should be "),
        (b'{"prompt": "\xff"}', "the body is not UTF-8: byte 12 cannot be read"),
        pytest.param(b"[" * 9**5 + b"]" * 9**5, "the body: it is nested too deeply; at most 64 levels", id="deep"),
    ],
)
def test_one_line_names_the_field_and_what_is_right(client: TestClient, route: str, body: bytes, message: str) -> None:
    answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and said(answer).startswith(message), said(answer)


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_that_are_compressed_or_of_another_type_are_refused_by_what_is_wrong(
    client: TestClient, route: str
) -> None:
    for headers, status, message in (
        ({"Content-Encoding": "gzip"}, 415, "Content-Encoding is gzip, which is not read; send the body as it is"),
        ({"Content-Type": "text/plain"}, 422, "the body is not read as JSON; say Content-Type: application/json"),
    ):
        answer = client.post(route, content=b'{"prompt": "a"}', headers={"Content-Type": "application/json", **headers})
        assert (answer.status_code, said(answer)) == (status, message)


def test_what_an_answer_could_not_repeat_is_refused_before_any_work(client: TestClient) -> None:
    """500 levels can be read, and could not be written into the answer's `parameters`."""
    for depth, status in ((40, 200), (500, 422)):
        deep: Any = 1
        for _ in range(depth):
            deep = {"a": deep}
        answer = client.post(ROUTES[0], json={"prompt": "a cat", "unknown": deep})
        assert answer.status_code == status


# A number, and whether it is a whole one.
NUMBERS = [
    (2, True),
    (2.0, True),
    ("2", True),
    ("2.0", True),
    (2.5, False),
    (True, False),
    ([2], False),
    (1e300, False),
]


@pytest.mark.parametrize(("value", "fits"), NUMBERS)
def test_a_whole_number_is_one_rule_for_every_field_of_both_apis(client: TestClient, value: Any, fits: bool) -> None:
    status = 200 if fits else 422
    for route, fields in zip(
        ROUTES, (("steps", "seed", "batch_size"), ("n", "steps", "seed", "clip_skip")), strict=True
    ):
        for name in fields:
            assert client.post(route, json={"prompt": "a cat", name: value}).status_code == status, name
    for name in ("CLIP_stop_at_last_layers", "eta_noise_seed_delta"):
        body = {"prompt": "a cat", "override_settings": {name: value}}
        assert client.post(ROUTES[0], json=body).status_code == status, name
    status = 200 if fits or value == 2.5 else 422
    assert client.post(ROUTES[0], json={"prompt": "a cat", "cfg_scale": value}).status_code == status
    assert client.post(ROUTES[1], json={"prompt": "a cat", "guidance": value}).status_code == status


def test_a_large_seed_in_a_text_is_exact(client: TestClient) -> None:
    for route in ROUTES:
        text = client.post(route, json={"prompt": "a cat", "seed": "9007199254740993"}).text  # 2**53 + 1
        assert "9007199254740993" in text


def test_a_size_may_be_written_with_any_x(client: TestClient) -> None:
    for size in ("16x8", "16X8", "16×8"):
        assert client.post(ROUTES[1], json={"prompt": "a cat", "size": size}).json()["size"] == "16x8"


def test_head_is_answered_where_a_proxy_asks(client: TestClient) -> None:
    assert [client.head(path).status_code for path in ("/health", "/")] == [200, 200]
