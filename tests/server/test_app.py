"""The calls of Open WebUI, SillyTavern and LibreChat, field by field and in their order; the clients that are Python
packages are run themselves elsewhere."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastsd.server.app import make_app
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import EmptySettings, colour, empty_engine
from tests.support.server import called, opened, png

API = "/sdapi/v1"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    models = tmp_path_factory.mktemp("models")
    for name in ("one", "two"):
        (models / f"{name}.safetensors").write_bytes(name.encode())
    with called(ServerSettings(models_dir=str(models)), seconds=0.01) as found:
        yield found


def test_open_webui_with_a1111s_api(client: TestClient) -> None:
    """It reads the options, sends the whole object back with another model, lists the models by title and model_name,
    and raises KeyError for an answer without `info`."""
    options = client.get(f"{API}/options").json()
    titles = {one["model_name"]: one["title"] for one in client.get(f"{API}/sd-models").json()}
    assert options["sd_model_checkpoint"] == titles["digits"]
    options["sd_model_checkpoint"] = titles["two"]
    assert client.post(f"{API}/options", json=options).status_code == 200
    assert client.get(f"{API}/options").json()["sd_model_checkpoint"] == titles["two"]
    body = {"prompt": "a cat", "batch_size": 2, "width": 16, "height": 8}
    for more in ({}, {"steps": 5}, {"steps": 5, "negative_prompt": "fog"}):
        answer = client.post(f"{API}/txt2img", json=body | more).json()
        assert [opened(image).size for image in answer["images"]] == [(16, 8)] * 2
        info = json.loads(answer["info"])
        assert (info["sd_model_name"], len(info["all_seeds"]), "notes" in info) == ("two", 2, True)
        assert (info["negative_prompt"], info["prompt"]) == (more.get("negative_prompt", ""), "a cat")
        assert "steps" not in more or info["steps"] == 5
    client.post(f"{API}/options", json={"sd_model_checkpoint": "digits"})


def test_open_webui_logs_in_with_http_basic() -> None:
    app = make_app(ServerSettings(user="ada", password="a long password"), empty_engine, EmptySettings())
    client = TestClient(app, base_url="http://127.0.0.1:7860")  # the worker is not started
    for name in ("options", "sd-models"):
        assert client.get(f"{API}/{name}").status_code == 401
        assert client.get(f"{API}/{name}", auth=("ada", "a long password")).status_code == 200


def test_open_webui_with_openais_api(client: TestClient) -> None:
    """It refuses an answer whose `url` points at this machine, and takes `b64_json`."""
    body = {"model": "digits", "prompt": "a cat", "n": 1, "size": "16x8", "response_format": "b64_json"}
    (image,) = client.post("/v1/images/generations", json=body).json()["data"]
    assert opened(image["b64_json"]).size == (16, 8) and not image.get("url")
    files = [("image", ("image.png", base64.b64decode(png((16, 16))), "image/png"))]
    form = {"model": "digits", "prompt": "a cat", "n": "1", "size": "16x16", "response_format": "b64_json"}
    (image,) = client.post("/v1/images/edits", data=form, files=files).json()["data"]
    assert opened(image["b64_json"]).size == (16, 16)
    assert "digits" in [one["id"] for one in client.get("/v1/models").json()["data"]]


def test_librechat(client: TestClient) -> None:
    """It sends 4.5, 22 and 1024 pixels, and reads `info.infotexts[0]`."""
    body = {"prompt": "a cat", "negative_prompt": "fog", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024}
    answer = client.post(f"{API}/txt2img", json=body).json()
    text = json.loads(answer["info"])["infotexts"][0]
    assert text.startswith("a cat\nNegative prompt: fog\nSteps: 22") and "CFG scale: 4.5" in text
    assert opened(answer["images"][0]).size == (1024, 1024)


def test_sillytavern(client: TestClient) -> None:
    """It fills its lists, switches the model and waits until nothing is loaded, generates, and leaves by interrupt."""
    assert "forge_preset" not in client.get(f"{API}/options").json()  # it would ask for Forge's modules
    for name, key in (
        ("upscalers", "name"),
        ("latent-upscale-modes", "name"),
        ("samplers", "name"),
        ("schedulers", "name"),
        ("sd-models", "title"),
    ):
        found = client.get(f"{API}/{name}").json()
        assert found and all(isinstance(one[key], str) and one[key] for one in found), name
    assert client.get(f"{API}/sd-vae").json() == []
    assert client.post(f"{API}/options", json={"sd_model_checkpoint": "one"}).status_code == 200
    idle = client.get(f"{API}/progress").json()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    body: dict[str, Any] = {
        "url": "http://127.0.0.1:7860",
        "auth": "",
        "prompt": "a cat",
        "negative_prompt": "",
        "sampler_name": "Euler a",
        "scheduler": "Automatic",
        "steps": 1000,
        "cfg_scale": 7,
        "width": 16,
        "height": 8,
        "seed": 3,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 2,
        "hr_additional_modules": [],
        "hr_second_pass_steps": 0,
        "denoising_strength": 0.7,
        "clip_skip": 1,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(client.post(f"{API}/txt2img", json=body)))
    thread.start()
    while not client.get(f"{API}/progress").json()["state"]["sampling_step"]:
        assert thread.is_alive(), answers[0].text
        time.sleep(0.01)
    assert client.post(f"{API}/interrupt").status_code == 200
    thread.join(30)
    assert answers[0].status_code == 200, answers[0].text
    notes = " ".join(json.loads(answers[0].json()["info"])["notes"])
    assert "save_images has no effect" in notes and "url, auth" in notes
    (image,) = answers[0].json()["images"]
    assert opened(image).getpixel((0, 0)) == colour(3)
    client.post(f"{API}/options", json={"sd_model_checkpoint": "digits"})


def test_an_unknown_path_and_a_wrong_method_are_named() -> None:
    with called(ServerSettings()) as client:
        answer = client.post("/images/generations", json={})  # an address without /v1
        assert answer.status_code == 404
        assert answer.json()["detail"] == "no such path: /images/generations; did you mean /v1/images/generations?"
        assert client.get("/nothing").json()["detail"] == "no such path: /nothing; /openapi.json lists them"
        answer = client.get("/v1/images/edits")
        assert answer.status_code == 405
        assert answer.json()["error"]["message"] == "GET /v1/images/edits is not taken; POST is"
