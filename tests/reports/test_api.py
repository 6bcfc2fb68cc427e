"""What people reported of the Python call: habits from diffusers, and what other code in the process has set."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd import Adapter, Control, Pipeline
from fastsd.train.training import train
from fastsd.weights import save_folder
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, latents, tiny_components, tiny_pipeline
from tests.support.training import write_config

ROOT = Path(__file__).parents[2]
HIRES = {"hires_scale": 1.5, "hires_strength": 0.7}
MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": PHOTO, "strength": 0.7},
    "mask": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "hires": HIRES,
    "rescaled": {"guidance_rescale": 0.7},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guidance", [0, 0.5])
def test_guidance_0_follows_the_prompt(guidance: float, mode: str) -> None:
    """At most 1 is no guidance: diffusers' `do_classifier_free_guidance` in pipeline_stable_diffusion.py is
    `guidance_scale > 1`, and the model cards of SD-Turbo and SDXL-Turbo say 0.0."""
    pipe = tiny_pipeline()
    expected = latents(pipe, guidance_scale=1, **MODES[mode])
    torch.testing.assert_close(latents(pipe, guidance_scale=guidance, **MODES[mode]), expected, rtol=0, atol=0)
    result = pipe("a cat", seed=1, guidance_scale=guidance, negative_prompt="fog", **MODES[mode])
    assert result.parameters["guidance_scale"] == guidance
    assert any("negative prompt has no effect" in note for note in result.notes)


@pytest.mark.parametrize("like", ["a1111", "comfy"])
def test_guidance_below_1_mixes_where_a1111_and_comfyui_do(like: str) -> None:
    """A1111's `combine_denoised` is uncond + scale (cond - uncond) at any scale; ComfyUI's `cfg_function` too. At 0 it
    is the negative prompt alone."""
    pipe = tiny_pipeline()
    swapped = latents(pipe, "fog", negative_prompt="a cat", guidance_scale=0, like=like)
    torch.testing.assert_close(swapped, latents(pipe, "a cat", guidance_scale=1, like=like), rtol=0, atol=1e-4)
    assert not torch.equal(swapped, latents(pipe, "fog", guidance_scale=1, like=like))


def test_guidance_0_with_a_controlnet_follows_the_prompt() -> None:
    """As without one."""
    import fastsd
    from fastsd.config import ControlNetConfig
    from fastsd.model.controlnet import ControlNet

    pipe = tiny_pipeline()
    torch.manual_seed(3)
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8, 8, 8)))
    controls = [fastsd.Control(net, PHOTO)]
    expected = latents(pipe, guidance_scale=1, controls=controls)
    assert torch.equal(latents(pipe, guidance_scale=0, controls=controls), expected)


# ---- what other code in the process has set


FACTORIES = frozenset(
    "tensor as_tensor zeros ones full empty arange linspace logspace eye randn rand randint randperm".split()
)
LAYERS = ("Linear", "Conv2d", "Embedding", "LayerNorm", "GroupNorm", "BatchNorm2d")
# Weights are made where `with torch.device(...)` says: on no device for loading, on the CPU for training.
FOLLOW_THE_CONTEXT = (
    *("model/layers.py", "model/linear.py", "model/conv2d.py", "model/clip.py", "model/vision.py"),
    *("model/ip_adapter.py", "model/upscalers.py", "evaluate/inception.py"),
)


def test_no_tensor_is_made_without_dtype_and_device() -> None:
    """`torch.set_default_dtype` and `torch.set_default_device` change what such a call makes."""
    wrong = []
    for path in sorted((ROOT / "fastsd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            module, name = node.func.value, node.func.attr
            given = {word.arg for word in node.keywords}
            if not (isinstance(module, ast.Name) and None not in given):
                continue
            if module.id == "torch" and name in FACTORIES:
                needed = {"dtype", "device"}
            elif module.id == "torch" and name == "Generator" and not node.args:
                needed = {"device"}
            elif module.id == "nn" and name in (
                "Linear",
                "Conv2d",
                "Embedding",
                "LayerNorm",
                "GroupNorm",
                "BatchNorm2d",
            ):
                needed = {"dtype", "device"}
            else:
                continue
            if path.as_posix().endswith(FOLLOW_THE_CONTEXT):
                needed = needed - {"device"}
            if not needed <= given:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:90]}")
    assert not wrong, "\n".join(wrong)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),  # as `torch.set_default_device`, and undone
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": lambda: torch.inference_mode(),
    "no_grad": lambda: torch.no_grad(),
    "deterministic": deterministic,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings")
    save_folder(tiny_components(), path / "model")
    save_folder(tiny.sdxl(), path / "xl")
    save_file(tiny.controlnet(tiny.UNET), path / "edges.safetensors")
    return path


def everything(folder: Path, lora: Path) -> list[np.ndarray]:
    """Loading and every kind of call, as arrays."""
    pipe = Pipeline.from_pretrained(folder / "model", dtype="fp32", device="cpu")
    xl = Pipeline.from_pretrained(folder / "xl", dtype="fp32", device="cpu")
    images = [pipe("a (red:1.3) cat BREAK dog", seed=1, output_type="np", **mode).images for mode in MODES.values()]
    images.append(xl("a cat", seed=2, num_inference_steps=2, width=32, height=32, output_type="np").images)
    pipe.set_adapters([Adapter(lora)])
    images.append(pipe("a cat", seed=1, num_inference_steps=2, output_type="np").images)
    pipe.set_adapters([])
    for sampler in ("dpm++2m", "euler_a", "unipc"):
        images.append(pipe("a cat", seed=1, num_inference_steps=2, sampler=sampler, output_type="np").images)
    images.append(pipe("a cat", seed=1, num_inference_steps=1, vae_tiling=True, output_type="np").images)
    net = pipe.load_controlnet(folder / "edges.safetensors")
    images.append(pipe("a cat", seed=1, num_inference_steps=2, controls=[Control(net, PHOTO)], output_type="np").images)
    return images


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    path = folder / "ink.safetensors"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    draw = torch.Generator("cpu").manual_seed(5)
    down, up = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return path


@pytest.fixture(scope="module")
def undisturbed_images(folder: Path, lora: Path) -> list[np.ndarray]:
    return everything(folder, lora)


@pytest.mark.heavy
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_other_code_changes_no_image(
    setting: str, folder: Path, lora: Path, undisturbed_images: list[np.ndarray]
) -> None:
    """`torch.set_default_dtype(torch.float64)` is common in notebooks; ComfyUI's and A1111's extensions call under
    autocast. None is about fastsd, so none changes what it makes."""
    with SETTINGS[setting]():
        found = everything(folder, lora)
    for own, expected in zip(found, undisturbed_images, strict=True):
        np.testing.assert_array_equal(own, expected)


def test_a_model_loaded_in_inference_mode_takes_adapters_later(folder: Path, lora: Path) -> None:
    """An inference tensor cannot be changed in place outside that mode (PyTorch's notes on inference mode)."""
    with torch.inference_mode():
        pipe = Pipeline.from_pretrained(folder / "model", dtype="fp32", device="cpu")
        before = latents(pipe)
    pipe.set_adapters([Adapter(lora)])
    assert not torch.equal(latents(pipe), before)
    pipe.set_adapters([])
    assert torch.equal(latents(pipe), before)


def test_a_call_neither_reads_nor_moves_the_callers_random_state() -> None:
    """A call that drew from the global generators would change what the caller's own code draws next."""
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = latents(pipe, sampler="euler_a", **MODES["mask"])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    torch.manual_seed(2)
    assert torch.equal(latents(pipe, sampler="euler_a", **MODES["mask"]), first)


@pytest.mark.heavy
def test_every_example_of_the_python_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, from top to bottom in one process, as a reader tries it."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (tmp_path / "eight.png").exists() and len(names["images"]) == 2


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after two steps of both stages."""
    train(write_config(folder, 2, 2))
    model = folder / "model"
    return {
        f"{path.parent.name}.{key}": value
        for path in sorted(model.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


@pytest.fixture(scope="module")
def undisturbed_training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("training"))


@pytest.mark.heavy
@pytest.mark.parametrize("setting", ["float64", "bfloat16", "meta", "autocast", "inference", "no_grad"])
def test_a_setting_of_other_code_changes_no_training(
    setting: str, tmp_path: Path, undisturbed_training: dict[str, torch.Tensor]
) -> None:
    """As of a call: every tensor of a training step states its dtype and device."""
    with SETTINGS[setting]():
        found = trained(tmp_path)
    assert found.keys() == undisturbed_training.keys()
    assert all(torch.equal(value, undisturbed_training[key]) for key, value in found.items())
