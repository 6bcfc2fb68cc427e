"""TAESD agrees with diffusers' AutoencoderTiny: layer by layer, in generated images, and in model folders."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.config import TAESDConfig
from fastsd.errors import FastsdError
from fastsd.generate import latents
from fastsd.kernels import dispatch
from fastsd.model.taesd import TAESD, TAESDBlock, TAESDDecoder, TAESDEncoder, UpsampleConv
from fastsd.model.tiling import decode_tiled
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.weights import load_folder, load_vae, save_folder
from fastsd.weights.convert import convert
from tests.support import taesd_files
from tests.support.families import TOLERANCE
from tests.support.matching import Call, nchw, nhwc, record, relative_error
from tests.support.pipelines import PHOTO

FP32 = torch.float32
ROUNDING = 1e-5  # of the largest value: the roundings (6e-8 each) of about forty layers


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    return taesd_files.make()


@pytest.fixture(scope="module")
def path(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taesd_files.write(theirs, "two files", tmp_path_factory.mktemp("taesd"))


@pytest.mark.parametrize("reference", [False, True])
@torch.inference_mode()
def test_every_layer_at_full_size(tmp_path: Path, reference: bool) -> None:
    """On a map with unequal sides, large enough for both of the CPU's upsampling algorithms."""
    torch.manual_seed(1)
    theirs = taesd_files.make(width=64)
    ours = load_vae(taesd_files.write(theirs, "diffusers", tmp_path), False, FP32)
    assert isinstance(ours, TAESD) and ours.config == TAESDConfig()
    assert sum(p.numel() for p in ours.parameters()) == 2_445_063  # as in the published model
    calls, hooks = record(theirs)
    image, latent = 2 * torch.rand(1, 3, 96, 160) - 1, 3 * torch.randn(1, 4, 12, 20)
    encoded, decoded = theirs.encode(image).latents, theirs.decode(latent).sample
    for hook in hooks:
        hook.remove()
    with dispatch.forced("reference" if reference else dispatch.backend(image)):
        assert relative_error(nchw(ours.encode(nhwc(image)).mean), encoded) < ROUNDING
        assert relative_error(nchw(ours.decode(nhwc(latent))), decoded) < ROUNDING
        compared = [run_layer(name, module, calls) for name, module in ours.named_modules()]
    errors = [error for error in compared if error is not None]
    assert len(errors) == 2 + 20 + 10  # networks, blocks, and the convolutions between them
    assert max(errors) < ROUNDING


def run_layer(name: str, module: torch.nn.Module, calls: dict[str, Call]) -> float | None:
    """The error of a layer on the recorded input of theirs; None for modules that are not compared."""
    parent, _, last = name.rpartition(".")
    if not isinstance(module, TAESDBlock | UpsampleConv | TAESDEncoder | TAESDDecoder) and parent.count(".") != 1:
        return None
    call = calls[name]
    x = call.args[0]
    if isinstance(module, UpsampleConv):  # theirs upsamples in the layer before
        x = calls[f"{parent}.{int(last) - 1}"].args[0]
    return relative_error(nchw(module(nhwc(x))), call.output)


@torch.inference_mode()
def test_tiles_agree_except_near_their_edges(path: Path) -> None:
    """The decoder's receptive field reaches 19 latent pixels: 10 at the latent's size, then 5, 2.5 and 0.6."""
    vae = load_vae(path, False, FP32)
    latent = torch.randn(1, 96, 32, 4)
    whole, tiled = vae.decode(latent), decode_tiled(vae, latent)  # rows 0 to 64, and 32 to 96
    difference = (whole - tiled).abs().amax(dim=(0, 2, 3))
    far = 8 * (32 - 19)
    assert difference[:far].max() < 1e-5 and difference[-far:].max() < 1e-5
    assert difference[far:-far].max() > 1e-4  # there were tiles


