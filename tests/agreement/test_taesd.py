"""TAESD agrees with diffusers' AutoencoderTiny: layer by layer, file form by file form, image by image."""

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
from tests.support.matching import Call, nchw, nhwc, record

FP32 = torch.float32
ROUNDING = 1e-5  # of the largest value: what roundings (6e-8 each) of some forty layers add up to
PHOTO = 1e-4  # of latents after the whole loop, as in test_pipelines


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    return taesd_files.make()


@pytest.fixture(scope="module")
def path(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taesd_files.write(theirs, "two files", tmp_path_factory.mktemp("taesd"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


# The network


@pytest.mark.parametrize("reference", [False, True])
@torch.inference_mode()
def test_every_layer_at_full_size(tmp_path: Path, reference: bool) -> None:
    """On a map whose sides differ, large enough for every way in which the CPU doubles a map."""
    torch.manual_seed(1)
    theirs = taesd_files.make(width=64)
    ours = load_vae(taesd_files.write(theirs, "diffusers", tmp_path), False, FP32)
    assert isinstance(ours, TAESD) and ours.config == TAESDConfig()
    assert sum(p.numel() for p in ours.parameters()) == 2_445_063  # what the published one has
    calls, hooks = record(theirs)
    image, latent = 2 * torch.rand(1, 3, 96, 160) - 1, 3 * torch.randn(1, 4, 12, 20)
    encoded, decoded = theirs.encode(image).latents, theirs.decode(latent).sample
    for hook in hooks:
        hook.remove()
    with dispatch.forced("reference" if reference else dispatch.backend(image)):
        assert error(nchw(ours.encode(nhwc(image)).mean), encoded) < ROUNDING
        assert error(nchw(ours.decode(nhwc(latent))), decoded) < ROUNDING
        compared = [run_layer(name, module, calls) for name, module in ours.named_modules()]
    errors = [e for e in compared if e is not None]
    assert len(errors) == 2 + 20 + 10  # networks, blocks, and the convolutions between them
    assert max(errors) < ROUNDING


def run_layer(name: str, module: torch.nn.Module, calls: dict[str, Call]) -> float | None:
    """How far a layer is from theirs on what theirs was given."""
    parent, _, last = name.rpartition(".")
    if not isinstance(module, TAESDBlock | UpsampleConv | TAESDEncoder | TAESDDecoder) and parent.count(".") != 1:
        return None
    call = calls[name]
    x = call.args[0]
    if isinstance(module, UpsampleConv):  # the layer before is the doubling
        x = calls[f"{parent}.{int(last) - 1}"].args[0]
    return error(nchw(module(nhwc(x))), call.output)


@torch.inference_mode()
def test_tiles_agree_but_near_their_edges(path: Path) -> None:
    """19 latent pixels are as far as the decoder sees: 10 at the latent's size, then 5, 2.5 and 0.6."""
    vae = load_vae(path, False, FP32)
    latent = torch.randn(1, 96, 32, 4)
    whole, tiled = vae.decode(latent), decode_tiled(vae, latent)  # rows 0 to 64, and 32 to 96
    difference = (whole - tiled).abs().amax(dim=(0, 2, 3))
    far = 8 * (32 - 19)
    assert difference[:far].max() < 1e-5 and difference[-far:].max() < 1e-5
    assert difference[far:-far].max() > 1e-4  # so the tiles were there


def test_a_folders_own_scale_and_levels(tmp_path: Path) -> None:
    widths = {f"{side}_block_out_channels": (4, 4) for side in ("encoder", "decoder")}
    blocks = {"num_encoder_blocks": (2, 1), "num_decoder_blocks": (0, 2)}
    theirs = taesd_files.make(**widths, **blocks, latent_channels=5, scaling_factor=0.5)
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path, False, FP32)
    assert ours.config.downscale == 2 and ours.config.scaling_factor == 0.5 and ours.config.latent_channels == 5
    latent = torch.randn(1, 5, 4, 4)
    with torch.inference_mode():
        assert error(nchw(ours.decode(nhwc(latent))), theirs.decode(latent).sample) < ROUNDING
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert load_vae(file, False, FP32).config == TAESDConfig(**vars(ours.config) | {"scaling_factor": 1.0})


# Images


def with_tiny(pipeline: Any, theirs: Any) -> Any:
    """diffusers' pipeline with this autoencoder in place of its own."""
    pipeline.register_modules(vae=theirs)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_image(families: Any, family: str, theirs: Any, path: Path) -> None:
    """The same to one of 255 levels, and that only where a value stood between two."""
    pipeline = type(families.pipelines[family]).from_pretrained(families.folder / family)
    with_tiny(pipeline, theirs)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "blue", "latents": noise}
    size = {"height": 64, "width": 64}
    wanted = np.asarray(pipeline("a cat", output_type="pil", **size, **arguments).images[0], dtype=int)
    ours = Pipeline.from_pretrained(families.folder / family, "cpu", "fp32", vae=path)
    found = np.asarray(ours("a cat", **arguments).images[0], dtype=int)
    assert found.std() > 5  # something is on it
    assert np.abs(found - wanted).max() <= 1 and (found != wanted).mean() < 1e-2


@pytest.mark.parametrize("family", ["sd1", "inpainting"])
def test_an_image_to_start_from(families: Any, family: str, theirs: Any, path: Path, photo: Image.Image) -> None:
    """The encoder is certain and needs no noise, which is drawn all the same: the next draws are the same ones.

    So diffusers, which draws none, is given a generator that has drawn once.
    """
    import diffusers

    paints = family == "inpainting"
    kind = diffusers.StableDiffusionInpaintPipeline if paints else diffusers.StableDiffusionImg2ImgPipeline
    pipeline = with_tiny(kind.from_pretrained(families.folder / family, safety_checker=None), theirs)
    arguments: dict[str, Any] = {"image": photo, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 4.0}
    size: dict[str, Any] = {}
    if paints:
        area = np.zeros((64, 64), dtype=np.uint8)
        area[16:48, 8:40] = 255
        arguments["mask_image"], size = Image.fromarray(area), {"height": 64, "width": 64}
    generator = torch.Generator().manual_seed(5)
    torch.randn(4, 8, 8, generator=generator)
    wanted = pipeline("a cat", generator=[generator], output_type="latent", **size, **arguments).images
    ours = Pipeline.from_pretrained(families.folder / family, "cpu", "fp32", vae=path)
    found = ours("a cat", seed=5, output_type="latent", **arguments).images
    assert error(found, wanted) < PHOTO


def test_a_decoder_alone_generates_and_says_what_it_cannot(
    families: Any, theirs: Any, tmp_path: Path, photo: Image.Image
) -> None:
    path = taesd_files.write(theirs, "two files", tmp_path)
    both = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", vae=path)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    pipe = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", vae=path)
    arguments = {"num_inference_steps": 2, "seed": 1}
    assert pipe("a cat", **arguments).images[0].tobytes() == both("a cat", **arguments).images[0].tobytes()
    with pytest.raises(FastsdError, match="image: the autoencoder is only TAESD's decoder"):
        pipe("a cat", image=photo, **arguments)
    with pytest.raises(FastsdError, match="hires_upscaler: the autoencoder is only TAESD's decoder"):
        pipe("a cat", hires_scale=2, hires_upscaler="lanczos", **arguments)
    assert pipe("a cat", hires_scale=2, **arguments).images[0].size == (128, 128)
    with pytest.raises(FastsdError, match="not written: the autoencoder is only TAESD's decoder"):
        save_folder(pipe.components, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [False, True])
