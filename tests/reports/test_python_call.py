"""What a diffusers user tries first, and what people reported of calls from several threads."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd import Adapter, FastsdError, Pipeline
from fastsd.generate import habits
from fastsd.parameters import of_call
from fastsd.weights import save_folder
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_components, tiny_pipeline

PIPELINES = [
    f"StableDiffusion{family}{kind}Pipeline"
    for family in ("", "XL")
    for kind in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "InstructPix2Pix")
]
OWN = {"self", "kwargs", "args"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


# ---- the arguments


@pytest.mark.heavy
@pytest.mark.parametrize("name", PIPELINES)
def test_every_argument_of_diffusers_call_is_taken_or_answered(name: str) -> None:
    """The signatures of diffusers' own pipelines. What is refused is refused by its name, with what to use."""
    diffusers = pytest.importorskip("diffusers")
    taken = {row.name for row in of_call()}
    found = set(inspect.signature(getattr(diffusers, name).__call__).parameters) - OWN
    assert found <= taken | set(habits.CALL), sorted(found - taken - set(habits.CALL))
    assert not taken & set(habits.CALL)


@pytest.mark.heavy
@pytest.mark.parametrize("name", PIPELINES)
def test_every_method_of_a_diffusers_pipeline_is_there_or_says_what_to_use(name: str) -> None:
    """What people call on a pipeline: the public methods of diffusers' classes, but for what configs and hubs need."""
    diffusers = pytest.importorskip("diffusers")
    inside = (
        "check_ prepare_ get_ run_ decode_latents encode_image numpy_to_pil num_timesteps interrupt register_ "
        "extract_init_dict load_config to_json_ has_compatibles ignore_for_config config_name model_cpu_offload_seq "
        "text_encoder_name unet_name transformer_name do_classifier_free_guidance guidance_ clip_skip parameters "
        "cross_attention_kwargs denoising_ name_or_path pack_weights image_guidance_scale"
    ).split()
    public = {name for name in dir(getattr(diffusers, name)) if not name.startswith(("_", *inside))}
    ours = {name for name in dir(Pipeline) if not name.startswith("_")} | {"components", "device", "dtype"}
    assert public <= ours, sorted(public - ours)


@pytest.mark.parametrize("name", habits.CALL)
def test_an_argument_that_we_lack_says_what_to_use(name: str) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(FastsdError, match=f"^{name}: ") as caught:
        pipe("a cat", **{name: [1]})
    assert "\n" not in str(caught.value)


def test_arguments_that_are_none_are_not_given() -> None:
    """Wrappers of diffusers pass every argument, most of them None."""
    pipe = tiny_pipeline()
    nothing = dict.fromkeys([*habits.CALL, "generator", "callback_on_step_end"])
    assert torch.equal(latents(pipe, **nothing), latents(pipe))


@pytest.mark.parametrize("name", habits.ATTRIBUTES)
def test_a_method_that_we_lack_says_what_to_use(name: str) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(AttributeError, match=f"no {name}: .{{10}}"):
        getattr(pipe, name)
    with pytest.raises(AttributeError, match=f"no {name} to set: .{{10}}"):
        setattr(pipe, name, 1)
    assert not hasattr(pipe, name)


def test_a_safety_checker_can_be_set_to_none() -> None:
    """A line that many notebooks have."""
    pipe = tiny_pipeline()
    pipe.safety_checker = None
    assert pipe("a cat", seed=1).nsfw_content_detected is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("habits")
    save_folder(tiny_components(), path / "model")
    return path / "model"


