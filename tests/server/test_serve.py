"""A real server: two processes and a port."""

from __future__ import annotations

import base64
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from fastsd.image.files import encode
from fastsd.pipeline import Pipeline
from tests.support.cli import pixels, refused
from tests.support.pipelines import MASK, PHOTO
from tests.support.server import Served, opened, served

WANTED: dict[str, Any] = {
    "negative_prompt": "fog",
    "num_inference_steps": 4,
    "sampler": "dpm++2m",
    "schedule": "karras",
    "guidance_scale": 4.0,
    "width": 64,
    "height": 32,
}


def post(server: Served, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def sent(image: Image.Image) -> str:
    return base64.b64encode(encode(image, ".png", {})).decode()


def decoded(text: str) -> bytes:
    return base64.b64decode(text)


def wait_until_ready(server: Served, **headers: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}ready", headers=headers).status_code != 200:
        assert time.monotonic() < deadline and server.process.poll() is None, server.log.read_text()
        time.sleep(0.05)


@pytest.mark.heavy
def test_a_server_loads_answers_and_ends_in_good_order(model: Path, tmp_path: Path) -> None:
    key = "a key of some length"
    with served(tmp_path / "log", "--model", model, FASTSD_API_KEY=key) as server:
        assert httpx.get(f"{server.url}health").json() == {"status": "ok"}  # before the model is loaded
        headers = {"Authorization": f"Bearer {key}"}
        wait_until_ready(server, **headers)
        assert httpx.get(f"{server.url}ready", headers=headers).json()["model"] == "tiny"
        assert b"fastsd_queue_waiting 0.0" in httpx.get(f"{server.url}metrics", headers=headers).content
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    log = (tmp_path / "log").read_text()
    assert key not in log and "Traceback" not in log
    assert {json.loads(line)["path"] for line in log.splitlines()[1:]} == {"/health", "/ready", "/metrics"}


@pytest.mark.heavy
def test_python_the_command_line_and_both_apis_give_the_same_pixels(
    model: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Text to image, and from an image with a mask of transparent, or white, pixels."""
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="fp32")
    wanted = [np.asarray(image) for image in pipe("a cat", seed=5, num_images_per_prompt=2, **WANTED).images]
    words = ("--seed", 5, "--count", 2, "--negative-prompt", "fog", "--steps", 4, "--sampler", "dpm++2m", "--schedule")
    words = (*words, "karras", "--width", 64, "--height", 32, "--guidance", 4, "--dtype", "fp32", "--device", "cpu")
    made = cli("--prompt", "a cat", "--model", model, *words, "-o", "out/")
    assert [pixels(path).tolist() for path in made.paths] == [image.tolist() for image in wanted]
    with served(tmp_path / "log", "--model", model, "--dtype", "fp32", "--device", "cpu") as server:
        body = {"prompt": "a cat", "negative_prompt": "fog", "seed": 5, "steps": 4, "sampler_name": "DPM++ 2M"}
        body |= {"scheduler": "Karras", "cfg_scale": 4, "width": 64, "height": 32, "batch_size": 2}
        found = post(server, "sdapi/v1/txt2img", body)["images"]
        assert [np.asarray(opened(one)).tolist() for one in found] == [image.tolist() for image in wanted]
        body = {"prompt": "a cat", "negative_prompt": "fog", "seed": 5, "steps": 4, "sampler": "dpm++2m", "n": 2}
        body |= {"schedule": "karras", "guidance": 4, "size": "64x32"}
        found = [one["b64_json"] for one in post(server, "v1/images/generations", body)["data"]]
        assert [np.asarray(opened(one)).tolist() for one in found] == [image.tolist() for image in wanted]

        own = pipe("a cat", image=PHOTO, mask_image=MASK, strength=0.7, seed=5, num_inference_steps=4).images[0]
        body = {"prompt": "a cat", "seed": 5, "steps": 4, "denoising_strength": 0.7, "init_images": [sent(PHOTO)]}
        body |= {"mask": sent(MASK), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
        found = post(server, "sdapi/v1/img2img", body)["images"]
        np.testing.assert_array_equal(opened(found[0]), own)
        edited = PHOTO.copy()
        edited.putalpha(ImageOps.invert(MASK))
        files = {"image": decoded(sent(PHOTO)), "mask": decoded(sent(edited))}
        data = {"prompt": "a cat", "seed": "5", "steps": "4", "strength": "0.7"}
        answer = httpx.post(f"{server.url}v1/images/edits", data=data, files=files, timeout=60).json()
        np.testing.assert_array_equal(opened(answer["data"][0]["b64_json"]), own)
        maps = Path(f"/proc/{server.process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()  # the worker alone needs it


@pytest.mark.heavy
def test_a_first_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with served(tmp_path / "log", "--model", tmp_path / "model.safetensors") as server:
        assert server.process.wait(60) == 2
    assert "fastsd: error: --model model.safetensors: " in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_port_that_is_taken_is_one_line(cli: Callable[..., Any]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(cli("serve", "--port", port), f"--port is {port}; address already in use; ")
