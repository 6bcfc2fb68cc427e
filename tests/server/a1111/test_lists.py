from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image
from starlette.testclient import TestClient

from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from fastsd.server.settings import ServerSettings
from tests.support.server import called, encoded, opened, png

API = "/sdapi/v1"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("files")
    for name in (
        "models/one.safetensors",
        "models/deep/two.safetensors",
        "models/broken.safetensors",
        "loras/ink.safetensors",
        "upscalers/deep/4x-Sharp.safetensors",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / "models" / "old.ckpt").write_bytes(b"x")
    (root / "models" / "folder").mkdir()
    (root / "models" / "folder" / "model_index.json").write_text("{}")
    folders = {"models_dir": "models", "lora_dir": "loras", "upscaler_dir": "upscalers"}
    settings = ServerSettings(**{flag: str(root / name) for flag, name in folders.items()})  # type: ignore[arg-type]
    with called(settings) as found:
        found.root = root  # type: ignore[attr-defined]
        yield found


def test_models_are_listed_with_hashes_and_without_their_folder(client: TestClient) -> None:
    client.post(f"{API}/refresh-checkpoints")
    models = {one["model_name"]: one for one in client.get(f"{API}/sd-models").json()}
    assert set(models) == {"digits", "folder", "deep/two", "one", "broken"}  # and no pickle
    assert set(models["one"]) == {"title", "model_name", "hash", "sha256", "filename", "config"}
    assert models["one"]["title"] == f"one.safetensors [{models['one']['hash']}]" and len(models["one"]["sha256"]) == 64
    everything = "".join(client.get(f"{API}/{name}").text for name in ("sd-models", "loras", "embeddings", "options"))
    assert str(client.root) not in everything  # type: ignore[attr-defined]


def test_the_lists_have_what_the_folders_hold_now(client: TestClient) -> None:
    new = client.root / "models" / "new.safetensors"  # type: ignore[attr-defined]
    new.write_bytes(b"new")
    assert "new" in [one["model_name"] for one in client.get(f"{API}/sd-models").json()]
    assert client.post(f"{API}/options", json={"sd_model_checkpoint": "new"}).status_code == 200
    client.post(f"{API}/options", json={"sd_model_checkpoint": "digits"})
    new.unlink()
    assert "new" not in [one["id"] for one in client.get("/v1/models").json()["data"]]


def test_options_switch_the_model(client: TestClient) -> None:
    before = client.get(f"{API}/options").json()
    assert {"samples_format", "sd_model_checkpoint", "CLIP_stop_at_last_layers"} <= before.keys()
    assert client.post(f"{API}/options", json=before).json() == {}  # Open WebUI sends the whole object back
    assert client.post(f"{API}/options", json={"sd_model_checkpoint": "deep/two"}).status_code == 200
    assert client.get("/ready").json()["model"] == "deep/two"
    assert client.get(f"{API}/options").json()["sd_model_checkpoint"].startswith("deep/two.safetensors")
    for model, said in (("three", "no such model is listed"), ("broken", "it is damaged")):
        answer = client.post(f"{API}/options", json={"sd_model_checkpoint": model})
        assert answer.status_code == 422 and said in answer.json()["detail"]
        assert client.get("/ready").json()["model"] == "deep/two"
    client.post(f"{API}/options", json={"sd_model_checkpoint": "digits"})


def test_options_are_what_requests_start_from(client: TestClient) -> None:
    assert client.post(f"{API}/options", json={"CLIP_stop_at_last_layers": 2}).status_code == 200
    assert client.get(f"{API}/options").json()["CLIP_stop_at_last_layers"] == 2
    assert "Clip skip: 2" in client.post(f"{API}/txt2img", json={"prompt": "a cat"}).json()["info"]
    client.post(f"{API}/options", json={"CLIP_stop_at_last_layers": 1})
    for wrong in ({"outdir_samples": "/etc"}, {"CLIP_stop_at_last_layers": 1000}, {"randn_source": 5}):
        assert client.post(f"{API}/options", json=wrong).status_code == 422


