"""What a program written for diffusers met when it called fastsd instead, from one thread or from several."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.parameters import of_call
from fastsd.parameters.kinds import Choice, Switch
from fastsd.pipeline import Pipeline
from fastsd.weights.adapters.apply import Adapter
from tests.support.families import TOLERANCE, Families, latents_of
from tests.support.matching import relative_error
from tests.support.pipelines import MASK, PHOTO, latents, tiny_pipeline


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("family", "pipeline_class", "more"),
    [
        ("sd1", "StableDiffusionImg2ImgPipeline", {"strength": 0.6}),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", {"strength": 0.6}),
        ("sd1", "StableDiffusionInpaintPipeline", {"strength": 0.6, "mask_image": MASK}),
        ("inpainting", "StableDiffusionInpaintPipeline", {"strength": 1.0, "mask_image": MASK}),
    ],
)
def test_two_images_from_one_image_and_generator_are_diffusers(
    families: Families, family: str, pipeline_class: str, more: dict[str, Any]
) -> None:
    """diffusers encodes the image once, with one draw, and starts both from it (`prepare_latents`)."""
    import diffusers

    extra = {} if family == "sdxl" else {"safety_checker": None}
    theirs = getattr(diffusers, pipeline_class).from_pretrained(families.folder / family, **extra)
    theirs.set_progress_bar_config(disable=True)
    pipe = Pipeline.from_pretrained(families.folder / family, device="cpu", dtype="fp32")
    arguments = {"image": PHOTO, "num_inference_steps": 5, "guidance_scale": 4.0, "num_images_per_prompt": 2, **more}
    expected = latents_of(theirs, "a cat", generator=torch.Generator().manual_seed(3), **arguments)
    found = latents_of(pipe, "a cat", generator=torch.Generator().manual_seed(3), **arguments)
    assert relative_error(found, expected) < TOLERANCE


def test_interrupt_in_a_callback_ends_its_own_call_alone() -> None:
    """A server streams one image and makes another: the second's cancel used to end the first, and its start undid a
    cancel."""
    pipe = tiny_pipeline()
    expected = latents(pipe)
    stream = pipe.stream("a cat", seed=1, output_type="latent")
    next(stream)
    seen = []

    def stop(own: Any, step: int, timestep: Any, tensors: Any) -> None:
        own._interrupt = True
        seen.append((step, own._interrupt))

    pipe("a dog", seed=2, callback_on_step_end=stop)
    assert seen == [(0, True)] and not pipe._interrupt
    last = list(stream)[-1]
    assert last.result is not None and torch.equal(last.result.images, expected)


def test_interrupt_from_elsewhere_survives_the_start_of_another_call() -> None:
    pipe = tiny_pipeline()
    stream = pipe.stream("a cat", seed=1, output_type="latent")
    next(stream)
    pipe._interrupt = True
    assert not pipe("a dog", seed=2).notes
    last = list(stream)[-1]
    assert last.result is not None and last.result.notes == ["interrupted after step 1 of 3"]
    assert not pipe._interrupt and not pipe("a cat", seed=1).notes


def test_a_copy_that_would_share_weights_is_refused() -> None:
    """`copy.copy(pipe).to(torch.float16)` used to convert the first pipeline's weights too."""
    with pytest.raises(FastsdError, match="copy.deepcopy"):
        copy.copy(tiny_pipeline())


FLAGS = [row.name for row in of_call() if isinstance(row.kind, Switch)]
WORDS = [row.name for row in of_call() if isinstance(row.kind, Choice)]


def test_a_callback_that_sets_what_a_call_keeps_is_told_so() -> None:
    """diffusers' docs, "Dynamic classifier-free guidance", set `_guidance_scale`; here that had no effect."""

    def unguided(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return dict(tensors)

    with pytest.raises(AttributeError, match="no _guidance_scale to set: a call keeps it"):
        tiny_pipeline()("a cat", seed=1, callback_on_step_end=unguided)


@pytest.mark.parametrize("value", ["False", 0, None, np.zeros(3), torch.zeros(2)], ids=repr)
def test_flags_are_true_or_false(value: Any, tmp_path: Path) -> None:
    """ "False" used to count as true: `allow_pickle="False"` allowed pickles."""
    for name in FLAGS if value is not None else ():
        images = {"image": PHOTO, "mask_image": MASK}
        with pytest.raises(FastsdError, match=f"^{name} is .*; it should be True or False$"):
            tiny_pipeline()("a cat", **images, **{name: value})
    for call in (Pipeline.from_pretrained, tiny_pipeline().load_embedding, tiny_pipeline().load_controlnet):
        with pytest.raises(FastsdError, match="^allow_pickle.* it should be True or False$"):
            call(tmp_path, allow_pickle=value)


@pytest.mark.parametrize("name", WORDS)
def test_an_array_for_a_word_is_refused_in_one_line(name: str) -> None:
    kind = next(row.kind for row in of_call() if row.name == name)
    for value in (np.zeros((40, 3)), torch.zeros(40, 3)):
        with pytest.raises(FastsdError, match="it should be") as error:
            kind.check(value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, b"x", None, ["x"]], ids=repr)
def test_what_is_no_path_is_refused_by_name(value: Any) -> None:
    """These were TypeErrors from deep inside."""
    pipe = tiny_pipeline()
    calls: list[tuple[Any, str]] = [(pipe.load_embedding, "path"), (pipe.load_controlnet, "path"), (Adapter, "path")]
    if value is not None:
        calls += [(partial(Pipeline.from_pretrained, device="cpu"), "path")]
    for call, name in calls:
        with pytest.raises(FastsdError, match=f"^{name}.* it should be a path"):
            call(value)
    for name in ("vae", "refiner", "preview") if value is not None else ():
        with pytest.raises(FastsdError, match=f"^{name} is .* it should be a path"):
            Pipeline.from_pretrained(device="cpu", **{name: value})


@pytest.mark.parametrize("value", ["ink.safetensors", ["ink"], None, Adapter("ink")], ids=repr)
def test_what_is_no_list_of_adapters_is_refused(value: Any) -> None:
    """diffusers' `set_adapters` takes names; here it takes `fastsd.Adapter`s."""
    with pytest.raises(FastsdError, match="^adapters: it should be a list of fastsd.Adapter"):
        tiny_pipeline().set_adapters(value)


def test_latents_that_are_not_real_numbers_are_refused() -> None:
    pipe = tiny_pipeline()
    shape = latents(pipe).shape
    with pytest.raises(FastsdError, match="latents: it should hold real numbers"):
        pipe("a cat", latents=torch.zeros(shape, dtype=torch.complex64))
    with pytest.raises(FastsdError, match="real numbers"):
        pipe("a cat", callback_on_step_end=lambda *given: {"latents": given[3]["latents"].to(torch.complex64)})


def test_the_names_of_tensors_are_checked_without_a_callback() -> None:
    with pytest.raises(FastsdError, match="callback_on_step_end_tensor_inputs"):
        tiny_pipeline()("a cat", callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3), np.uint8), torch.zeros(1, 3, 64, 64)], ids=["np", "pt"])
def test_an_array_as_image_says_how_to_make_an_image_of_it(image: Any) -> None:
    with pytest.raises(FastsdError, match="image: should be a PIL image, not .*; Image.fromarray"):
        tiny_pipeline()("a cat", image=image)
