"""Behind a reverse proxy that offers the server under a path."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fastsd.server.settings import ServerSettings
from tests.support.proxy import proxied
from tests.support.server import listening, opened, served

HOST = "images.example"
FORMS = [pytest.param(True, id="without the path"), pytest.param(False, id="with the path")]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with listening(ServerSettings(root_path="/office/fastsd", hosts=(HOST,))) as found:
        yield found


@pytest.mark.parametrize("strip", FORMS)
def test_page_apis_images_and_openapi_work_under_a_path(port: int, strip: bool) -> None:
    with proxied(port, "/office/fastsd", strip, HOST) as url:
        client = httpx.Client(headers={"Origin": f"https://{HOST}"}, timeout=60)  # as the browser's page sends it
        page = client.get(f"{url}/")
        assert page.status_code == 200
        parts = re.findall(r'(?:src|href)="([\w./]+)"', page.text)
        assert len(parts) >= 2 and not any(part.startswith("/") for part in parts)
        assert all(client.get(f"{url}/{part}").status_code == 200 for part in parts)
        schema = client.get(f"{url}/openapi.json").json()
        assert schema["servers"] == [{"url": "/office/fastsd"}] and "/sdapi/v1/txt2img" in schema["paths"]
        made = client.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "a cat", "seed": 3})
        assert opened(made.json()["images"][0]).getpixel((0, 0)) == (3, 0, 7)
        made = client.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "seed": 4})
        assert opened(made.json()["data"][0]["b64_json"]).getpixel((0, 0)) == (4, 0, 7)
        wrong = client.post(f"{url}/v1/images/generations", json={"prompt": "a cat", "n": 0})
        assert wrong.status_code == 422 and wrong.json()["error"]["param"] == "n"  # in the dialect of its own path
        assert client.get(f"{url}/sdapi/v1/options/").status_code == 200  # and no redirect that leads out of the path
        body = {"prompt": "a cat", "stream": True, "partial_images": 1}
        with client.stream("POST", f"{url}/v1/images/generations", json=body) as answer:
            events = [line for line in answer.iter_lines() if line.startswith("event: ")]
        assert events == ["event: image_generation.partial_image", "event: image_generation.completed"]
        assert answer.headers["x-accel-buffering"] == "no"


def test_a_proxy_that_hides_the_name_is_told_so(port: int) -> None:
    """Its browsers' Origin is then another than our Host, as that of any other web site."""
    with proxied(port, "/office/fastsd", True, "127.0.0.1:7860") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        answer = httpx.post(f"{url}/sdapi/v1/txt2img", json={"prompt": "a cat"}, headers={"Origin": f"https://{HOST}"})
        assert answer.status_code == 403 and f"https://{HOST}" in answer.json()["detail"]
    with proxied(port, "/office/fastsd", True, "other.example") as url:
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 403 and "--allow-host" in answer.json()["detail"]


def test_the_key_is_asked_for_under_the_path_too() -> None:
    own = ServerSettings(root_path="/sd", hosts=(HOST,), api_key="a key of some length")
    with listening(own, auth=("any", "a key of some length")) as port, proxied(port, "/sd", False, HOST) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("", "sdapi/v1/options", "openapi.json", "sd/health", "health/../sdapi/v1/options"):
            assert httpx.get(f"{url}/{path}").status_code == 401, path
        known = httpx.get(f"{url}/sdapi/v1/options", headers={"X-API-Key": "a key of some length"})
        assert known.status_code == 200


@pytest.mark.heavy
def test_a_person_generates_under_a_path(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with (
        served(tmp_path / "log", "--root-path", "/office/fastsd/") as server,
        proxied(server.port, "/office/fastsd", True) as url,
        playwright.sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{url}/")
        page.locator("body[data-ready]").wait_for(timeout=60_000)
        page.locator("#prompt").fill("a handwritten eight")
        page.locator("#prompt").press("Control+Enter")
        page.locator("#gallery li").wait_for(timeout=120_000)
        browser.close()
    asked = {json.loads(line)["path"] for line in server.log.read_text().splitlines() if '"path"' in line}
    assert "/sdapi/v1/txt2img" in asked and "/page/page.js" in asked
