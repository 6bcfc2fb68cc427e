"""The page: its files, its jobs, and a person's work with it in a browser."""

from __future__ import annotations

import base64
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from starlette.testclient import TestClient

from fastsd.server.page import FOLDER
from fastsd.server.settings import ServerSettings
from tests.support.server import Served, called, opened, png, served


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with called(ServerSettings(), seconds=0.02) as found:
        yield found


def test_the_pages_files_are_served_and_nothing_else(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name in re.findall(r'"page/([\w.]+)"', page.text):
        assert client.get(f"/page/{name}").content == (FOLDER / name).read_bytes()
    assert client.get("/page/api.js").headers["content-type"] == "text/javascript; charset=utf-8"
    for name in ("nothing.js", "..%2f..%2f__init__.py", "%2e%2e/errors.py", "/etc/passwd"):
        assert client.get(f"/page/{name}").status_code == 404


def test_the_page_names_no_other_host_and_has_no_inline_code() -> None:
    """Its policy would refuse both."""
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", text.replace("// ", "")), path.name
        assert not re.search(r"\son\w+=|style=|<script>|<style", text), path.name


def test_a_job_is_watched_and_cancelled_by_its_id(client: TestClient) -> None:
    answers: list[Any] = []
    body = {"prompt": "a cat", "steps": 1000, "force_task_id": "page-1"}
    thread = threading.Thread(target=lambda: answers.append(client.post("/sdapi/v1/txt2img", json=body)))
    thread.start()
    seen: dict[str, Any] = {}
    while not seen.get("preview"):
        seen = client.get("/jobs/page-1?preview=0").json()  # 404 until it is taken
        time.sleep(0.01)
    assert seen["state"] == "running" and seen["total"] == 1000 and seen["seconds_left"] > 0
    assert opened(seen["preview"]).format == "JPEG"
    assert client.get(f"/jobs/page-1?preview={seen['previews'] + 1000}").json()["preview"] is None
    again = client.post("/sdapi/v1/txt2img", json=body)
    assert again.status_code == 422 and "another job has this id" in again.json()["detail"]
    assert client.delete("/jobs/page-1").json() == {"cancelled": True}
    thread.join(10)
    assert answers[0].status_code == 499
    for method in ("GET", "DELETE"):
        answer = client.request(method, "/jobs/page-1")
        assert (answer.status_code, answer.json()) == (404, {"detail": "no job with this id waits or runs"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page") / "log") as found:
        yield found


@pytest.fixture
def page(server: Served) -> Iterator[Any]:
    """A browser's page, with an empty gallery; afterwards it has asked no other host, and its code made no mistake."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as own:
        browser = own.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        found = browser.new_page()
        hosts, mistakes = set[str](), list[str]()
        found.on("request", lambda request: hosts.add(re.sub(r"^(\w+:)(//[^/]*)?.*", r"\1\2", request.url)))
        found.on("pageerror", lambda error: mistakes.append(str(error)))
        found.goto(server.url)
        found.locator("body[data-ready]").wait_for(timeout=60_000)
        yield found
        assert hosts <= {server.url.rstrip("/"), "blob:", "data:"} and not mistakes
        browser.close()


def fill(page: Any, **fields: object) -> None:
    for name, value in fields.items():
        page.locator(f"#{name}").fill(str(value))


def generate(page: Any) -> int:
    """Press the button and wait for more images than before; returns how many there are."""
    images = page.locator("#gallery li")
    before = images.count()
    page.get_by_role("button", name="Generate").click()
    images.nth(before).wait_for(timeout=60_000)
    return int(images.count())


@pytest.mark.heavy
def test_images_survive_a_reload_with_their_settings(page: Any) -> None:
    fill(page, prompt="a handwritten eight", steps=4, seed=7, batch_size=2)
    page.locator("#seed").press("Control+Enter")
    page.locator("#gallery li").nth(1).wait_for(timeout=60_000)
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.locator("#gallery li").count() == 2 and page.locator("#prompt").input_value() == "a handwritten eight"
    fill(page, prompt="", seed="", steps=9)
    page.locator("#gallery li button").last.click()
    assert "Seed: 7" in page.locator("#viewer-settings").inner_text()
    page.get_by_role("button", name="Use these settings").click()
    page.locator("#viewer").wait_for(state="hidden")
    page.wait_for_timeout(300)
    assert [page.locator(f"#{name}").input_value() for name in ("prompt", "seed", "steps")] == [
        "a handwritten eight",
        "7",
        "4",
    ]
    page.locator("#gallery li button").first.click()
    page.get_by_role("button", name="Delete").click()
    page.locator("#viewer").wait_for(state="hidden")
    assert page.locator("#gallery li").count() == 1


@pytest.mark.heavy
@pytest.mark.parametrize("fails", ["add", "open"])
def test_an_image_that_the_browser_cannot_keep_is_shown_and_said_to_be_lost_by_a_reload(page: Any, fails: str) -> None:
    """The disk is full, or the browser gives the page no storage."""
    full = "throw new DOMException('full', 'QuotaExceededError')"
    of = {"add": "IDBObjectStore.prototype.add", "open": "IDBFactory.prototype.open"}[fails]
    page.add_init_script(f"{of} = () => {{ {full}; }}")
    page.reload()
    page.locator("body[data-ready]").wait_for()
    fill(page, prompt="a handwritten eight", steps=1)
    assert generate(page) == 1
    page.get_by_text("The browser has no room to keep this image.").wait_for(timeout=5000)
    page.locator("#gallery li button").click()
    page.get_by_role("button", name="Delete").click()
    page.locator("#viewer").wait_for(state="hidden")
    assert page.locator("#gallery li").count() == 0


@pytest.mark.heavy
def test_another_programs_sampler_is_chosen_by_its_name_or_said_to_be_missing(page: Any, tmp_path: Path) -> None:
    """A1111 before 1.9 writes "DPM++ 2M Karras"; since then it writes the schedule, Automatic too, by itself."""
    for sampler, chosen, said in (
        ("DPM++ 2M Karras", ["DPM++ 2M", "Karras"], ""),
        ("Euler a, Schedule type: Automatic", ["Euler a", ""], ""),
        ("Euler a", ["Euler a", ""], ""),
        ("Wondrous", ["", ""], "Its Wondrous cannot be chosen here; the model's own is."),
    ):
        texts = PngInfo()
        texts.add_text("parameters", f"a cat\nSteps: 20, Sampler: {sampler}, CFG scale: 7, Seed: 5, Size: 64x64")
        Image.new("RGB", (64, 64)).save(tmp_path / "old.png", pnginfo=texts)
        fill(page, steps=1)
        page.locator("#image-file").set_input_files(tmp_path / "old.png")
        deadline = time.monotonic() + 30
        while page.locator("#steps").input_value() != "20" and time.monotonic() < deadline:
            page.wait_for_timeout(50)
        assert [page.locator(f"#{name}").input_value() for name in ("sampler_name", "scheduler")] == chosen
        assert page.locator("#error").inner_text() == said
        page.reload()
        page.locator("body[data-ready]").wait_for()


@pytest.mark.heavy
def test_a_run_shows_its_steps_and_is_cancelled(page: Any) -> None:
    fill(page, prompt="a handwritten eight", steps=1000)
    page.get_by_role("button", name="Generate").click()
    page.locator("#preview").wait_for(timeout=60_000)
    assert re.match(r"Step \d+ of 1000, \d+ s left", page.locator("#status").inner_text())
    page.keyboard.press("Escape")
    page.get_by_text("Cancelled.").wait_for(timeout=10_000)
    assert page.locator("#gallery li").count() == 0
    fill(page, steps=2)
    assert generate(page) == 1


@pytest.mark.heavy
def test_an_image_is_dropped_masked_and_painted_anew(page: Any, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    start.write_bytes(base64.b64decode(png((64, 64), (200, 200, 200))))
    page.locator("summary", has_text="Start from an image").click()
    page.locator("#image-file").set_input_files(start)
    canvas = page.locator("#canvas")
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.locator("#brush").fill("30")
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.up()
    fill(page, prompt="a handwritten eight", steps=4, mask_blur=0)
    with page.expect_request("**/sdapi/v1/img2img") as sent:
        generate(page)
    mask = opened(sent.value.post_data_json["mask"].split(",")[1]).convert("L")
    assert mask.size == (64, 64) and mask.getpixel((10, 32)) == 255 and mask.getpixel((60, 5)) == 0
    page.locator("#gallery li button").first.click()
    assert "Denoising strength: 0.75" in page.locator("#viewer-settings").inner_text()


@pytest.mark.heavy
def test_bad_input_and_a_server_that_is_gone_are_said(page: Any) -> None:
    fill(page, prompt="a handwritten eight", width=4096)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").filter(has_text="width is 4096; at most 2048 pixels").wait_for()
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").filter(has_text="The server does not answer").wait_for()
    page.context.set_offline(False)
    fill(page, width="", steps=2)
    assert generate(page) == 1 and page.locator("#error").inner_text() == ""


@pytest.mark.heavy
def test_every_field_has_a_label_and_the_page_fits_a_phone(page: Any) -> None:
    assert all(button.inner_text().strip() for button in page.locator("button:visible").all())
    unlabelled = page.locator("input:not(label input), select:not(label select), textarea:not(label textarea)")
    assert unlabelled.count() == 0
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.locator("html").evaluate("node => node.scrollWidth") <= 360
    page.get_by_role("button", name="Dark").click()
    assert page.locator("html").get_attribute("data-theme") in ("dark", "light")
