"""The nodes behind ComfyUI's published interface: `folder_paths`, `comfy.utils`, `comfy.model_management`, types."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fastsd
from fastsd.errors import FastsdError
from fastsd.sampling.samplers import SAMPLERS, resolve
from fastsd.weights import save_folder
from tests.support import tiny
from tests.support.adapter_writers import small_lora
from tests.support.pipelines import tiny_components
from tests.support.project import ROOT
from tests.support.upscalers import TINY_COMPACT, random_state, write_upscaler


class Interrupted(Exception):
    """What ComfyUI raises when the user cancels."""


class Comfy:
    """ComfyUI as far as a node sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bars, self.cancel_at = folder, [], 10**9
        self.seen = 0

    def modules(self) -> dict[str, types.ModuleType]:
        paths = types.ModuleType("folder_paths")
        paths.get_filename_list = lambda kind: sorted(p.name for p in (self.folder / kind).glob("*"))  # type: ignore[attr-defined]
        paths.get_full_path = lambda kind, name: str(self.folder / kind / name)  # type: ignore[attr-defined]
        management = types.ModuleType("comfy.model_management")
        management.get_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
        management.throw_exception_if_processing_interrupted = self._check  # type: ignore[attr-defined]
        utils, bars = types.ModuleType("comfy.utils"), self.bars

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total, self.calls = total, []
                bars.append(self)

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                self.calls.append((value, total, preview))

        utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
        comfy = types.ModuleType("comfy")
        comfy.model_management, comfy.utils = management, utils  # type: ignore[attr-defined]
        return {"folder_paths": paths, "comfy": comfy, "comfy.model_management": management, "comfy.utils": utils}

    def _check(self) -> None:
        self.seen += 1
        if self.seen >= self.cancel_at:
            raise Interrupted


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Comfy:
    found = Comfy(tmp_path)
    for kind in ("checkpoints", "vae", "loras", "controlnet", "upscale_models"):
        (tmp_path / kind).mkdir()
    save_folder(tiny_components(steps=2), tmp_path / "checkpoints" / "tiny", torch.float32)
    save_file(small_lora(), tmp_path / "loras" / "ink.safetensors")
    save_file(tiny.controlnet(tiny.UNET), tmp_path / "controlnet" / "canny.safetensors")
    save_file(tiny.t2i_adapter(tiny.UNET), tmp_path / "controlnet" / "sketch.safetensors")
    write_upscaler(tmp_path / "upscale_models" / "two.safetensors")
    torch.save(random_state(TINY_COMPACT), tmp_path / "upscale_models" / "two.pth")
    for name, module in found.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def nodes(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The package as ComfyUI imports it: from a folder in `custom_nodes`, by its path."""
    where = ROOT / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "custom_fastsd", where, submodule_search_locations=[str(where.parent)]
    )
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_fastsd", package)
    monkeypatch.delitem(sys.modules, "custom_fastsd.nodes", raising=False)
    spec.loader.exec_module(package)
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    return package.NODE_CLASS_MAPPINGS


def call(nodes: dict[str, Any], name: str, **inputs: Any) -> Any:
    """One output of a node, its inputs checked against what it declares, as ComfyUI's executor does."""
    node = nodes[name]
    declared = node.INPUT_TYPES()
    known = {**declared["required"], **declared.get("optional", {})}
    assert set(declared["required"]) <= set(inputs) <= set(known)
    for key, value in inputs.items():
        kind, *options = known[key]
        if isinstance(kind, list):
            assert value in kind, f"{key}: {value!r} is none of {kind}"
        elif kind in ("INT", "FLOAT"):
            assert options[0]["min"] <= value <= options[0]["max"], key
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert isinstance(outputs, tuple) and len(outputs) == len(node.RETURN_TYPES)
    return outputs[0]


def load(nodes: dict[str, Any]) -> Any:
    return call(nodes, "FastsdLoadCheckpoint", ckpt_name="tiny", vae_name="the checkpoint's", dtype="fp32")


def sample(nodes: dict[str, Any], model: Any, latent: dict[str, Any], **others: Any) -> dict[str, Any]:
    usual = {
        "positive": "a (cat:1.2)", "negative": "a dog", "seed": 7, "steps": 3, "cfg": 5.0,
        "sampler_name": "euler_ancestral", "scheduler": "karras", "denoise": 1.0, "rules": "comfy", "preview_every": 0,
    }  # fmt: skip
    return call(nodes, "FastsdSample", model=model, latent_image=latent, **(usual | others))


def empty(count: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 4, 8, 8)}


