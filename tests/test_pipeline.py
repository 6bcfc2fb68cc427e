"""The pipeline on a tiny random model: what a call promises, whatever the weights."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd.errors import FastsdError
from fastsd.kernels import dispatch
from fastsd.kernels.candidates import ChoiceMode
from fastsd.kernels.choice import decide
from fastsd.pipeline import Pipeline
from fastsd.runtime.devices import resolve_dtype
from tests.support.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    y, x = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    area = np.zeros((64, 64), dtype=np.uint8)
    area[16:48, 8:40] = 255
    return Image.fromarray(area)


def pixels(result: fastsd.pipeline.Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def test_a_pipeline_says_what_it_is_in_a_line(pipe: Pipeline) -> None:
    """Its components too, without every layer of the networks."""
    assert repr(pipe) == f"<Pipeline of {pipe.components.name}, fp32 on cpu>"
    assert "Conv2d" not in repr(pipe.components) and "sample_size=" in repr(pipe.components)


def test_result_says_what_was_done(pipe: Pipeline) -> None:
    result = pipe(["a cat", "a dog"], num_images_per_prompt=2, seed=5)
    assert [image.size for image in result.images] == [(64, 64)] * 4
    assert result.seeds == [5, 6, 7, 8]
    assert result.parameters["sampler"] == "ddim" and result.parameters["num_inference_steps"] == 3
    assert set(result.timings) == {"text", "encode", "steps", "decode", "total", "steps_per_second"}


def test_a_random_seed_is_reported_and_repeats_the_image(pipe: Pipeline) -> None:
    first = pipe("a cat")
    again = pipe("a cat", seed=first.seeds[0])
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert pipe("a cat").seeds != first.seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(dtype=dtype)
    alone = [
        pixels(pipe(text, seed=seed, sampler="euler_a"))[0] for text, seed in (("a cat", 3), ("a dog", 4), ("x", 5))
    ]
    together = pixels(pipe(["a cat", "a dog", "x"], seed=3, sampler="euler_a"))
    in_twos = pixels(pipe(["a cat", "a dog", "x"], seed=3, sampler="euler_a", batch_size=2))
    np.testing.assert_array_equal(np.stack(alone), together)
    np.testing.assert_array_equal(together, in_twos)


def test_prompt_negative_prompt_and_guidance_matter(pipe: Pipeline) -> None:
    base = pixels(pipe("a cat", seed=1))
    for change in (
        {"prompt": "a dog"},
        {"negative_prompt": "blue"},
        {"guidance_scale": 3.0},
        {"guidance_rescale": 0.7},
    ):
        assert (pixels(pipe(**{"prompt": "a cat", "seed": 1, **change})) != base).any(), change


def test_guidance_of_one_runs_half_the_samples(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    denoise = pipe.components.unet.denoise

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        batches.append(len(x))
        return denoise(x, *rest)

    monkeypatch.setattr(pipe.components.unet, "denoise", counted)
    pipe("a cat", guidance_scale=1.0)
    pipe("a cat", guidance_scale=1.01)
    assert batches == [1] * 3 + [2] * 3


def test_stream_yields_every_step_and_the_result_last(pipe: Pipeline) -> None:
    steps = list(pipe.stream(["a", "b", "c"], seed=2, batch_size=2, num_inference_steps=4, sampler="heun"))
    assert [step.index for step in steps] == list(range(1, 9)) and all(step.total == 8 for step in steps)
    assert [step.result is None for step in steps] == [True] * 7 + [False]
    assert steps[1].preview().size == (64, 64)
    np.testing.assert_array_equal(
        pixels(steps[-1].result), pixels(pipe(["a", "b", "c"], seed=2, num_inference_steps=4, sampler="heun"))
    )


def test_arguments_are_checked_before_the_first_step(pipe: Pipeline) -> None:
    with pytest.raises(FastsdError, match="width is 63"):
        pipe.stream("a cat", width=63)


def test_output_types_agree(pipe: Pipeline) -> None:
    as_pil, as_np, as_pt, latent = (
        pipe("a cat", seed=1, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    np.testing.assert_array_equal(np.asarray(as_pil[0]), (as_np[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert latent.shape == (1, 4, 8, 8)
    decoded = pipe.decode(latent.permute(0, 2, 3, 1))[0]
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(as_pil[0]))


def test_given_latents_replace_the_seeds_noise(pipe: Pipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    np.testing.assert_array_equal(pixels(pipe("a", seed=9)), pixels(pipe("a", seed=1, latents=noise)))


def test_strength_decides_how_far_the_image_moves(pipe: Pipeline, photo: Image.Image) -> None:
    start = np.asarray(photo, dtype=np.float32)
    untouched = pixels(pipe("a cat", image=photo, strength=0.0, seed=1))[0]
    latents = [
        pipe("a", image=photo, strength=s, seed=1, num_inference_steps=10, output_type="latent").images
        for s in (0.0, 0.2, 0.9)
    ]
    near, far = ((latents[0] - other).abs().mean() for other in latents[1:])
    assert near < far
    assert untouched.shape == start.shape


def test_pixels_outside_the_mask_come_back_exactly(photo: Image.Image, mask: Image.Image) -> None:
    outside = np.asarray(mask) == 0
    for pipe in (tiny_pipeline(), tiny_pipeline(in_channels=9)):
        painted = pixels(pipe("a cat", image=photo, mask_image=mask, strength=1.0, seed=1))[0]
        np.testing.assert_array_equal(painted[outside], np.asarray(photo)[outside])
        middle = (slice(24, 40), slice(16, 32))
        assert (painted[middle] != np.asarray(photo)[middle]).mean() > 0.5


def test_an_image_and_mask_are_fitted_with_a_note(pipe: Pipeline, photo: Image.Image) -> None:
    odd = photo.resize((61, 75))
    result = pipe("a cat", image=odd, mask_image=Image.new("L", (10, 10), 255), seed=1)
    assert result.images[0].size == (56, 72)
    assert any("61x75 to 56x72" in note for note in result.notes) and any("mask was resized" in n for n in result.notes)


def test_a_black_image_is_decoded_again_in_fp32() -> None:
    pipe = tiny_pipeline(dtype=torch.float16)
    with torch.no_grad():  # beyond fp16's 65504 in the decoder's last map, fine in fp32
        pipe.components.vae.decoder.conv_in.weight.mul_(1e5)
    photo = pipe.decode(torch.randn(1, 8, 8, 4))[0]
    assert np.asarray(photo).std() > 0


BAD = {
    "prompt": [[], 3],
    "negative_prompt": [["a", "b"], 3],
    "num_inference_steps": [0, 1001, 2.5, "many", True, float("nan")],
    "guidance_scale": [-1, 101, float("inf"), "x"],
    "guidance_rescale": [-0.1, 1.1],
    "width": [0, 63, 8200, 64.0],
    "height": [-8, 65, None.__class__],
    "seed": [-2, 2**64, 1.5],
    "sampler": ["eular", 3],
    "schedule": ["karas"],
    "num_images_per_prompt": [0, 1001],
    "batch_size": [0],
    "strength": [-0.1, 1.1, float("nan")],
    "eta": [2],
    "clip_skip": [0, 3],
    "latents": [torch.zeros(1, 4, 4, 4), torch.full((1, 4, 8, 8), float("nan")), "noise"],
    "output_type": ["jpeg"],
    "image": ["photo.png"],
    "mask_image": [Image.new("L", (64, 64))],  # without an image
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_get_one_line_that_names_them(pipe: Pipeline, name: str, value: object) -> None:
    with pytest.raises(FastsdError) as caught:
        pipe(**{"prompt": "a cat", name: value})
    message = str(caught.value)
    assert "\n" not in message and name.split("_")[0] in message


def test_an_inpainting_model_asks_for_image_and_mask() -> None:
    with pytest.raises(FastsdError, match="image and mask_image"):
        tiny_pipeline(in_channels=9)("a cat")


def test_unknown_words_are_said(pipe: Pipeline) -> None:
    pipe = tiny_pipeline()
    pipe.components.known_words = frozenset({"a", "eight"})
    notes = pipe("a purple eight", seed=1).notes
    assert len(notes) == 1 and "'purple'" in notes[0]


@pytest.mark.parametrize(("device", "dtype"), [("tpu", "auto"), ("cuda:99", "auto"), ("cpu", "fp8"), ("meta", "auto")])
def test_unknown_devices_and_dtypes(device: str, dtype: str) -> None:
    with pytest.raises(FastsdError, match=r"device is|dtype is"):
        Pipeline.from_pretrained(None, device=device, dtype=dtype)


def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turing: only its name and capability are asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda", 0)
    for dtype in ("bf16", torch.bfloat16):
        with pytest.raises(FastsdError, match=r"Tesla T4 \(compute capability 7.5\) has no bf16: use fp16"):
            resolve_dtype(dtype, gpu)
    assert resolve_dtype("auto", gpu) == torch.float16 and resolve_dtype("fp32", gpu) == torch.float32


def test_too_little_memory_names_what_fits(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 200_000_000)
    with pytest.raises(FastsdError, match="would fit"):
        pipe("a cat", width=8192, height=8192)


def test_sizes_far_beyond_the_training_are_said(pipe: Pipeline) -> None:
    said = "trained at 64x64; at 128x96 it may repeat"
    assert any(said in note for note in pipe("a", width=128, height=96).notes)
    assert pipe("a", width=96, height=96).notes == []  # 1.5 times the side
    # The second pass holds on to what the first has drawn.
    assert pipe("a", hires_scale=2).notes == []


def test_how_ops_are_chosen_holds_in_every_part_of_a_call_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = tiny_pipeline(), []
    own.choice_mode = ChoiceMode(reproducible=True)
    backend = dispatch.backend

    def asked(*tensors: Any, **named: Any) -> str:
        seen.append(decide.mode())
        return backend(*tensors, **named)

    monkeypatch.setattr(dispatch, "backend", asked)
    for step in own.stream("a cat", seed=1, num_inference_steps=2):
        assert decide.mode() == ChoiceMode()  # what the caller does between two steps is its own
        step.preview()
    own.decode(step.latents)
    assert len(seen) > 100 and set(seen) == {own.choice_mode}


def test_loading_says_how_ops_are_chosen() -> None:
    assert Pipeline.from_pretrained("digits", device="cpu").choice_mode == ChoiceMode()
    given = Pipeline.from_pretrained("digits", device="cpu", reproducible=True, probe=False)
    assert given.choice_mode == ChoiceMode(reproducible=True, probe=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"generator": [torch.Generator()]}, "generator: it should be a torch.Generator, or a list of 2"),
        ({"noise": "batch", "noise_index": 2, "noise_count": 2}, "noise_index is 2; it should be below noise_count, 2"),
        ({"noise_count": 2}, "noise_count: noise cpu draws for each image alone"),
        ({"mask_blur": 2}, "mask_blur: given without mask_image"),
        ({"inpaint_only_masked": True}, "inpaint_only_masked: given without mask_image"),
    ],
)
def test_what_a_call_cannot_mean(pipe: Pipeline, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(FastsdError, match=re.escape(said)):
        pipe(["a cat", "a dog"], **arguments)


def test_what_asks_for_nothing_needs_nothing(pipe: Pipeline) -> None:
    """Programs pass all their settings, those that are off too."""
    off = {"mask_blur": 0, "mask_invert": False, "inpaint_only_masked": False}
    np.testing.assert_array_equal(pixels(pipe("a cat", seed=1, **off)), pixels(pipe("a cat", seed=1)))


def test_arguments_after_the_prompt_have_names(pipe: Pipeline) -> None:
    with pytest.raises(FastsdError, match="^only prompt may stand without a name; name the other arguments$"):
        pipe("a cat", "a dog")


def test_two_dtypes_contradict() -> None:
    with pytest.raises(FastsdError, match="torch_dtype is torch.float16; given with dtype fp32; leave one out"):
        Pipeline.from_pretrained(dtype="fp32", torch_dtype=torch.float16)