def test_names(client: TestClient) -> None:
    samplers = client.get(f"{API}/samplers").json()
    assert len(samplers) == len(SAMPLERS) and all(set(one) == {"name", "aliases", "options"} for one in samplers)
    schedulers = client.get(f"{API}/schedulers").json()
    assert {"automatic", *SCHEDULES} == {one["name"] for one in schedulers}
    upscalers = {one["name"]: one["model_path"] for one in client.get(f"{API}/upscalers").json()}
    assert upscalers == {"None": None, "Lanczos": None, "Nearest": None, "deep/4x-Sharp": "deep/4x-Sharp.safetensors"}
    modes = [one["name"] for one in client.get(f"{API}/latent-upscale-modes").json()]
    assert modes[0] == "Latent" and "Latent (nearest-exact)" in modes and len(modes) == 6
    assert [one["alias"] for one in client.get(f"{API}/loras").json()] == ["ink"]
    for name in ("sd-vae", "sd-modules", "hypernetworks", "face-restorers", "prompt-styles"):
        assert client.get(f"{API}/{name}").json() == []
    assert client.get(f"{API}/scripts").json() == {"txt2img": [], "img2img": []}
    assert client.get(f"{API}/memory").json()["ram"]["total"] > 0 and client.get(f"{API}/cmd-flags").json()["api"]
    for name in ("model_list", "module_list", "version"):
        assert client.get(f"/controlnet/{name}").status_code == 200


def test_what_is_not_here_is_refused_by_name(client: TestClient) -> None:
    answer = client.post(f"{API}/interrogate", json={"image": png()})
    assert answer.status_code == 404 and answer.json()["detail"].startswith("interrogate is not supported")


def test_every_sampler_and_scheduler_that_is_listed_is_taken(client: TestClient) -> None:
    for name in [name for one in client.get(f"{API}/samplers").json() for name in (one["name"], *one["aliases"])]:
        answer = client.post(f"{API}/txt2img", json={"prompt": "a cat", "sampler_name": name, "send_images": False})
        assert answer.status_code == 200, (name, answer.text)
    for one in client.get(f"{API}/schedulers").json():
        body = {"prompt": "a cat", "sampler_name": "Euler", "scheduler": one["name"], "send_images": False}
        assert client.post(f"{API}/txt2img", json=body).status_code == 200, one


def test_png_info_reads_what_the_server_wrote(client: TestClient) -> None:
    image = client.post(f"{API}/txt2img", json={"prompt": "a cat", "negative_prompt": "fog", "seed": 5}).json()[
        "images"
    ][0]
    found = client.post(f"{API}/png-info", json={"image": image}).json()
    assert found["info"].startswith("a cat\nNegative prompt: fog\n") and "fastsd" in found["items"]
    assert found["parameters"]["Seed"] == "5" and found["parameters"]["Prompt"] == "a cat"
    assert client.post(f"{API}/png-info", json={"image": png()}).json() == {"info": "", "items": {}, "parameters": {}}


def test_images_are_enlarged(client: TestClient) -> None:
    given = encoded(Image.linear_gradient("L").resize((8, 4)))
    body = {"image": given, "upscaler_1": "Lanczos", "upscaling_resize": 4}
    made = [opened(client.post(f"{API}/extra-single-image", json=body).json()["image"])]
    made.append(opened(client.post(f"{API}/extra-single-image", json=body | {"upscaler_1": "Nearest"}).json()["image"]))
    assert [one.size for one in made] == [(32, 16)] * 2 and made[0].tobytes() != made[1].tobytes()
    for wrong in ({"upscaler_1": "ESRGAN"}, {"image": "http://x/y.png"}, {"upscaling_resize": 1000}):
        assert client.post(f"{API}/extra-single-image", json=body | wrong).status_code == 422


def test_images_are_enlarged_by_a_listed_upscaler(client: TestClient) -> None:
    """In the worker, with its turn in the queue; to a size, too."""
    body = {"image": png((8, 4)), "upscaler_1": "4x-sharp", "upscaling_resize": 3}
    answer = client.post(f"{API}/extra-single-image", json=body).json()
    assert opened(answer["image"]).size == (24, 12) and answer["html_info"] == "by deep/4x-Sharp"
    sized = body | {"resize_mode": 1, "upscaling_resize_w": 5, "upscaling_resize_h": 6}
    assert opened(client.post(f"{API}/extra-single-image", json=sized).json()["image"]).size == (5, 6)
    answer = client.post(f"{API}/extra-single-image", json=body | {"upscaler_1": "4x-Sharq"})
    assert answer.status_code == 422
    assert answer.json()["detail"].endswith("(nearest-exact), Lanczos, Nearest")
    assert str(client.root) not in client.get(f"{API}/upscalers").text  # type: ignore[attr-defined]


@pytest.mark.parametrize("side", [8000, 20000])
def test_a_decompression_bomb_is_refused_by_its_header(client: TestClient, side: int) -> None:
    """A file of 100 bytes that claims 192 MB or 1.2 GB."""
    data = bytearray(base64.b64decode(png((1, 1), 0, "L")))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    answer = client.post(f"{API}/png-info", json={"image": base64.b64encode(bytes(data)).decode()})
    assert answer.status_code == 422 and "pixels; at most" in answer.json()["detail"]
