"""Clients that are Python packages, unchanged, against a server at a port."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastsd.server.settings import ServerSettings
from tests.support.empty_model import colour
from tests.support.server import listening, opened

USER, PASSWORD, KEY = "ada", "a very long password", "a key of some length"
FOLDERS = {"models_dir": "models", "lora_dir": "loras", "controlnet_dir": "controls"}
PHOTO = Image.new("RGB", (64, 48), (1, 2, 3))
MASK = Image.new("L", (64, 48), 255)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    root = tmp_path_factory.mktemp("files")
    for name in ("models/one", "models/two", "loras/ink", "controls/canny"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / f"{name}.safetensors").write_bytes(name.encode())
    folders = {"models_dir": str(root / "models"), "lora_dir": str(root / "loras")}
    settings = ServerSettings(
        **folders, controlnet_dir=str(root / "controls"), user=USER, password=PASSWORD, api_key=KEY
    )
    with listening(settings, 0.002, (USER, PASSWORD)) as found:
        yield found


def first(image: Any) -> Any:
    """The colour by which the empty model says its seed."""
    return image.convert("RGB").getpixel((0, 0))


def file(image: Image.Image) -> io.BytesIO:
    found = io.BytesIO()
    image.save(found, "PNG")
    found.name = "image.png"
    found.seek(0)
    return found


def test_webuiapi(port: int) -> None:
    webuiapi = pytest.importorskip("webuiapi", reason="needs webuiapi")
    api = webuiapi.WebUIApi(port=port, username=USER, password=PASSWORD)
    for options in ({}, {"enable_hr": True, "hr_upscaler": webuiapi.HiResUpscaler.Latent}):
        made = api.txt2img(prompt="a cat", negative_prompt="fog", seed=3, batch_size=2, **options)
        assert [first(image) for image in made.images] == [colour(3), colour(4)]
        assert made.info["all_seeds"] == [3, 4] and made.parameters["prompt"] == "a cat"
    unit = webuiapi.ControlNetUnit(image=PHOTO, model="canny")
    assert api.txt2img(prompt="a cat", seed=5, controlnet_units=[unit]).info["seed"] == 5
    assert api.img2img(images=[PHOTO], prompt="a cat", seed=6, width=64, height=48).image.size == (64, 48)
    assert first(
        api.img2img(images=[PHOTO], mask_image=MASK, inpainting_fill=1, prompt="a cat", seed=6).image
    ) == colour(6)
    assert api.extra_single_image(PHOTO, upscaler_1=webuiapi.Upscaler.Lanczos).image.size == (128, 96)
    assert api.png_info(made.image).info.startswith("a cat\nNegative prompt: fog\nSteps: 20")
    for name in ("one.safetensors", "digits"):
        api.util_set_model(name)
        assert api.util_get_current_model().startswith(name)
    api.util_wait_for_ready(0.01)
    names = [name for name in dir(api) if name.startswith("get_") and name not in ("get_endpoint",)]
    for name in (*names, "refresh_checkpoints", "interrupt", "skip", "controlnet_version", "controlnet_model_list"):
        answer = getattr(api, name)()
        assert "detail" not in str(answer) or name.startswith("get_artist"), (name, answer)  # A1111 has dropped artists
    with pytest.raises(RuntimeError, match="faces are not restored"):
        api.txt2img(prompt="a cat", restore_faces=True)


def test_sd_backend_client(port: int) -> None:
    client = pytest.importorskip("sd_backend_client", reason="needs sd-backend-client, and Python 3.11")
    backend = client.connect_to_backend(f"http://127.0.0.1:{port}", lambda: (USER, PASSWORD))
    assert type(backend) is client.A1111Webservice  # it looked for ComfyUI first
    assert [one.name for one in backend.list_checkpoints()] == ["digits", "one.safetensors", "two.safetensors"]
    assert [one.name for one in backend.list_loras()] == ["ink"] and backend.get_capabilities().controlnet
    assert backend.list_samplers() and backend.list_schedulers() and backend.list_upscalers()
    Params, size = client.DiffusionParams, {"width": 64, "height": 48}
    (net,) = backend.list_controlnet_models()
    unit = client.ControlNetUnit(image=PHOTO, model=net, control_strength=0.5)
    assert {"none", "canny"} <= {one.name for one in backend.get_controlnet_preprocessors()}
    assert "canny" in backend.get_controlnet_type_categories()["All"]["model_list"]
    for handle in (
        backend.submit_txt2img(Params(prompt="a cat", seed=7)),
        backend.submit_txt2img(Params(prompt="a cat", seed=7, sampler="dpmpp_2m", scheduler="karras", **size)),
        backend.submit_txt2img(Params(prompt="a cat", seed=7, controlnet_units=[unit], **size)),
        backend.submit_img2img(Params(prompt="a cat", seed=7, init_images=[PHOTO], **size)),
        backend.submit_inpaint(Params(prompt="a cat", seed=7, init_images=[PHOTO], mask=MASK, **size)),
    ):
        done = handle.wait()
        assert done.seeds == [7] and [first(image) for image in done.images] == [colour(7)]
    assert backend.submit_upscale(PHOTO, 128, 96).wait().images[0].size == (128, 96)
    handle = backend.submit_txt2img(Params(prompt="a cat", steps=1000))
    while handle.poll().progress in (None, 0):
        assert handle.poll().status.value in ("pending", "active")
    handle.cancel()
    while (status := handle.poll().status.value) == "active":
        time.sleep(0.01)
    assert status == "cancelled"
    wrong = client.A1111Webservice(f"http://127.0.0.1:{port}", lambda: None)
    with pytest.raises(client.AuthError):
        wrong.list_checkpoints()


def test_openai(port: int) -> None:
    openai = pytest.importorskip("openai", reason="needs openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    assert [one.id for one in client.models.list()] == ["digits", "one", "two"]
    assert client.models.retrieve("one").owned_by == "fastsd"
    own = {"seed": 7, "steps": 5, "guidance": 4, "sampler": "dpm++2m", "negative_prompt": "fog"}
    made = client.images.generate(prompt="a cat", model="digits", n=2, size="64x48", extra_body=own)
    assert [first(opened(one.b64_json)) for one in made.data] == [colour(7), colour(8)]
    assert made.size == "64x48" and made.output_format == "png"
    kinds = {"quality": "high", "style": "vivid", "moderation": "low", "background": "opaque", "user": "ada"}
    made = client.images.generate(prompt="a cat", output_format="webp", output_compression=80, size="auto", **kinds)
    assert opened(made.data[0].b64_json).format == "WEBP"
    made = client.images.generate(prompt="a cat", response_format="url")
    assert made.data[0].url.startswith("data:image/png;base64,")
    transparent = file(Image.new("RGBA", (64, 48)))
    for files in ({"image": file(PHOTO)}, {"image": [file(PHOTO)], "mask": transparent, "size": "64x48"}):
        made = client.images.edit(prompt="a cat", extra_body={"seed": 9, "strength": 0.5}, **files)
        assert first(opened(made.data[0].b64_json)) == colour(9)
    for stream, kind in (
        (client.images.generate(prompt="a cat", stream=True, partial_images=2), "image_generation"),
        (client.images.edit(image=file(PHOTO), prompt="a cat", stream=True, partial_images=2), "image_edit"),
    ):
        *partial, last = list(stream)
        assert [one.type for one in partial] == [f"{kind}.partial_image"] * 2 and last.type == f"{kind}.completed"
        assert [one.partial_image_index for one in partial] == [0, 1] and opened(last.b64_json)
    for call, error, param in (
        (lambda: client.images.generate(prompt="a cat", model="dall-e-3"), openai.NotFoundError, "model"),
        (lambda: client.images.generate(prompt="a cat", size="huge"), openai.UnprocessableEntityError, "size"),
        (lambda: client.models.retrieve("three"), openai.NotFoundError, "model"),
    ):
        with pytest.raises(error) as refused:
            call()
        assert refused.value.param == param and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_sd_parsers_reads_the_settings_in_the_servers_images(port: int, kind: str, tmp_path: Path) -> None:
    parsers = pytest.importorskip("sd_parsers", reason="needs sd-parsers")
    openai = pytest.importorskip("openai", reason="needs openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY)
    own = {"seed": 7, "steps": 5, "guidance": 4, "sampler": "dpm++2m", "schedule": "karras", "negative_prompt": "fog"}
    made = client.images.generate(prompt="a cat, (red:1.2)", output_format=kind, extra_body=own)
    path = tmp_path / f"image.{kind}"
    path.write_bytes(base64.b64decode(made.data[0].b64_json))
    found = parsers.ParserManager().parse(path)
    assert found.generator == "AUTOMATIC1111"
    assert (found.full_prompt, found.full_negative_prompt) == ("a cat, (red:1.2)", "fog")
    (sampler,) = found.samplers
    known = {"steps": "5", "seed": "7", "cfg_scale": "4"}
    assert sampler.name == "DPM++ 2M" and known.items() <= sampler.parameters.items()
