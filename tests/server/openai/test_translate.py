"""A parameter at the top level of a body does what it does in Python, with models of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.server.catalogue import Catalogue
from fastsd.server.engine import PipelineEngine
from fastsd.server.jobs import Order
from fastsd.server.limits import Limits
from fastsd.server.openai.bodies import ImageGeneration
from fastsd.server.openai.translate import translate
from fastsd.server.orders import make_order
from fastsd.server.settings import ServerSettings
from fastsd.server.worker import EngineSettings, Watch
from fastsd.upscale.upscaler import Upscaler
from fastsd.weights import save_folder
from tests.support.pipelines import tiny_components
from tests.support.upscalers import TINY_COMPACT, write_upscaler

OPTIONS = {"dtype": "fp32", "device": "cpu"}
CALLS: list[dict[str, Any]] = [
    {"timesteps": [900, 500, 300, 1], "refiner": "second", "refiner_switch": 0.5, "sampler": "euler"},
    {"sigmas": "9.5, 3, 0.5, 0", "refiner": "second", "refiner_switch": 0.5, "sampler": "dpm++2m"},
    {"eta": 0.5, "sampler": "ddim", "guidance_rescale": 0.5},
    {"spacing": "trailing", "guidance_start": 0.2, "guidance_end": 0.8, "clip_skip": 2, "vae_tiling": True},
    {"like": "a1111", "noise": "gpu", "ensd": 31337, "subseed": 3, "subseed_strength": 0.4, "sampler": "euler_a"},
    {"seed_resize_from": "48x64", "emphasis": "no_norm", "prompt": "a (cat:1.5)", "width": 64, "height": 48},
    {"noise": "batch", "noise_index": 1, "noise_count": 3, "prompt_syntax": "plain", "prompt": "a (cat:1.5)"},
    {"pag_scale": 2.0, "pag_adaptive_scale": 0.1, "pag_layers": "mid", "sampler": "euler", "schedule": "karras"},
    {"freeu": "1.1,1.2,0.9,0.2", "deepcache": 2, "deepcache_branch": 1},
    {"hires_scale": 1.5, "hires_strength": 0.6, "hires_steps": 3, "hires_upscaler": "Lanczos"},
    {"hires_scale": 2.0, "hires_upscaler": "double"},
]


class Unseen(Watch):
    """A run that nobody watches."""

    def __init__(self) -> None:
        self.stopped = self.ended = False

    def step(self, index: int, total: int, preview: Any) -> bool:
        return False


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Two models, the second with a UNet of its own, and an ESRGAN."""
    models, upscalers = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("upscalers")
    first, second = tiny_components(), tiny_components()
    with torch.no_grad():
        second.unet.conv_out.weight.mul_(-0.5)
    save_folder(first, models / "first", torch.float32)
    save_folder(second, models / "second", torch.float32)
    write_upscaler(upscalers / "double.safetensors", TINY_COMPACT)
    return Catalogue(ServerSettings(model=str(models / "first"), models_dir=str(models), upscaler_dir=str(upscalers)))


@pytest.fixture(scope="module")
def engine() -> Iterator[PipelineEngine]:
    yield PipelineEngine(EngineSettings(OPTIONS, keep=2))


def order_of(catalogue: Catalogue, **fields: Any) -> Order:
    body = ImageGeneration(**{"prompt": "a cat", "seed": 5, "steps": 4} | fields)
    return make_order(translate(body, catalogue, Limits()), "openai", catalogue.models[0], catalogue, Limits())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(call))
def test_a_parameter_does_what_it_does_in_python(
    call: dict[str, Any], catalogue: Catalogue, engine: PipelineEngine
) -> None:
    listed = "timesteps" in call or "sigmas" in call
    given = call | ({"steps": None} if listed else {})
    (finished,) = engine.run((order_of(catalogue, **given),), 4, Unseen())
    paths = {one.name: one.path for one in (*catalogue.models, *catalogue.upscalers)}
    arguments: dict[str, Any] = {"prompt": "a cat", "seed": 5, "num_inference_steps": None if listed else 4} | call
    pipe = Pipeline.from_pretrained(paths["first"], refiner=paths.get(arguments.pop("refiner", "")), **OPTIONS)
    if "hires_upscaler" in call:
        name = arguments["hires_upscaler"]
        arguments["hires_upscaler"] = Upscaler.from_file(paths[name]) if name in paths else name.lower()
    alone = pipe(**arguments).images[0]
    np.testing.assert_array_equal(np.asarray(finished.images[0]), np.asarray(alone))
    plain = pipe("a cat", seed=5, num_inference_steps=4).images[0]
    assert plain.size != alone.size or (np.asarray(plain) != np.asarray(alone)).any()  # it has an effect


@pytest.mark.parametrize(
    ("fields", "argument", "said"),
    [
        ({"refiner": "third"}, "refiner", "no such model is listed"),
        ({"refiner_switch": 0.5}, "refiner_switch", "given without {refiner}"),
        ({"hires_scale": 2, "hires_upscaler": "/etc/passwd"}, "hires_upscaler", "no such upscaler is listed"),
        ({"hires_upscaler": "double"}, "hires_upscaler", "given without {hires_scale}"),
    ],
)
def test_files_are_named_as_they_are_listed(
    fields: dict[str, Any], argument: str, said: str, catalogue: Catalogue
) -> None:
    with pytest.raises(FastsdError) as refused:
        order_of(catalogue, **fields)
    assert refused.value.argument == argument and said in refused.value.message
