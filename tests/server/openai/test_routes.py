from __future__ import annotations

import base64
import errno
import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError
from starlette.testclient import TestClient

from fastsd.errors import FastsdError
from fastsd.server.catalogue import Catalogue
from fastsd.server.limits import Limits
from fastsd.server.openai.bodies import ImageEdit, ImageGeneration
from fastsd.server.openai.translate import translate
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import colour
from tests.support.server import called, opened, png

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with called(ServerSettings(queue=4, limits=Limits(images=8)), seconds=0.02) as found:
        yield found


def file(mode: str = "RGB", colour: Any = (9, 8, 7)) -> tuple[str, bytes, str]:
    return "image.png", base64.b64decode(png((16, 16), colour, mode)), "image/png"


def test_generations(client: TestClient) -> None:
    body = {"prompt": "a cat", "n": 2, "size": "16x8", "seed": 5, "quality": "high", "user": "ada"}
    answer = client.post(GENERATIONS, json=body).json()
    assert answer["size"] == "16x8" and answer["output_format"] == "png" and answer["created"] > 1.6e9
    assert [opened(one["b64_json"]).getpixel((0, 0)) for one in answer["data"]] == [colour(5), colour(6)]
    assert [one["seed"] for one in answer["data"]] == [5, 6]
    assert any("quality has no effect" in note for note in answer["notes"])


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_format_is_the_clients(client: TestClient, kind: str, name: str) -> None:
    answer = client.post(GENERATIONS, json={"prompt": "a cat", "output_format": kind}).json()
    assert opened(answer["data"][0]["b64_json"]).format == name
    answer = client.post(GENERATIONS, json={"prompt": "a cat", "output_format": kind, "response_format": "url"}).json()
    assert answer["data"][0]["url"].startswith(f"data:image/{kind};base64,")


def test_empty_boxes_are_choices_that_were_left_out() -> None:
    empty = dict.fromkeys(("size", "response_format", "output_format", "quality", "style", "background", "n"), "")
    assert ImageGeneration.model_validate({"prompt": "a cat", **empty}) == ImageGeneration(prompt="a cat")
    with pytest.raises(ValidationError):
        ImageGeneration.model_validate({"prompt": "", **empty})


def test_parameters_of_a_call_stand_at_top_level() -> None:
    body = ImageGeneration(
        prompt="a cat",
        steps=5,
        guidance=4,
        sampler="dpm++2m",
        scheduler="karras",
        negative_prompt="fog",
        seed=3,
        hires_scale=1.5,
        clip_skip=2,
        user="x",
    )
    assert translate(body, Catalogue(ServerSettings()), Limits()).arguments == {
        "prompt": "a cat",
        "num_images_per_prompt": 1,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "sampler": "dpm++2m",
        "schedule": "karras",
        "negative_prompt": "fog",
        "seed": 3,
        "hires_scale": 1.5,
        "clip_skip": 2,
    }
    form = ImageEdit.model_validate({"prompt": "x", "strength": "0.4", "steps": "7", "n": "2", "stream": "false"})
    assert form.parameters() == {"strength": 0.4, "num_inference_steps": 7} and form.n == 2


def test_timesteps_are_a_list_or_a_text_and_checked() -> None:
    for given in ([999, 500.0, 1], "999, 500,1"):
        body = ImageGeneration(prompt="a cat", timesteps=given)
        assert translate(body, Catalogue(ServerSettings()), Limits()).arguments["timesteps"] == "999,500,1"
    for wrong in ([1, 2], [0.5], "x", 5, [[1]], {"a": 1}, True):
        with pytest.raises(FastsdError, match="whole numbers, each below the one before") as refused:
            translate(ImageGeneration(prompt="a cat", timesteps=wrong), Catalogue(ServerSettings()), Limits())
        assert refused.value.argument == "timesteps"


@pytest.mark.parametrize(
    ("body", "status", "field", "said"),
    [
        ({}, 422, "prompt", "prompt is missing"),
        ({"prompt": ""}, 422, "prompt", "at least 1 character"),
        ({"n": 11}, 422, "n", "at most 10"),
        ({"n": 9}, 422, "n", "at most 8 images a request"),
        ({"size": "huge"}, 422, "size", "it should be auto, or a width and a height"),
        ({"size": "99999x8"}, 422, "size", "a whole number from 8 to 8192"),
        ({"size": "4096x64"}, 422, "size", "at most 2048 pixels"),
        ({"steps": 0}, 422, "steps", "a whole number from 1 to 1000"),
        ({"steps": 1000, "size": "2048x2048"}, 422, None, "pixels x images x steps is"),
        ({"stepps": 5}, 422, "stepps", "did you mean steps?"),
        ({"image": "x"}, 422, "image", "no such parameter"),
        ({"controls": []}, 422, "controls", "no such parameter"),
        ({"output_type": "latent"}, 422, "output_type", "no such parameter"),
        ({"batch_size": 1000}, 422, "batch_size", "no such parameter"),
        ({"steps": 5, "num_inference_steps": 6}, 422, "num_inference_steps", "given twice"),
        ({"background": "transparent"}, 422, "background", "input should be 'auto' or 'opaque'"),
        ({"model": "dall-e-3"}, 404, "model", "no such model is listed; there are digits"),
        ({"partial_images": 2}, 422, "partial_images", "given without stream"),
        ({"prompt": "kill"}, 500, None, "the worker process was killed"),
    ],
)
def test_an_error_is_in_openais_words(
    client: TestClient, body: dict[str, Any], status: int, field: str | None, said: str
) -> None:
    answer = client.post(GENERATIONS, json=({"prompt": "a cat"} if body else {}) | body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}, answer.text
    assert error["param"] == field and said in error["message"]
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")


