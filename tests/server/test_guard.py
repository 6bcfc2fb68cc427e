from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Request
from starlette.testclient import TestClient

from fastsd.server.access import refusal_of_site
from fastsd.server.app import make_app
from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import EmptySettings, empty_engine
from tests.support.server import walk

KEY = "correct horse battery"


def client(settings: ServerSettings, base: str = "http://127.0.0.1:7860") -> TestClient:
    """Of a server whose worker is not started."""
    app = make_app(settings, empty_engine, EmptySettings())

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    return TestClient(app, base_url=base)


@pytest.fixture(scope="module")
def own() -> Iterator[TestClient]:
    yield client(ServerSettings(cors=("https://chat.example",), hosts=("studio.lan",)))


@pytest.fixture(scope="module")
def locked() -> Iterator[TestClient]:
    yield client(ServerSettings(api_key=KEY, user="ada", password="a very long password"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:7860", "[::1]:7860", "studio.lan", "LOCALHOST"])
def test_the_server_answers_to_its_names(own: TestClient, host: str) -> None:
    assert own.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "", "localhost.evil"])
def test_dns_rebinding_fails_by_the_host(own: TestClient, host: str) -> None:
    answer = own.get("/health", headers={"Host": host})
    assert answer.status_code == 403 and "--allow-host" in answer.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},  # the same machine, another program
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_another_site_cannot_call(own: TestClient, headers: dict[str, str]) -> None:
    answer = own.post("/echo", headers=headers)
    assert answer.status_code == 403 and "--cors" in answer.json()["detail"]
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_itself_and_named_sites_can(own: TestClient) -> None:
    assert own.post("/echo", headers={"Origin": "http://127.0.0.1:7860", "Sec-Fetch-Site": "same-origin"}).is_success
    headers = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    answer = own.post("/echo", headers=headers)
    assert answer.is_success and answer.headers["access-control-allow-origin"] == "https://chat.example"
    asked = own.options("/echo", headers={**headers, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 204 and "POST" in asked.headers["access-control-allow-methods"]
    other = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert own.options("/echo", headers=other).status_code == 403


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def test_every_route_but_health_needs_the_key(locked: TestClient) -> None:
    """By the router itself, so that a new route cannot be forgotten."""
    app: Any = locked.app
    paths = {(method, route.path) for route in walk(app.routes) for method in route.methods or ("GET",)}
    assert {("GET", "/health"), ("GET", "/metrics"), ("POST", "/echo"), ("GET", "/openapi.json")} <= paths
    assert {("POST", "/sdapi/v1/txt2img"), ("GET", "/controlnet/model_list")} <= paths
    for method, path in paths:
        answer = locked.request(method, path.replace("{", "").replace("}", ""))
        assert (answer.status_code == 401) == (path != "/health"), (method, path)
    assert locked.get("/no/such/route").status_code == 401


@pytest.mark.parametrize(
    ("headers", "right"),
    [
        ({"Authorization": f"Bearer {KEY}"}, True),
        ({"Authorization": f"bearer {KEY}"}, True),
        ({"X-API-Key": KEY}, True),
        (basic(f"anyone:{KEY}"), True),
        (basic("ada:a very long password"), True),
        (basic("eve:a very long password"), False),
        (basic("ada:"), False),
        ({"Authorization": "Bearer "}, False),
        ({"Authorization": f"Bearer {KEY}x"}, False),
        ({"Authorization": "Basic %%%"}, False),
        ({"Authorization": f"Basic {base64.b64encode(KEY.encode()).decode()}"}, False),
        ({"Authorization": "Basic /////w=="}, False),
        ({"Authorization": "Bearer sch\u00f6n".encode("latin-1")}, False),
        ({}, False),
    ],
)
def test_the_key_comes_in_the_ways_that_clients_have(locked: TestClient, headers: Any, right: bool) -> None:
    answer = locked.get("/metrics", headers=headers)
    assert answer.status_code == (200 if right else 401)
    assert right or answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_and_a_password_may_hold_other_letters(encoding: str) -> None:
    """requests for Python sends HTTP basic as Latin-1, browsers as UTF-8."""
    own = client(ServerSettings(api_key="clé très secrète", user="zoë:x", password="pässwörter:lang"))
    for sent in (
        {"Authorization": "Bearer clé très secrète".encode(encoding)},
        {"X-API-Key": "clé très secrète".encode(encoding)},
        {"Authorization": b"Basic " + base64.b64encode("zoë:x:pässwörter:lang".encode(encoding))},
    ):
        assert own.get("/metrics", headers=sent).status_code == 200
    assert own.get("/metrics", headers={"X-API-Key": "cl? tr?s secr?te"}).status_code == 401
    other = client(ServerSettings(api_key="ключ " * 4))  # which Latin-1 has no letters for
    assert other.get("/metrics", headers={"X-API-Key": " " * 4}).status_code == 401


def test_a_client_of_http_1_0_may_leave_the_host_out() -> None:
    """As the checks of balancers do; a browser never does."""
    assert refusal_of_site(ServerSettings(), {}) is None
    assert refusal_of_site(ServerSettings(), {"host": ""}) and refusal_of_site(ServerSettings(), {"origin": "http://x"})


def test_slashes_that_an_address_and_a_path_have_both_are_none(own: TestClient) -> None:
    for path in ("//sdapi/v1/samplers", "/sdapi/v1/samplers/", "/sdapi//v1/samplers//"):
        answer = own.get(f"http://127.0.0.1:7860{path}", follow_redirects=False)
        assert answer.status_code == 200 and answer.json()[0]["name"]
    assert own.post("/echo/", content=b"12", follow_redirects=False).json() == 2


def test_head_is_answered_wherever_get_is(own: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fastsd.server"):
        assert [own.head(path).status_code for path in ("/sdapi/v1/samplers", "/v1/models", "/echo")] == [200, 200, 405]
    assert {vars(record)["method"] for record in caplog.records if record.name == "fastsd.server"} == {"HEAD"}


def test_errors_are_in_the_words_of_the_api(locked: TestClient) -> None:
    assert set(locked.get("/v1/models").json()["error"]) == {"message", "type", "param", "code"}
    assert set(locked.get("/sdapi/v1/options").json()) == {"detail"}


def test_a_large_body_is_refused_by_its_stated_length_and_by_its_bytes() -> None:
    small = client(ServerSettings(limits=Limits(body=1000)))
    assert small.post("/echo", content=b"x" * 1000).json() == 1000
    assert small.post("/echo", content=b"x" * 1001).status_code == 413

    def chunks() -> Iterator[bytes]:  # sent without a length
        yield from [b"x" * 400] * 3

    body = {"prompt": "x" * 2000}
    assert small.post("/sdapi/v1/txt2img", json=body).status_code == 413
    answer = small.post("/sdapi/v1/txt2img", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    answer = small.post("/echo", content=chunks())
    assert answer.status_code == 413 and "0.00095" in answer.json()["detail"]


def test_answers_carry_the_headers_that_keep_a_page_safe(own: TestClient) -> None:
    headers = own.get("/health").headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"] and headers["x-request-id"]


def test_the_log_holds_no_query_and_no_key(locked: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fastsd.server"):
        locked.get("/metrics?secret=1", headers={"Authorization": f"Bearer {KEY}"})
    lines = [json.dumps(vars(record), default=str) for record in caplog.records if record.name == "fastsd.server"]
    assert lines and not any("secret" in line or KEY in line for line in lines)
