from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.generate.control import Control
from fastsd.generate.image_prompts import ImagePrompt
from fastsd.image.metadata import read_texts, write_texts
from fastsd.pipeline import Pipeline
from fastsd.server.engine import PipelineEngine
from fastsd.server.jobs import (
    ControlChoice,
    Finished,
    ImagePromptChoice,
    ModelChoice,
    Order,
    UpscaleOrder,
    UpscalerChoice,
)
from fastsd.server.worker import EngineSettings, Watch
from fastsd.upscale.upscaler import Upscaler
from fastsd.weights.adapters.apply import Adapter
from tests.support import tiny
from tests.support.adapter_writers import small_lora
from tests.support.ip_adapters import write_adapter
from tests.support.pipelines import MASK, PHOTO, tiny_components
from tests.support.upscalers import write_upscaler

OPTIONS = {"dtype": "fp32", "device": "cpu"}
# 32 bits a number, summed in another order where several images run together: the last bits differ, so that a value
# halfway between two levels of 255 may round to either.
ONE_LEVEL = 1


class Quiet(Watch):
    """A watch without a server: it counts steps, and stops or ends after one of them."""

    def __init__(self, stop_after: int = 0, end_after: int = 0):
        self.stop_after, self.end_after, self.steps = stop_after, end_after, 0
        self.stopped = self.ended = False

    def step(self, index: int, total: int, preview: Any) -> bool:
        self.steps += 1
        self.stopped, self.ended = self.steps == self.stop_after, self.steps == self.end_after
        return self.stopped or self.ended


@pytest.fixture(scope="module")
def engine() -> PipelineEngine:
    return PipelineEngine(EngineSettings(OPTIONS))


@pytest.fixture
def choice(model: Path) -> ModelChoice:
    return ModelChoice("tiny", str(model))


def order(choice: ModelChoice, prompt: str, seed: int, count: int = 1, **arguments: Any) -> Order:
    return Order(choice, {"prompt": prompt, "seed": seed, "num_images_per_prompt": count, **arguments})


def pixels(finished: Finished) -> np.ndarray:
    return np.stack([np.asarray(image) for image in finished.images]).astype(int)


def test_images_of_a_shared_batch_are_those_of_a_run_alone(engine: PipelineEngine, choice: ModelChoice) -> None:
    """Other prompts, of other lengths too, other negative prompts, other seeds, and several images of one seed."""
    long = "a cat " * 60
    orders = (
        order(choice, "a cat", 1, negative_prompt="fog"),
        order(choice, "a dog", 7, count=2),
        order(choice, long, 3, sampler=None),
        order(choice, "a bird", 2**40),
    )
    together = engine.run(orders, 8, Quiet())
    pipe = Pipeline.from_pretrained(choice.path, **OPTIONS)
    for one, finished in zip(orders, together, strict=True):
        alone = pipe(**one.arguments)
        difference = np.abs(pixels(finished) - np.stack([np.asarray(image) for image in alone.images]))
        assert difference.max() <= ONE_LEVEL
        assert [each["seed"] for each in finished.settings] == alone.seeds
        assert finished.settings[0]["prompt"] == one.arguments["prompt"]


def test_no_client_gets_a_word_of_another_clients_text(engine: PipelineEngine) -> None:
    """Three requests are one batch; the notes, the settings and the file of each are about its own texts."""
    digits = ModelChoice("digits", None)
    shared: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}
    orders = (
        order(digits, "eight", 1, **shared),
        order(digits, "seven blorb", 2, count=2, **shared),
        order(digits, "two zorb", 3, negative_prompt="one", **shared),
    )
    assert len({one.key for one in orders}) == 1
    plain, blorb, zorb = engine.run(orders, 8, Quiet())
    assert plain.notes == []
    assert len(blorb.notes) == 1 and "does not know 'blorb'; its words" in blorb.notes[0]
    assert len(zorb.notes) == 2 and "does not know 'zorb'; its words" in zorb.notes[0]
    assert zorb.notes[1].startswith("the negative prompt has no effect")
    for finished, other in ((plain, "blorb"), (blorb, "zorb"), (zorb, "blorb")):
        assert all(other not in str(write_texts(each)) for each in finished.settings)


def test_one_order_gives_the_pixels_of_the_pipeline(engine: PipelineEngine, choice: ModelChoice) -> None:
    arguments = {"sampler": "dpm++2m", "schedule": "karras", "guidance_scale": 4.0, "width": 64, "height": 32}
    own = engine.run((order(choice, "a cat", 5, **arguments),), 8, Quiet())[0]
    alone = Pipeline.from_pretrained(choice.path, **OPTIONS)("a cat", seed=5, **arguments)
    np.testing.assert_array_equal(pixels(own)[0], np.asarray(alone.images[0]))