def test_previews_come_from_their_own_decoder(families: Any, theirs: Any, path: Path, own: bool) -> None:
    """The image is as it would be without, and what is shown is the estimate, decoded by TAESD."""
    folder = families.folder / "sd1"
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp32", preview=path if own else None)
    steps = list(pipe.stream("a cat", num_inference_steps=3, seed=1))
    estimate = steps[1]._estimate.denoised(pipe.components.scheduler)
    shown = np.asarray(steps[1].preview(), dtype=int)
    if own:
        decoded = theirs.decode(nchw(estimate)).sample[0].permute(1, 2, 0)
        wanted = (decoded * 127.5 + 127.5).round().clamp(0, 255).numpy().astype(int)
        assert np.abs(shown - wanted).max() <= 1
    else:
        assert np.array_equal(shown, np.asarray(pipe.decode(estimate)[0], dtype=int))
    assert steps[-1].result is not None
    plain = Pipeline.from_pretrained(folder, "cpu", "fp32")("a cat", num_inference_steps=3, seed=1)
    assert steps[-1].result.images[0].tobytes() == plain.images[0].tobytes()


@pytest.mark.parametrize("own", [False, True])
def test_previews_are_tiled_where_the_image_is(
    families: Any, path: Path, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an image that is too large to be decoded whole could not be watched."""
    tiled = []
    monkeypatch.setattr(latents, "decode_tiled", lambda *given: tiled.append(given) or decode_tiled(*given))
    pipe = Pipeline.from_pretrained(families.folder / "sd1", "cpu", "fp32", preview=path if own else None)
    for tiles in (False, True):
        next(pipe.stream("a cat", num_inference_steps=2, vae_tiling=tiles)).preview()
        assert len(tiled) == tiles


# Folders that have it for their own


def test_a_model_folder_with_it(families: Any, theirs: Any, tmp_path: Path) -> None:
    """diffusers saves such folders; they are read, converted, written again and read by diffusers."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(families.folder / "sd1", safety_checker=None)
    with_tiny(pipeline, theirs).save_pretrained(tmp_path / "theirs")
    components = load_folder(tmp_path / "theirs", FP32)
    assert isinstance(components.vae, TAESD) and components.vae.config.block_out_channels == (8,) * 4
    save_folder(components, tmp_path / "ours", FP32)
    convert(tmp_path / "theirs", tmp_path / "converted")
    wanted = theirs.state_dict()
    for folder in ("ours", "converted"):
        again = diffusers.AutoencoderTiny.from_pretrained(tmp_path / folder / "vae")
        assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
        found = diffusers.DiffusionPipeline.from_pretrained(tmp_path / folder, safety_checker=None)
        assert isinstance(found.vae, diffusers.AutoencoderTiny)
    with pytest.raises(FastsdError, match="its autoencoder is TAESD, which single files cannot hold"):
        convert(tmp_path / "theirs", tmp_path / "x.safetensors")
    own = Pipeline.from_pretrained(tmp_path / "theirs", "cpu", "fp32", vae=families.folder / "sd1" / "vae")
    assert isinstance(own.components.vae, AutoencoderKL)


def test_what_is_no_tiny_autoencoder_or_another_familys(families: Any, tmp_path: Path) -> None:
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
