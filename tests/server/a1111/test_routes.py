from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import colour
from tests.support.server import called, opened, png

API = "/sdapi/v1"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with called(ServerSettings(queue=4, limits=Limits(images=8)), seconds=0.02) as found:
        yield found


def test_an_answer_holds_what_clients_read(client: TestClient) -> None:
    """Open WebUI reads `info`, LibreChat `info.infotexts[0]`; sd-backend-client wants nearly all of A1111's keys."""
    body = {"prompt": "a cat", "seed": 5, "batch_size": 2, "n_iter": 1, "width": 16, "height": 8, "url": "x"}
    answer = client.post(f"{API}/txt2img", json=body).json()
    assert answer["parameters"]["prompt"] == "a cat" and len(answer["images"]) == 2
    for k, encoded in enumerate(answer["images"]):
        image = opened(encoded)
        assert image.getpixel((0, 0)) == colour(5 + k) and image.size == (16, 8)
        assert image.text["parameters"] == json.loads(answer["info"])["infotexts"][k]  # type: ignore[attr-defined]
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6] and info["infotexts"][0].startswith("a cat\n")
    wanted = """prompt all_prompts negative_prompt all_negative_prompts seed all_seeds subseed all_subseeds
        subseed_strength width height sampler_name cfg_scale steps batch_size restore_faces face_restoration_model
        sd_model_name sd_model_hash sd_vae_name sd_vae_hash seed_resize_from_w seed_resize_from_h denoising_strength
        extra_generation_params index_of_first_image infotexts styles job_timestamp clip_skip
        is_using_inpainting_conditioning version"""
    assert not set(wanted.split()) - info.keys()
    assert any("url" in note for note in info["notes"])


def test_the_images_may_be_left_out(client: TestClient) -> None:
    answer = client.post(f"{API}/txt2img", json={"prompt": "a cat", "send_images": False}).json()
    assert answer["images"] == [] and "a cat" in answer["info"]


def test_img2img_echoes_its_images_only_when_asked(client: TestClient) -> None:
    body = {"prompt": "a cat", "init_images": [png()]}
    assert "init_images" not in client.post(f"{API}/img2img", json=body).json()["parameters"]
    body["include_init_images"] = True  # type: ignore[assignment]
    assert client.post(f"{API}/img2img", json=body).json()["parameters"]["init_images"] == body["init_images"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"steps": 0}, 422, "steps is 0; it should be at least 1"),
        ({"steps": "many"}, 422, "steps is 'many'; it should be a whole number"),
        ({"cfg_scale": -1}, 422, "cfg_scale is -1"),
        ({"batch_size": 3, "n_iter": 3}, 422, "batch_size x n_iter is 9; at most 8 images a request"),
        ({"width": 4096}, 422, "width is 4096; at most 2048 pixels"),
        ({"sampler_name": "Eular"}, 404, "'Eular' is unknown; did you mean"),
        ({"restore_faces": True}, 422, "restore_faces is True; not supported"),
        ({"override_settings": {"sd_model_checkpoint": "../../etc/passwd"}}, 422, "no such model is listed"),
        ({"prompt": "a <lora:x> cat"}, 422, "prompt: <lora:x>: this server was started without a folder of LoRAs"),
        ({"prompt": "bad"}, 422, "prompt is 'bad'; it should be good"),
        ({"prompt": "mistake"}, 500, "ZeroDivisionError in the worker"),
        ({"prompt": "kill"}, 500, "the worker process was killed"),
    ],
)
def test_an_error_names_the_field_in_a1111s_words(client: TestClient, body: object, status: int, said: str) -> None:
    answer = client.post(f"{API}/txt2img", json=body)
    assert answer.status_code == status and set(answer.json()) == {"detail"}
    assert said in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"null", b'{"steps": NaN}', b"\xff\xfe"])
def test_what_is_no_body_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post(f"{API}/txt2img", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and isinstance(answer.json()["detail"], str)


def in_background(client: TestClient, body: dict[str, object]) -> tuple[threading.Thread, list[dict[str, object]]]:
    answers: list[dict[str, object]] = []
    thread = threading.Thread(target=lambda: answers.append(client.post(f"{API}/txt2img", json=body).json()))
    thread.start()
    return thread, answers


def test_progress_shows_steps_and_a_preview_and_an_interrupt_ends_it(client: TestClient) -> None:
    idle = client.get(f"{API}/progress").json()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"], idle["textinfo"]) == (0, 0, None, None)
    thread, answers = in_background(client, {"prompt": "a cat", "steps": 1000, "force_task_id": "task(abc-1)"})
    seen = None
    while not (seen and seen["current_image"]):
        seen = client.get(f"{API}/progress").json()
        time.sleep(0.01)
    assert (
        0 < seen["progress"] < 1 and seen["state"]["sampling_steps"] == 1000 and seen["state"]["job"] == "task(abc-1)"
    )
    assert opened(seen["current_image"]).size == (4, 4)
    assert client.get(f"{API}/progress?skip_current_image=true").json()["current_image"] is None
    assert client.post(f"{API}/interrupt").json() == {}
    thread.join(10)
    assert len(answers[0]["images"]) == 1  # type: ignore[arg-type]
    assert client.get(f"{API}/progress").json()["state"]["job_count"] == 0


def test_requests_beyond_the_queue_are_refused_with_a_time(client: TestClient) -> None:
    """One runs, four wait; every one of twelve gets exactly one answer."""
    answers = []
    lock = threading.Lock()

    def post(k: int) -> None:
        answer = client.post(f"{API}/txt2img", json={"prompt": "a cat", "steps": 20 + k})
        with lock:
            answers.append(answer)

    threads = [threading.Thread(target=post, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = sorted(answer.status_code for answer in answers)
    assert len(statuses) == 12 and set(statuses) == {200, 429} and 4 <= statuses.count(200) <= 6
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and "the queue is full" in refused.json()["detail"]