def test_files_say_how_an_image_was_made_and_not_where_its_model_lies(
    engine: PipelineEngine, choice: ModelChoice, model: Path
) -> None:
    finished = engine.run((order(choice, "a cat", 5, negative_prompt="fog"),), 8, Quiet())[0]
    texts = write_texts(finished.settings[0])
    assert str(model.parent) not in str(texts)
    settings, _ = read_texts(texts)
    assert settings["prompt"] == "a cat" and settings["negative_prompt"] == "fog" and settings["seed"] == 5
    assert settings["model"] == settings["model_path"] == "tiny" and settings["model_fingerprint"]


def test_a_run_ends_after_the_step_in_which_it_is_stopped(engine: PipelineEngine, choice: ModelChoice) -> None:
    watch = Quiet(stop_after=2)
    assert engine.run((order(choice, "a cat", 1, num_inference_steps=9),), 8, watch) == [] and watch.steps == 2
    watch = Quiet(end_after=3)
    finished = engine.run((order(choice, "a cat", 1, num_inference_steps=9),), 8, watch)[0]
    assert len(finished.images) == 1 and "interrupted after step 3 of 9" in finished.notes


def test_an_eta_of_1_leaves_a_sampler_without_one_as_it_is(engine: PipelineEngine, choice: ModelChoice) -> None:
    """The model's own: A1111's clients send an eta with every request."""
    pipe = engine._get(choice).pipe
    asked = order(choice, "a cat", 1, eta=1.0)
    with_noise = pixels(engine.run((asked,), 8, Quiet())[0])
    plain = pixels(engine.run((order(choice, "a cat", 1),), 8, Quiet())[0])
    assert pipe.defaults["sampler"] == "ddim" and not np.array_equal(with_noise, plain)
    pipe.defaults["sampler"] = "dpm++2m"
    try:
        expected = pixels(engine.run((order(choice, "a cat", 1),), 8, Quiet())[0])
        np.testing.assert_array_equal(pixels(engine.run((asked,), 8, Quiet())[0]), expected)
        with pytest.raises(FastsdError, match="eta: only ddim and tcd use it"):
            engine.run((order(choice, "a cat", 1, eta=0.5),), 8, Quiet())
    finally:
        pipe.defaults["sampler"] = "ddim"


def test_no_more_models_are_kept_than_asked_for(model: Path) -> None:
    engine = PipelineEngine(EngineSettings(OPTIONS, keep=2))
    for name in ("a", "b", "a", "c"):
        engine.load(ModelChoice(name, str(model)))
    assert engine.state()[1] == ("a", "c")
    engine.unload()
    assert engine.state()[1] == ()


def test_a_lora_that_is_not_there_is_refused_by_name(tmp_path: Path, choice: ModelChoice) -> None:
    engine = PipelineEngine(EngineSettings(OPTIONS, lora_dir=str(tmp_path)))
    wanted = Order(choice, {"prompt": "a <lora:sketch:0.5> cat", "seed": 1}, loras=(("sketch", 0.5, 0.5),))
    with pytest.raises(
        FastsdError, match="^prompt: <lora:sketch>: no such LoRA in lora_dir; there are none"
    ) as refused:
        engine.run((wanted,), 8, Quiet())
    assert refused.value.path is None  # which says where the folder lies


def test_a_t2i_adapter_acts_as_in_python(tmp_path: Path, model: Path, choice: ModelChoice) -> None:
    """The file says that it is no ControlNet; its weight and its share of the steps are the unit's."""
    file = tmp_path / "sketch.safetensors"
    save_file(tiny.t2i_adapter(tiny.UNET), file)
    pipe, parts = Pipeline.from_pretrained(model, **OPTIONS), {"weight": 0.8, "start": 0.0, "end": 0.5}
    steered = pipe("a cat", seed=5, controls=[Control(pipe.load_controlnet(file), PHOTO, **parts)]).images[0]
    wanted = Order(choice, {"prompt": "a cat", "seed": 5}, (ControlChoice("sketch", str(file), PHOTO, parts),))
    finished = PipelineEngine(EngineSettings(OPTIONS)).run((wanted,), 8, Quiet())[0]
    np.testing.assert_array_equal(pixels(finished)[0], np.asarray(steered))
    assert not np.array_equal(np.asarray(steered), np.asarray(pipe("a cat", seed=5).images[0]))
    assert finished.settings[0]["controls"] == [{"name": "sketch", "map": None, **parts}]