def test_edits(client: TestClient) -> None:
    data = {"prompt": "a cat", "seed": "5", "strength": "0.5"}
    answer = client.post(EDITS, data=data, files={"image": file()}).json()
    assert opened(answer["data"][0]["b64_json"]).getpixel((0, 0)) == colour(5)
    files = [("image[]", file()), ("mask", file("RGBA", (0, 0, 0, 0)))]
    assert client.post(EDITS, data=data, files=files).status_code == 200


def test_a_full_disk_costs_the_upload_that_waits_there_and_nothing_else(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads of more than a megabyte wait in a temporary file."""
    large = "image.png", file()[1] + b"x" * 2**20, "image/png"

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile.SpooledTemporaryFile, "rollover", full)
        answer = client.post(EDITS, data={"prompt": "a cat", "size": "16x16"}, files={"image": large})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the disk of the server is full"
        small = client.post(EDITS, data={"prompt": "a cat", "size": "16x16"}, files={"image": file()})
        assert small.status_code == 200
    assert client.post(EDITS, data={"prompt": "a cat"}, files={"image": large}).status_code == 200


def test_a_masks_transparent_pixels_are_edited_and_without_a_mask_the_images_own() -> None:
    """The opposite of A1111's masks, where white is."""
    half = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    buffer = io.BytesIO()
    half.save(buffer, "PNG")
    plain = base64.b64decode(png((2, 1)))
    catalogue = Catalogue(ServerSettings())
    for image, mask in ((plain, buffer.getvalue()), (buffer.getvalue(), None)):
        found = translate(ImageEdit(prompt="x"), catalogue, Limits(), image, mask).arguments["mask_image"]
        assert list(found.tobytes()) == [0, 255]
    assert "mask_image" not in translate(ImageEdit(prompt="x"), catalogue, Limits(), plain).arguments


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ([], {"prompt": "x"}, "image"),
        ([("image", file()), ("image", file())], {"prompt": "x"}, "image"),
        ([("image", file()), ("other", file())], {"prompt": "x"}, "other"),
        ([("image", file()), ("mask", file())], {"prompt": "x"}, "mask"),
        ([("image", file())], {}, "prompt"),
        ([("image", ("x.png", b"junk", "image/png"))], {"prompt": "x"}, "image"),
    ],
)
def test_a_bad_form_is_refused_by_its_field(client: TestClient, files: Any, data: dict[str, str], field: str) -> None:
    files = files or [("nothing", ("", b"", ""))]
    answer = client.post(EDITS, data=data, files=files)
    assert answer.status_code == 422 and answer.json()["error"]["param"] in (field, "nothing")
    assert client.post(EDITS, json={"prompt": "x"}).status_code == 422


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_stream_gives_previews_and_then_the_image(client: TestClient) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 2, "steps": 9, "seed": 5}
    answer = client.post(GENERATIONS, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *partial, last = events(answer.text)
    assert [one["type"] for one in partial] == ["image_generation.partial_image"] * 2
    assert [one["partial_image_index"] for one in partial] == [0, 1]
    for one in partial:
        assert {"b64_json", "created_at", "size", "quality", "background", "output_format"} <= one.keys()
        assert opened(one["b64_json"]).size == (4, 4)
    assert last["type"] == "image_generation.completed" and opened(last["b64_json"]).getpixel((0, 0)) == colour(5)
    form = {"prompt": "a cat", "stream": "true"}
    (only,) = events(client.post(EDITS, data=form, files={"image": file()}).text)
    assert only["type"] == "image_edit.completed"


def test_an_error_in_a_stream_is_an_event(client: TestClient) -> None:
    (error,) = events(client.post(GENERATIONS, json={"prompt": "bad", "stream": True}).text)
    assert error["type"] == "error" and "it should be good" in error["error"]["message"]


def test_a_full_queue_is_a_rate_limit(client: TestClient) -> None:
    statuses = []

    def post(k: int) -> None:
        answer = client.post(GENERATIONS, json={"prompt": "a cat", "steps": 20 + k})
        statuses.append((answer.status_code, answer.json().get("error", {}).get("type")))

    threads = [threading.Thread(target=post, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 12 and set(statuses) == {(200, None), (429, "rate_limit_error")}


def test_an_interrupt_of_a1111s_api_does_not_end_it(client: TestClient) -> None:
    answers: list[Any] = []
    body = {"prompt": "a cat", "steps": 40}
    thread = threading.Thread(target=lambda: answers.append(client.post(GENERATIONS, json=body).json()))
    thread.start()
    while not client.get("/sdapi/v1/progress").json()["state"]["sampling_step"]:
        time.sleep(0.01)
    assert client.get("/sdapi/v1/progress").json()["current_image"] is None
    client.post("/sdapi/v1/interrupt")
    thread.join(20)
    assert "steps 40" in answers[0]["notes"]


def test_models(client: TestClient) -> None:
    found = client.get("/v1/models").json()
    assert found["object"] == "list" and [one["id"] for one in found["data"]] == ["digits"]
    assert client.get("/v1/models/digits").json()["object"] == "model"
    assert client.get("/v1/models/other").status_code == 404


def test_a_model_that_is_listed_and_damaged_is_not_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"junk")
    with called(ServerSettings(models_dir=str(tmp_path))) as own:
        for name, status, said in (("broken", 422, "it is damaged"), ("none", 404, "no such model is listed")):
            answer = own.post(GENERATIONS, json={"prompt": "a cat", "model": name})
            assert answer.status_code == status and said in answer.json()["error"]["message"]