# Of 8 bits, as an image file has them, so that nothing is rounded on the way.
PIXELS = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 64, 64, 3)).astype(np.float32) / 255)


def test_sampling_is_the_engines_own_call(nodes: dict[str, Any], comfy: Comfy) -> None:
    """Two images of one noise, as KSampler draws it; the latents come back unscaled."""
    model = load(nodes)
    made = sample(nodes, model, empty(2))["samples"]
    scaled = model.pipe(
        "a (cat:1.2)", negative_prompt="a dog", seed=7, num_inference_steps=3, guidance_scale=5.0,
        num_images_per_prompt=2, sampler="euler_a", schedule="karras", like="comfy", width=64, height=64,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(made, scaled / model.pipe.components.vae.config.scaling_factor)
    image = call(nodes, "FastsdDecode", model=model, samples={"samples": made}, tiled=False)
    assert image.shape == (2, 64, 64, 3) and 0 <= image.min() and image.max() <= 1
    (bar,) = comfy.bars
    assert [at for at, _, _ in bar.calls] == [1, 2, 3] and bar.total == 3


def test_previews_go_to_the_progress_bar(nodes: dict[str, Any], comfy: Comfy) -> None:
    sample(nodes, load(nodes), empty(), preview_every=1)
    shown = [preview for _, _, preview in comfy.bars[0].calls if preview]
    assert len(shown) == 2 and shown[0][0] == "JPEG" and isinstance(shown[0][1], Image.Image)


def test_cancelling_stops_within_a_step(nodes: dict[str, Any], comfy: Comfy) -> None:
    comfy.cancel_at = 2
    model = load(nodes)
    with pytest.raises(Interrupted):
        sample(nodes, model, empty(), steps=20)
    assert comfy.seen == 2
    comfy.cancel_at = 10**9
    sample(nodes, model, empty())  # and the model is free for the next run


def test_each_image_of_a_latent_is_one_of_the_batch(nodes: dict[str, Any]) -> None:
    """From images: the noise of image k is the k-th of the batch's, and the order stays."""
    model = load(nodes)
    latent = call(nodes, "FastsdEncode", model=model, pixels=PIXELS)
    assert latent["samples"].shape == (2, 4, 8, 8)
    made = sample(nodes, model, latent, denoise=0.6)["samples"]
    alone = sample(nodes, model, {key: value[1:] for key, value in latent.items()}, denoise=0.6)["samples"]
    assert made.shape == (2, 4, 8, 8) and not torch.equal(made[1:], alone)  # alone it has the first noise
    assert torch.isfinite(made).all()


def test_encoding_takes_the_middle_and_decodes_back(nodes: dict[str, Any]) -> None:
    model = load(nodes)
    wide = torch.nn.functional.pad(PIXELS[:1], (0, 0, 3, 3, 2, 2))
    inner, outer = (call(nodes, "FastsdEncode", model=model, pixels=x)["samples"] for x in (PIXELS[:1], wide))
    assert torch.equal(inner, outer)


def test_a_mask_keeps_what_is_black(nodes: dict[str, Any]) -> None:
    model = load(nodes)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    latent = call(nodes, "FastsdEncode", model=model, pixels=PIXELS[:1], mask=mask)
    made = sample(nodes, model, latent)["samples"]
    before = latent["samples"]
    assert torch.allclose(made[..., :4], before[..., :4], atol=1e-4)
    assert not torch.allclose(made[..., 4:], before[..., 4:], atol=1e-2)


def test_a_latent_of_another_node_is_decoded_first_and_said(
    nodes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(nodes)
    foreign = {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert torch.isfinite(sample(nodes, model, foreign, denoise=0.5)["samples"]).all()
    assert "another node's" in caplog.text


def test_loras_belong_to_their_branch(nodes: dict[str, Any]) -> None:
    model = load(nodes)
    plain = sample(nodes, model, empty())["samples"]
    inked = call(nodes, "FastsdLora", model=model, lora_name="ink.safetensors", strength_model=0.8, strength_clip=0.8)
    assert not torch.equal(sample(nodes, inked, empty())["samples"], plain)
    assert torch.equal(sample(nodes, model, empty())["samples"], plain)


def test_controls_add_up(nodes: dict[str, Any]) -> None:
    model = load(nodes)
    inputs = {
        "model": model,
        "control_net_name": "canny.safetensors",
        "image": PIXELS[:1],
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    one = call(nodes, "FastsdControlNet", strength=0.5, **inputs)
    two = call(nodes, "FastsdControlNet", strength=0.5, before=one, **inputs)
    assert len(one) == 1 and len(two) == 2
    results = [sample(nodes, model, empty(), **({"control": control} if control else {})) for control in ((), one, two)]
    assert len({tuple(result["samples"].flatten().tolist()) for result in results}) == 3
    with pytest.raises(FastsdError, match="holds 2 images"):
        call(nodes, "FastsdControlNet", strength=1.0, **(inputs | {"image": PIXELS}))


def test_a_t2i_adapter_is_a_control(nodes: dict[str, Any]) -> None:
    model = load(nodes)
    inputs = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "image": PIXELS[:1]}
    (control,) = call(nodes, "FastsdControlNet", model=model, control_net_name="sketch.safetensors", **inputs)
    steered = sample(nodes, model, empty(), control=(control,))["samples"]
    assert not torch.equal(steered, sample(nodes, model, empty())["samples"])


def upscaler_of(nodes: dict[str, Any], name: str = "two.safetensors", allow_pickle: bool = False) -> Any:
    return call(nodes, "FastsdLoadUpscaler", model_name=name, dtype="fp32", allow_pickle=allow_pickle)


def test_upscaling_is_the_engines_own_call(nodes: dict[str, Any], comfy: Comfy) -> None:
    """Of each image of a batch, by the network's own factor or another one; the bar counts the tiles of all."""
    upscaler = upscaler_of(nodes)
    for scale_by, side in ((0.0, 128), (1.5, 96)):
        large = call(nodes, "FastsdUpscale", upscaler=upscaler, image=PIXELS, scale_by=scale_by)
        assert large.shape == (2, side, side, 3) and large.dtype == torch.float32
        for one, pixels in zip(large, PIXELS):
            given = Image.fromarray((pixels.numpy() * 255).round().astype(np.uint8))
            expected = np.asarray(upscaler(given, scale_by or None))
            np.testing.assert_array_equal((one.numpy() * 255).round(), expected)
        assert [(at, total) for at, total, _ in comfy.bars[-1].calls] == [(1, 2), (2, 2)]


def test_upscaling_is_cancelled_between_tiles(nodes: dict[str, Any], comfy: Comfy) -> None:
    comfy.cancel_at = 1
    with pytest.raises(Interrupted):
        call(nodes, "FastsdUpscale", upscaler=upscaler_of(nodes), image=PIXELS, scale_by=0.0)
    comfy.cancel_at = 10**9
    call(nodes, "FastsdUpscale", upscaler=upscaler_of(nodes), image=PIXELS, scale_by=0.0)


def test_a_pickled_upscaler_needs_permission(nodes: dict[str, Any]) -> None:
    with pytest.raises(FastsdError, match=r"two\.pth: .*allow_pickle"):
        upscaler_of(nodes, "two.pth")
    assert upscaler_of(nodes, "two.pth", True).scale == 2


def test_latents_of_another_width_are_refused(nodes: dict[str, Any]) -> None:
    with pytest.raises(FastsdError, match=r"latents of shape \[1, 16, 8, 8\]"):
        call(nodes, "FastsdDecode", model=load(nodes), samples={"samples": torch.zeros(1, 16, 8, 8)}, tiled=False)


def test_every_name_in_the_menus_is_one_that_the_engine_follows(nodes: dict[str, Any]) -> None:
    inputs = nodes["FastsdSample"].INPUT_TYPES()["required"]
    for sampler in inputs["sampler_name"][0]:
        assert resolve(sampler)[0] in SAMPLERS
    for schedule in inputs["scheduler"][0]:
        resolve("euler", schedule)


def test_the_example_workflow_runs(nodes: dict[str, Any]) -> None:
    """ComfyUI's API form: nodes by number, a link is [number, output]."""
    graph = json.loads((ROOT / "comfyui" / "example_workflow.json").read_text(encoding="utf-8"))
    made: dict[str, Any] = {}

    def output(number: str) -> Any:
        if number not in made:
            node = graph[number]
            inputs = {
                key: output(value[0]) if isinstance(value, list) else value for key, value in node["inputs"].items()
            }
            if node["class_type"] == "EmptyLatentImage":
                made[number] = {
                    "samples": torch.zeros(inputs["batch_size"], 4, inputs["height"] // 8, inputs["width"] // 8)
                }
            elif node["class_type"] == "SaveImage":
                made[number] = inputs["images"]
            else:
                made[number] = call(nodes, node["class_type"], **inputs)
        return made[number]

    (last,) = [number for number, node in graph.items() if node["class_type"] == "SaveImage"]
    images = output(last)
    assert images.shape == (4, 64, 64, 3) and images.std() > 0.2  # digits: white on black


def test_the_version_is_the_packages() -> None:
    text = (ROOT / "comfyui" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{fastsd.__version__}"' in text