def test_loras_and_controlnets_act_as_in_python(tmp_path: Path, model: Path, choice: ModelChoice) -> None:
    """A tag's LoRA, and afterwards the model without it; a ControlNet by its file.

    Random numbers: the sum that `small_lora` takes of a layer's input is close to 0, and moves hardly a pixel.
    """
    numbers = torch.Generator().manual_seed(0)
    lora = {key: torch.randn(tensor.shape, generator=numbers) for key, tensor in small_lora().items()}
    save_file(lora, tmp_path / "ink.safetensors")
    save_file(tiny.controlnet(tiny.UNET), tmp_path / "net.safetensors")
    engine = PipelineEngine(EngineSettings(OPTIONS, lora_dir=str(tmp_path)))
    pipe = Pipeline.from_pretrained(model, **OPTIONS)
    plain = np.asarray(pipe("a cat", seed=5).images[0])
    pipe.set_adapters([Adapter(tmp_path / "ink.safetensors", 0.7, 0.7)])
    inked = np.asarray(pipe("a cat <lora:ink:0.7>", seed=5).images[0])
    pipe.set_adapters([])
    steered = pipe("a cat", seed=5, controls=[Control(pipe.load_controlnet(tmp_path / "net.safetensors"), PHOTO, 0.5)])

    tagged = Order(choice, {"prompt": "a cat <lora:ink:0.7>", "seed": 5}, loras=(("ink", 0.7, 0.7),))
    parts = {"weight": 0.5, "start": 0.0, "end": 1.0}
    control = ControlChoice("net", str(tmp_path / "net.safetensors"), PHOTO, parts)
    controlled = Order(choice, {"prompt": "a cat", "seed": 5}, (control,))
    first, second, third = (
        engine.run((one,), 8, Quiet())[0] for one in (tagged, order(choice, "a cat", 5), controlled)
    )
    np.testing.assert_array_equal(pixels(first)[0], inked)
    np.testing.assert_array_equal(pixels(second)[0], plain)
    np.testing.assert_array_equal(pixels(third)[0], np.asarray(steered.images[0]))
    assert not np.array_equal(inked, plain) and not np.array_equal(np.asarray(steered.images[0]), plain)
    assert first.settings[0]["loras"][0]["name"] == "ink.safetensors" and second.settings[0]["loras"] is None
    assert third.settings[0]["controls"] == [{"name": "net", "map": None, **parts}]


def test_images_are_enlarged(engine: PipelineEngine, tmp_path: Path) -> None:
    """As `fastsd.Upscaler` does it; a watch stops it after a tile, and an image that becomes too large is refused."""
    path = write_upscaler(tmp_path / "sharp.safetensors")
    chosen = UpscalerChoice("sharp", str(path))
    order = UpscaleOrder(chosen, PHOTO, (96, 90), 128 * 128)
    (found,) = engine.upscale(order, Quiet())
    expected = Upscaler.from_file(path, device="cpu")(PHOTO, size=(96, 90))
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(expected)) and found.notes == []
    assert engine.upscale(order, Quiet(stop_after=1)) == []
    with pytest.raises(FastsdError, match="sharp makes 0 million pixels of it"):
        engine.upscale(replace(order, pixels=128 * 128 - 1), Quiet())


def test_the_hires_fix_by_an_upscaler(engine: PipelineEngine, choice: ModelChoice, tmp_path: Path) -> None:
    path = write_upscaler(tmp_path / "sharp.safetensors")
    arguments = {"hires_scale": 1.5, "hires_strength": 0.5}
    asked = replace(order(choice, "a cat", 5, **arguments), upscaler=UpscalerChoice("sharp", str(path)))
    (own,) = engine.run((asked,), 8, Quiet())
    pipe = Pipeline.from_pretrained(choice.path, **OPTIONS)
    expected = pipe("a cat", seed=5, hires_upscaler=Upscaler.from_file(path, device="cpu"), **arguments).images[0]
    assert np.array_equal(np.asarray(own.images[0]), np.asarray(expected))
    assert own.settings[0]["hires_upscaler"] == "sharp"


def test_ip_adapters_act_as_in_python(tmp_path: Path, model: Path, choice: ModelChoice) -> None:
    file = write_adapter(tmp_path, tiny_components().unet)
    asked = order(choice, "a cat", 1)
    shown = replace(asked, image_prompts=(ImagePromptChoice("face", str(file), PHOTO, 0.6, MASK),))
    engine = PipelineEngine(EngineSettings(OPTIONS))
    (finished,) = engine.run((shown,), 4, Quiet())
    pipe = Pipeline.from_pretrained(model, **OPTIONS)
    prompt = ImagePrompt(pipe.load_ip_adapter(file), PHOTO, 0.6, MASK)
    expected = pipe(**asked.arguments, image_prompts=[prompt])
    np.testing.assert_array_equal(pixels(finished)[0], np.asarray(expected.images[0]))
    assert finished.settings[0]["image_prompts"] == [{"name": "face", "scale": 0.6}]
    (without,) = engine.run((asked,), 4, Quiet())
    np.testing.assert_array_equal(pixels(without)[0], np.asarray(pipe(**asked.arguments).images[0]))