def test_a_folder_sets_the_scale_and_the_levels(tmp_path: Path) -> None:
    widths = {f"{side}_block_out_channels": (4, 4) for side in ("encoder", "decoder")}
    blocks = {"num_encoder_blocks": (2, 1), "num_decoder_blocks": (0, 2)}
    theirs = taesd_files.make(**widths, **blocks, latent_channels=5, scaling_factor=0.5)
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path, False, FP32)
    assert ours.config.downscale == 2 and ours.config.scaling_factor == 0.5 and ours.config.latent_channels == 5
    latent = torch.randn(1, 5, 4, 4)
    with torch.inference_mode():
        assert relative_error(nchw(ours.decode(nhwc(latent))), theirs.decode(latent).sample) < ROUNDING
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert load_vae(file, False, FP32).config == TAESDConfig(**vars(ours.config) | {"scaling_factor": 1.0})


def with_tiny(pipeline: Any, theirs: Any) -> Any:
    """Replace the autoencoder of diffusers' pipeline."""
    pipeline.register_modules(vae=theirs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_generated_images(families: Any, family: str, theirs: Any, path: Path) -> None:
    """Values differ by at most one of 255 levels, and only where they were between two levels before rounding."""
    pipeline = type(families.pipelines[family]).from_pretrained(families.folder / family)
    with_tiny(pipeline, theirs)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "blue", "latents": noise}
    size = {"height": 64, "width": 64}
    expected = np.asarray(pipeline("a cat", output_type="pil", **size, **arguments).images[0], dtype=int)
    ours = Pipeline.from_pretrained(families.folder / family, "cpu", "fp32", vae=path)
    image = np.asarray(ours("a cat", **arguments).images[0], dtype=int)
    assert image.std() > 5  # the image is not flat
    assert np.abs(image - expected).max() <= 1 and (image != expected).mean() < 1e-2


@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_starting_from_an_image(families: Any, family: str, theirs: Any, path: Path) -> None:
    """The deterministic encoder needs no noise. fastsd samples it anyway, so that a seed's later noise is the same.

    diffusers does not, so its generator here has sampled that noise before.
    """
    import diffusers

    inpaints = family == "inpainting"
    pipeline_class = diffusers.StableDiffusionInpaintPipeline if inpaints else diffusers.StableDiffusionImg2ImgPipeline
    pipeline = with_tiny(pipeline_class.from_pretrained(families.folder / family, safety_checker=None), theirs)
    arguments: dict[str, Any] = {"image": PHOTO, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 4.0}
    size: dict[str, Any] = {}
    if inpaints:
        area = np.zeros((64, 64), dtype=np.uint8)
        area[16:48, 8:40] = 255
        arguments["mask_image"], size = Image.fromarray(area), {"height": 64, "width": 64}
    generator = torch.Generator().manual_seed(5)
    torch.randn(4, 8, 8, generator=generator)
    expected = pipeline("a cat", generator=[generator], output_type="latent", **size, **arguments).images
    ours = Pipeline.from_pretrained(families.folder / family, "cpu", "fp32", vae=path)
    result = ours("a cat", seed=5, output_type="latent", **arguments).images
    assert relative_error(result, expected) < TOLERANCE