def test_from_pretrained_takes_diffusers_arguments(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(
        folder, torch_dtype=torch.float32, variant="fp16", use_safetensors=True, safety_checker=None, device="cpu"
    )
    assert pipe.dtype == torch.float32


@pytest.mark.parametrize("name", habits.LOAD)
def test_from_pretrained_says_what_to_use(name: str, folder: Path) -> None:
    if name != "low_cpu_mem_usage":
        with pytest.raises(FastsdError, match=f"^{name}: .{{10}}"):
            Pipeline.from_pretrained(folder, device="cpu", **{name: "balanced"})


def test_an_unknown_argument_is_an_error_with_the_nearest_name(folder: Path) -> None:
    """docs/reference.md: bad input is a FastsdError, everywhere."""
    pipe = tiny_pipeline()
    tries: list[tuple[str, Any]] = [
        ("guidance_scal", lambda: pipe("a cat", guidance_scal=3)),
        ("few_stp", lambda: Pipeline.from_pretrained(folder, few_stp="lcm")),
        ("wieght", lambda: fastsd.Control(None, PHOTO, wieght=1)),
        ("txt", lambda: Adapter("ink.safetensors", txt=1)),
        ("alow_pickle", lambda: pipe.load_controlnet("x", alow_pickle=True)),
        ("tokn", lambda: pipe.load_embedding("x", tokn="a")),
        ("alow_partial", lambda: pipe.set_adapters([], alow_partial=True)),
        ("torch_dytpe", lambda: Pipeline.from_pretrained(folder, torch_dytpe=torch.float16)),
    ]
    for name, run in tries:
        with pytest.raises(FastsdError, match=f"^{name}: no such argument; did you mean") as caught:
            run()
        assert caught.value.argument == name


def test_where_no_name_is_near_all_are_named(folder: Path) -> None:
    pipe = tiny_pipeline()
    tries: list[tuple[str, str, Any]] = [
        ("weight", "path, unet, text$", lambda: Adapter("ink.safetensors", weight=1)),
        ("dtyp", "path, allow_pickle$", lambda: pipe.load_controlnet("x", dtyp=1)),
        ("zzz", "path, device, .*, probe$", lambda: Pipeline.from_pretrained(folder, zzz=1)),
    ]
    for name, names, run in tries:
        with pytest.raises(FastsdError, match=f"^{name}: no such argument; it takes {names}"):
            run()


# ---- what is taken


def test_a_generator_draws_as_its_seed() -> None:
    """diffusers' `randn_tensor` with a CPU generator: the noise of `torch.manual_seed(seed)`."""
    pipe = tiny_pipeline()
    result = pipe("a cat", generator=generator(7), output_type="latent")
    assert torch.equal(result.images, latents(pipe, seed=7)) and result.seeds == [7]
    both = pipe("a cat", num_images_per_prompt=2, generator=[generator(3), generator(9)], output_type="latent")
    assert both.seeds == [3, 9]
    for image, seed in zip(both.images, (3, 9), strict=True):
        assert torch.equal(image, latents(pipe, seed=seed)[0])


def test_one_generator_draws_for_all_images_like_diffusers() -> None:
    """One draw of the whole batch, whatever the size of ours."""
    pipe = tiny_pipeline()
    expected = latents(pipe, seed=7, num_images_per_prompt=3, noise="batch", sampler="euler_a")
    for size in (3, 2):
        given = {"generator": generator(7), "seed": None, "batch_size": size}
        found = latents(pipe, num_images_per_prompt=3, sampler="euler_a", **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_generator_moves_on() -> None:
    """Two calls with one generator are two images, in diffusers too; the second cannot be had from the seed."""
    pipe, one = tiny_pipeline(), generator(7)
    first = pipe("a cat", generator=one, output_type="latent")
    second = pipe("a cat", generator=one, output_type="latent")
    assert not torch.equal(first.images, second.images)
    assert not first.notes and "had drawn before" in second.notes[0]
    after = generator(7)
    torch.randn(1, 4, 8, 8, generator=after)
    assert torch.equal(second.images, latents(pipe, seed=None, latents=torch.randn(1, 4, 8, 8, generator=after)))


@pytest.mark.parametrize("given", [3, [3], [], [generator(1)] * 3])
def test_what_is_no_generator_is_refused(given: Any) -> None:
    with pytest.raises(FastsdError, match="^generator: it should be a torch.Generator, or a list of 2"):
        tiny_pipeline()("a cat", num_images_per_prompt=2, generator=given)


def test_a_generator_with_a_seed_is_refused() -> None:
    with pytest.raises(FastsdError, match="^generator: given with seed"):
        tiny_pipeline()("a cat", generator=generator(1), seed=1)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m"])
def test_a_callback_sees_and_replaces_the_latents(sampler: str) -> None:
    """diffusers' pipeline callbacks: (pipe, step, timestep, kwargs), and what is returned is taken."""
    pipe, seen = tiny_pipeline(), []

    def look(own: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert own is pipe and tensors["latents"].shape == (1, 4, 8, 8)
        seen.append((step, float(timestep)))
        return tensors

    plain = latents(pipe, sampler=sampler)
    assert torch.equal(latents(pipe, sampler=sampler, callback_on_step_end=look), plain)
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]

    def zero(own: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0} if step == 2 else tensors

    assert not latents(pipe, sampler=sampler, callback_on_step_end=zero).any()


def test_a_callback_works_where_steps_are_graphs() -> None:
    """The latents of a graph are buffers, which the callback's are copied into."""
    pipe, _ = graphed_pipeline()

    def half(own: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] / 2}

    eager = latents(tiny_pipeline(), callback_on_step_end=half)
    assert torch.equal(latents(pipe, callback_on_step_end=half), eager)


def test_interrupt_ends_the_call_after_the_step() -> None:
    """diffusers' docs, "Interrupt the diffusion process": `pipeline._interrupt = True` in a callback."""
    pipe = tiny_pipeline()

    def stop(own: Pipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        own._interrupt = step == 1
        return tensors

    result = pipe("a cat", seed=1, num_inference_steps=6, callback_on_step_end=stop)
    assert len(result.images) == 1 and result.notes == ["interrupted after step 2 of 6"]
    assert pipe("a cat", seed=1, num_inference_steps=6).notes == []


@pytest.mark.parametrize("returned", [3, {"latents": 3}, {"latents": torch.zeros(1)}, {"prompt_embeds": 3}])
def test_what_a_callback_may_not_return_is_said(returned: Any) -> None:
    with pytest.raises(FastsdError, match="^callback_on_step_end: it"):
        tiny_pipeline()("a cat", callback_on_step_end=lambda *_: returned)
    with pytest.raises(FastsdError, match="^callback_on_step_end_tensor_inputs: a list of latents"):
        tiny_pipeline()("x", callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_return_dict_false_is_a_tuple() -> None:
    """(images, has_nsfw_concept) of StableDiffusionPipeline, (images,) of StableDiffusionXLPipeline."""
    images, flags = tiny_pipeline()("a cat", seed=1, return_dict=False)
    assert images[0].size == (64, 64) and flags is None


def test_an_empty_prompt_generates() -> None:
    """Unconditional, as in diffusers and A1111."""
    assert tiny_pipeline()("", seed=1).images[0].size == (64, 64)


def test_np_and_pt_are_floats_of_the_decoder() -> None:
    """diffusers' VaeImageProcessor: (x / 2 + 0.5).clamp(0, 1), rounded to 8 bits for PIL alone."""
    pipe = tiny_pipeline()
    array = pipe("a cat", seed=1, output_type="np").images
    latent = latents(pipe).permute(0, 2, 3, 1)
    with torch.inference_mode():
        expected = (pipe.components.vae.decode(latent / 0.18215) / 2 + 0.5).clamp(0, 1).numpy()
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)
    assert (np.abs(array * 255 - (array * 255).round()) > 0.01).mean() > 0.5
    assert np.array_equal(pipe("a cat", seed=1, output_type="pt").images.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(pipe("a cat", seed=1).images[0]), (array[0] * 255).round().astype(np.uint8))


def test_known_pixels_of_np_are_the_images_own() -> None:
    """n / 255 in fp32, exactly, where the mask is black."""
    array = tiny_pipeline()("a cat", seed=1, image=PHOTO, mask_image=MASK, output_type="np").images[0]
    black = np.zeros((64, 64), dtype=bool)
    black[:16, 48:] = black[48:, :16] = True  # far from the white parts
    known = np.asarray(PHOTO, dtype=np.float32) / np.float32(255)
    np.testing.assert_array_equal(array[black], known[black])


def test_sdxls_sizes_are_conditioning() -> None:
    """Podell et al. 2023, section 2.2; the names and orders of StableDiffusionXLPipeline."""
    pipe = Pipeline(tiny.sdxl(), torch.device("cpu"), torch.float32)
    same: dict[str, Any] = {"num_inference_steps": 2, "width": 32, "height": 48, "guidance_scale": 3}
    plain = latents(pipe, **same)
    own = {"original_size": (48, 32), "target_size": (48, 32), "crops_coords_top_left": (0, 0)}
    assert torch.equal(latents(pipe, **same, **own), plain)
    for name in (*own, "negative_original_size", "negative_target_size", "negative_crops_coords_top_left"):
        assert not torch.equal(latents(pipe, **same, **{name: (100, 7)}), plain), name
    with pytest.raises(FastsdError, match=r"^original_size is 5; it should be two whole numbers"):
        pipe("a cat", original_size=5)


# ---- copies, other devices, threads


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = (torch.randn(*shape, generator=generator(5)) for shape in ((2, 32), (32, 2)))
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_pipeline_can_be_copied_and_pickled(way: Any, lora: Path) -> None:
    """A copy has the weights, with adapters that it can remove, and shares nothing with the first."""
    pipe, _ = graphed_pipeline()
    plain = latents(pipe)
    pipe.set_adapters([Adapter(lora)])
    other = way(pipe)
    assert torch.equal(latents(other), latents(pipe))
    other.set_adapters([])
    assert torch.equal(latents(other), plain) and not torch.equal(latents(pipe), plain)


def test_to_moves_and_returns_the_pipeline(lora: Path) -> None:
    pipe = tiny_pipeline()
    plain = latents(pipe)
    pipe.set_adapters([Adapter(lora)])
    adapted = latents(pipe)
    assert pipe.to("cpu") is pipe and torch.equal(latents(pipe), adapted)
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16 and pipe.components.unet.conv_in.weight.dtype == torch.bfloat16
    assert pipe("a cat", seed=1).parameters["dtype"] == "bf16"
    pipe.to(torch.device("cpu"), dtype=torch.float32).set_adapters([])
    assert not torch.equal(latents(pipe), plain)  # rounded to bf16
    for wrong in ((), ("cpu", 3.5), ("nowhere",), (torch.float64,)):
        with pytest.raises(FastsdError):
            pipe.to(*wrong)


def test_to_fp16_keeps_an_autoencoder_that_overflows_in_fp32_on_the_cpu() -> None:
    """`force_upcast` of SDXL's autoencoder."""
    from dataclasses import replace

    components = tiny_components()
    components.vae.config = replace(components.vae.config, force_upcast=True)
    pipe = Pipeline(components, torch.device("cpu"), torch.float32).to(torch.float16)
    assert next(pipe.components.vae.parameters()).dtype == torch.float32
    assert pipe.components.unet.conv_in.weight.dtype == torch.float16


def test_adapters_do_not_change_under_a_stream(lora: Path) -> None:
    """An image of half the steps with a LoRA and half without belongs to neither."""
    pipe = tiny_pipeline()
    plain = latents(pipe)
    steps = pipe.stream("a cat", seed=1, output_type="latent")
    next(steps)
    for change in (lambda: pipe.set_adapters([Adapter(lora)]), lambda: pipe.to(torch.bfloat16)):
        with pytest.raises(FastsdError, match="while a stream is under way .*; finish the stream or close it"):
            change()
    assert torch.equal(list(steps)[-1].result.images, plain)
    made = pipe.stream("a cat", seed=1)
    pipe.set_adapters([Adapter(lora)])
    with pytest.raises(FastsdError, match="changed since the stream was made; make it again"):
        next(made)
    begun = pipe.stream("a cat", seed=1)
    next(begun)
    begun.close()
    pipe.set_adapters([])


def test_adapters_of_another_thread_wait_for_a_call(lora: Path) -> None:
    """Each image has the weights that it began with."""
    pipe = tiny_pipeline()
    settings = {"num_inference_steps": 12}
    plain = latents(pipe, **settings)
    pipe.set_adapters([Adapter(lora)])
    adapted = latents(pipe, **settings)
    found: list[torch.Tensor] = []
    caller = threading.Thread(target=lambda: found.extend(latents(pipe, **settings) for _ in range(6)))
    caller.start()
    for i in range(20):
        pipe.set_adapters([Adapter(lora)] if i % 2 else [])
    caller.join()
    assert len(found) == 6 and all(torch.equal(one, plain) or torch.equal(one, adapted) for one in found)


def test_images_is_a_list_of_pil_images() -> None:
    assert isinstance(tiny_pipeline()("a cat").images[0], Image.Image)
