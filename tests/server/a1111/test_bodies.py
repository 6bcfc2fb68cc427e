"""Bodies of every kind: what is sent at random is answered, and never with a 5xx."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.testclient import TestClient

from fastsd.server.a1111.bodies import REFUSED, ImageToImage, TextToImage
from fastsd.server.limits import Limits
from fastsd.server.openai.bodies import ImageGeneration
from fastsd.server.settings import ServerSettings
from tests.support.server import called, png

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=30),
    st.sampled_from(["", "None", "../../etc/passwd", "http://localhost/x", "<lora:x:1>", "((((", "\ud800"]),
    st.just("a" * 30000),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
GOOD: dict[str, Any] = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
ROUTES = {
    "/sdapi/v1/txt2img": (GOOD, (*TextToImage.model_fields, *REFUSED)),
    "/sdapi/v1/img2img": (GOOD | {"init_images": [png()]}, (*ImageToImage.model_fields, *REFUSED)),
    "/v1/images/generations": (
        {"prompt": "a cat", "steps": 2, "size": "64x64"},
        (*ImageGeneration.model_fields, "steps", "guidance", "sampler", "schedule", "seed", "hires_scale", "eta"),
    ),
    "/sdapi/v1/options": ({}, ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "emphasis", "like", "other")),
    "/sdapi/v1/png-info": ({"image": png()}, ("image",)),
    "/sdapi/v1/extra-single-image": ({"image": png()}, ("image", "upscaling_resize", "upscaler_1", "resize_mode")),
}
FINE = {200, 400, 404, 422}


@functools.cache
def client() -> TestClient:
    """One for all cases; it ends with the process."""
    context = called(ServerSettings(limits=Limits(side=512, images=4)))
    found = context.__enter__()
    found.context = context  # type: ignore[attr-defined]  # kept, or it would end here
    return found


@pytest.fixture(scope="module", autouse=True)
def ended() -> Any:
    yield
    client().context.__exit__(None, None, None)  # type: ignore[attr-defined]
    client.cache_clear()


def check(path: str, data: st.DataObject) -> None:
    good, names = ROUTES[path]
    body = good | data.draw(st.dictionaries(st.sampled_from(names), ODD, min_size=1, max_size=4))
    try:
        answer = client().post(path, json=body)
    except UnicodeEncodeError:  # half of a surrogate pair: no client can send it as UTF-8
        return
    assert answer.status_code in FINE, (answer.status_code, answer.text[:300], body)
    app: Any = client().app
    assert str(answer.status_code) in app.openapi()["paths"][path]["post"]["responses"]
    if answer.status_code != 200:
        error = answer.json()["error"] if path.startswith("/v1/") else answer.json()
        assert isinstance(error["message" if path.startswith("/v1/") else "detail"], str)


@pytest.mark.heavy
@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_makes_a_mistake(path: str, data: st.DataObject) -> None:
    check(path, data)


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_of_a_thousand_makes_a_mistake(path: str, data: st.DataObject) -> None:
    check(path, data)


def test_the_arguments_of_a1111s_own_scripts_are_fields() -> None:
    scripts = {"Sampler": {"args": [7, "Euler a", "Karras"]}, "Seed": {"args": [5, False, 6, 0.5, 0, 0]}}
    body = TextToImage.model_validate({"steps": 3, "alwayson_scripts": scripts | {"Other": {"args": [1]}}})
    assert (body.steps, body.sampler_name, body.scheduler, body.seed) == (7, "Euler a", "Karras", 5)
    assert body.subseed_strength == 0 and body.alwayson_scripts == {"Other": {"args": [1]}}
    scripts = {"Seed": {"args": [5, True, 6, 0.5, 64, 48]}, "Refiner": {"args": [True, "second", 0.6]}}
    body = TextToImage.model_validate({"alwayson_scripts": scripts})
    assert (body.seed, body.subseed, body.subseed_strength, body.seed_resize_from_w) == (5, 6, 0.5, 64)
    assert (body.refiner_checkpoint, body.refiner_switch_at) == ("second", 0.6)
    off = {"Refiner": {"args": [False, "second", 0.6]}}
    assert TextToImage.model_validate({"alwayson_scripts": off}).alwayson_scripts == off
    with pytest.raises(ValidationError, match="steps"):
        TextToImage.model_validate({"alwayson_scripts": {"sampler": {"args": ["many"]}}})