def test_without_an_encoder_images_are_generated_but_not_read(families: Any, theirs: Any, tmp_path: Path) -> None:
    path = taesd_files.write(theirs, "two files", tmp_path)
    both = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", vae=path)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    pipe = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", vae=path)
    arguments = {"num_inference_steps": 2, "seed": 1}
    assert pipe("a cat", **arguments).images[0].tobytes() == both("a cat", **arguments).images[0].tobytes()
    with pytest.raises(FastsdError, match="image: the autoencoder is only TAESD's decoder"):
        pipe("a cat", image=PHOTO, **arguments)
    with pytest.raises(FastsdError, match="hires_upscaler: the autoencoder is only TAESD's decoder"):
        pipe("a cat", hires_scale=2, hires_upscaler="lanczos", **arguments)
    assert pipe("a cat", hires_scale=2, **arguments).images[0].size == (128, 128)
    with pytest.raises(FastsdError, match="not written: the autoencoder is only TAESD's decoder"):
        save_folder(pipe.components, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tiny", [False, True])
def test_previews_come_from_the_preview_decoder(families: Any, theirs: Any, path: Path, tiny: bool) -> None:
    """A preview is the decoded estimate of the clean image, and does not change the result."""
    folder = families.folder / "sd1"
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp32", preview=path if tiny else None)
    steps = list(pipe.stream("a cat", num_inference_steps=3, seed=1))
    estimate = steps[1]._estimate.denoised(pipe.components.scheduler)
    shown = np.asarray(steps[1].preview(), dtype=int)
    if tiny:
        decoded = theirs.decode(nchw(estimate)).sample[0].permute(1, 2, 0)
        expected = (decoded * 127.5 + 127.5).round().clamp(0, 255).numpy().astype(int)
        assert np.abs(shown - expected).max() <= 1
    else:
        assert np.array_equal(shown, np.asarray(pipe.decode(estimate)[0], dtype=int))
    assert steps[-1].result is not None
    plain = Pipeline.from_pretrained(folder, "cpu", "fp32")("a cat", num_inference_steps=3, seed=1)
    assert steps[-1].result.images[0].tobytes() == plain.images[0].tobytes()


@pytest.mark.parametrize("tiny", [False, True])
def test_previews_are_tiled_where_the_image_is(
    families: Any, path: Path, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an image that is too large to be decoded whole would have no preview."""
    tiled = []
    monkeypatch.setattr(latents, "decode_tiled", lambda *arguments: tiled.append(arguments) or decode_tiled(*arguments))
    pipe = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", preview=path if tiny else None)
    for tiles in (False, True):
        next(pipe.stream("a cat", num_inference_steps=2, vae_tiling=tiles)).preview()
        assert len(tiled) == tiles


def test_a_model_folder_with_taesd(families: Any, theirs: Any, tmp_path: Path) -> None:
    """A folder that diffusers saved is read, written and converted, and diffusers reads the results."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(families.folder / "sd1", safety_checker=None)
    with_tiny(pipeline, theirs).save_pretrained(tmp_path / "theirs")
    components = load_folder(tmp_path / "theirs", FP32)
    assert isinstance(components.vae, TAESD) and components.vae.config.block_out_channels == (8,) * 4
    save_folder(components, tmp_path / "ours", FP32)
    convert(tmp_path / "theirs", tmp_path / "converted")
    expected = theirs.state_dict()
    for folder in ("ours", "converted"):
        vae = diffusers.AutoencoderTiny.from_pretrained(tmp_path / folder / "vae")
        assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())
        opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder, safety_checker=None)
        assert isinstance(opened.vae, diffusers.AutoencoderTiny)
    with pytest.raises(FastsdError, match="its autoencoder is TAESD, which single files cannot hold"):
        convert(tmp_path / "theirs", tmp_path / "x.safetensors")
    replaced = Pipeline.from_pretrained(tmp_path / "theirs", "cpu", "fp32", vae=families.folder / "sd1" / "vae")
    assert isinstance(replaced.components.vae, AutoencoderKL)


def test_other_autoencoders_and_other_families_are_refused(families: Any, tmp_path: Path) -> None:
    model = families.folder / "sd1"
    for full in (model / "vae", model / "vae" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(FastsdError, match="not TAESD, the tiny autoencoder that decodes previews"):
            Pipeline.from_pretrained(model, "cpu", "fp32", preview=full)
    sixteen = taesd_files.write(taesd_files.make(latent_channels=16), "diffusers", tmp_path)
    for option in ("vae", "preview"):
        with pytest.raises(FastsdError, match=r"x\.safetensors: its latents have 16 channels, this model's 4"):
            Pipeline.from_pretrained(model, "cpu", "fp32", **{option: sixteen})
    with pytest.raises(FastsdError, match="it looks like TAESD, the tiny autoencoder, which vae takes"):
        Pipeline.from_pretrained(sixteen, "cpu", "fp32")
    torch.save(OrderedDict(taesd_files.as_author(taesd_files.make())["decoder"]), tmp_path / "taesd_decoder.pth")
    with pytest.raises(FastsdError, match="allow-pickle|allow_pickle"):
        load_vae(tmp_path / "taesd_decoder.pth", False, FP32)
