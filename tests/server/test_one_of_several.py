"""A server with several replicas answers what any of them can, and refuses by name what one of them alone could."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from fastsd.server.one_of_several import OF_ONE, is_of_one
from fastsd.server.settings import ServerSettings
from tests.support.server import called

API = "/sdapi/v1"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with called(ServerSettings(ray="local", max_replicas=2), seconds=0.0) as found:
        yield found


@pytest.mark.parametrize(("method", "path"), sorted(OF_ONE))
def test_what_one_replica_alone_knows(client: TestClient, method: str, path: str) -> None:
    answer = client.request(method, f"{path}x" if path.endswith("/") and path != "/" else path)
    assert answer.status_code == 501 and (method == "HEAD" or "one replica's alone" in answer.json()["detail"])


def test_what_every_replica_knows(client: TestClient) -> None:
    body = {"prompt": "a cat", "width": 16, "height": 8, "seed": 1}
    assert len(client.post(f"{API}/txt2img", json=body).json()["images"]) == 1
    for path in ("/health", "/ready", f"{API}/options", f"{API}/sd-models", "/v1/models"):
        assert client.get(path).status_code == 200, path
    kept = client.post(f"{API}/txt2img", json=body | {"override_settings_restore_afterwards": False})
    assert kept.status_code == 422 and "not supported with several replicas" in kept.json()["detail"]


def test_the_routes_are_those_that_there_are(client: TestClient) -> None:
    """A route that is renamed would else be answered by any replica."""
    paths = client.get("/openapi.json").json()["paths"]
    there = {(method.upper(), path.partition("{")[0]) for path, methods in paths.items() for method in methods}
    page = {("GET", "/"), ("GET", "/page/")}  # not in the schema
    assert OF_ONE - page <= there and client.get("/").status_code == 501


def test_other_spellings_of_a_path() -> None:
    assert is_of_one("GET", "/metrics/") and is_of_one("GET", "/jobs/7")
    assert not is_of_one("GET", "/health") and not is_of_one("POST", "/v1/images/generations")
    assert not is_of_one("GET", "/jobsite/7")


def test_one_replica_answers_all() -> None:
    with called(ServerSettings(ray="local", max_replicas=1), seconds=0.0) as alone:
        assert alone.get(f"{API}/progress").status_code == 200 and alone.get("/metrics").status_code == 200
