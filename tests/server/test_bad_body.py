"""A body that does not fit is told in one line that names the field and what would be right."""

from __future__ import annotations

import pytest

from fastsd.server.settings import ServerSettings
from tests.support.server import called

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
    ],
)
def test_one_line_names_the_field_and_what_is_right(route: str, body: bytes, message: str) -> None:
    with called(ServerSettings()) as client:
        answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
        text = answer.json().get("detail") or answer.json()["error"]["message"]
        assert answer.status_code in (400, 422) and text.startswith(message), text


def test_head_is_answered_where_a_proxy_asks() -> None:
    with called(ServerSettings()) as client:
        assert [client.head(path).status_code for path in ("/health", "/")] == [200, 200]
