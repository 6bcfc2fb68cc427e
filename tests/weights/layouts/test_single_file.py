"""Single files in the original layout load to the same weights, and draw the same pictures, as their folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.weights import load_checkpoint, load_folder, load_single_file, load_vae
from fastsd.weights.convert import convert
from fastsd.weights.formats.safetensors_file import TensorEntry
from tests.support import original
from tests.support.tiny import tensors as weights

FAMILIES = ["sd1", "sd2", "sdxl", "refiner"]
EVERY = [*FAMILIES, *(f"{family} inpainting" for family in FAMILIES)]
PREDICTION = {"sd2": "v_prediction"}  # which no file of SD 2 says by itself
FP32 = torch.float32


def load(path: Path, **arguments: Any) -> Any:
    return load_single_file(path, FP32, **arguments)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("family", EVERY)
def test_a_file_loads_to_its_folders_weights_and_configs(originals: Any, family: str) -> None:
    file = load(originals.file(family), prediction=PREDICTION.get(family))
    folder = load_folder(originals.folder(family), FP32)
    assert_same(weights(file), weights(folder))
    assert file.unet.config == folder.unet.config
    assert file.vae.config == folder.vae.config
    assert [text.config for text in file.text_encoders] == [text.config for text in folder.text_encoders]
    assert file.scheduler == folder.scheduler
    for name in ("zeros_for_empty_prompt", "aesthetic_score"):
        assert getattr(file, name) == getattr(folder, name)
    for ours, theirs in zip(file.tokenizers, folder.tokenizers, strict=True):
        assert torch.equal(ours("a cat! on a mat"), theirs("a cat! on a mat"))


@pytest.mark.parametrize("family", EVERY)
def test_a_file_draws_its_folders_pictures(originals: Any, family: str) -> None:
    """Text to image, image to image with the refiner, inpainting with nine channels."""
    arguments: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    arguments |= {"width": 32, "height": 32} if "inpainting" not in family and family != "refiner" else {}
    if "width" not in arguments:
        rng = np.random.RandomState(0)
        arguments["image"] = Image.fromarray(rng.randint(0, 256, (32, 32, 3), dtype=np.uint8))
        arguments["strength"] = 1.0
    if "inpainting" in family:
        arguments["mask_image"] = Image.fromarray(
            (np.arange(32) < 16).repeat(32).reshape(32, 32).astype(np.uint8) * 255
        )
    prediction = PREDICTION.get(family)
    found = Pipeline.from_pretrained(originals.file(family), "cpu", "fp32", prediction=prediction)("a cat", **arguments)
    wanted = Pipeline.from_pretrained(originals.folder(family), "cpu", "fp32")("a cat", **arguments)
    assert float(wanted.images.std()) > 0
    assert float((found.images - wanted.images).abs().max()) <= 1e-4 * float(wanted.images.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_same_out_of_these_files(originals: Any, family: str) -> None:
    """The tests' own writer is right: diffusers' converters turn its files back into the folders' tensors."""
    theirs = pytest.importorskip("diffusers.loaders.single_file_utils")
    config, tensors = original.UNETS[family], originals.tensors(family)
    levels = len(config.block_out_channels)
    unet_json = {
        "layers_per_block": config.layers_per_block,
        "block_out_channels": config.block_out_channels,
        "down_block_types": ["" for _ in range(levels)],
        "up_block_types": ["" for _ in range(levels)],
        "class_embed_type": None,
        "addition_embed_type": "text_time" if config.addition_time_embed_dim else None,
    }
    found = theirs.convert_ldm_unet_checkpoint(dict(tensors), unet_json)
    assert_same(found, load_file(originals.folder(family) / "unet/diffusion_pytorch_model.safetensors"))
    vae_json = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    found = theirs.convert_ldm_vae_checkpoint(dict(tensors), vae_json)
    assert_same(found, load_file(originals.folder(family) / "vae/diffusion_pytorch_model.safetensors"))
    for name, prefix in original.TEXT_PREFIXES[family].items():
        wanted = load_file(originals.folder(family) / name / "model.safetensors")
        if prefix.endswith("transformer."):
            found = theirs.convert_ldm_clip_checkpoint(dict(tensors), prefix)
        else:
            projection = wanted.get("text_projection.weight", torch.empty(1, 64))
            model = type("Model", (), {"text_projection": type("P", (), {"weight": projection})})
            found = theirs.convert_open_clip_checkpoint(model, dict(tensors), prefix)
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(originals: Any, dtype: torch.dtype) -> None:
    """Loaded in their own dtype to the bit, and in fp32 to the same values."""
    halved = {key: value.to(dtype) for key, value in originals.tensors("sd1").items()}
    path = originals.save(halved, f"{dtype}.safetensors")
    wanted = {key: value.to(dtype) for key, value in weights(load_folder(originals.folder("sd1"), FP32)).items()}
    assert_same(weights(load_single_file(path, dtype)), wanted)
    assert_same(weights(load(path)), {key: value.float() for key, value in wanted.items()})


def averages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training keeps beside a UNet; each value differs by 1."""
    more = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
        for key, value in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    return more | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}


def test_averaged_weights(originals: Any, tmp_path: Path) -> None:
    """Taken instead of the UNet's where they are asked for, and no others; refused where they are not there."""
    tensors = originals.tensors("sd1")
    path = originals.save(tensors | averages(tensors), "averaged.safetensors")
    plain = weights(load(originals.file("sd1")))
    wanted = {key: value + 1 if key.startswith("unet.") else value for key, value in plain.items()}
    assert_same(weights(load_single_file(path, FP32, ema=True)), wanted)
    convert(path, tmp_path / "alone.safetensors", ema=True)
    assert_same(weights(load(tmp_path / "alone.safetensors")), wanted)
    with pytest.raises(FastsdError, match=r"no averaged weights \(model_ema\.\*\) in this file; leave out ema"):
        load_single_file(originals.file("sd1"), FP32, ema=True)
    for use in (load_checkpoint, lambda path, _, ema: convert(path, tmp_path / "x", ema=ema)):
        with pytest.raises(FastsdError, match="a folder holds only one set of UNet weights"):
            use(originals.folder("sd1"), FP32, ema=True)
    gone = {key: value for key, value in averages(tensors).items() if not key.endswith("out2weight")}
    with pytest.raises(FastsdError, match=r"the key model_ema\.diffusion_modelout2weight is missing"):
        load_single_file(originals.save(tensors | gone, "gone.safetensors"), FP32, ema=True)


def test_what_else_original_files_hold_is_left_aside(originals: Any) -> None:
    """EMA weights, the training schedule, the VAE's loss, marker scalars and others' keys."""
    tensors = originals.tensors("sd1")
    more = averages(tensors)
    more |= {"betas": torch.ones(1000), "alphas_cumprod": torch.ones(1000), "denoiser.sigmas": torch.ones(1000)}
    more |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    more |= {"first_stage_model.loss.logvar": torch.ones(()), "first_stage_model.model_ema.decay": torch.ones(())}
    more |= {"embedding_manager.embedder.transformer.x": torch.ones(3)}
    path = originals.save(tensors | more, "more.safetensors")
    assert_same(weights(load(path)), weights(load(originals.file("sd1"))))


def test_a_text_encoder_without_its_middle_name(originals: Any) -> None:
    flat = {
        key.replace("transformer.text_model.", "transformer."): value for key, value in originals.tensors("sd1").items()
    }
    assert_same(weights(load(originals.save(flat, "flat.safetensors"))), weights(load(originals.file("sd1"))))


@pytest.mark.parametrize("form", ["original", "original with prefix", "diffusers", "folder", "a checkpoint's", "ckpt"])
def test_an_autoencoder_given_apart(originals: Any, form: str, tmp_path: Path) -> None:
    """It is taken instead of the file's own, and by a file that has none; the scale is the family's."""
    inside = {
        k.removeprefix("first_stage_model."): v + 1 for k, v in originals.tensors("sdxl").items() if "first_" in k
    }
    folder = {
        key: value + 1
        for key, value in load_file(originals.folder("sdxl") / "vae/diffusion_pytorch_model.safetensors").items()
    }
    path = tmp_path / "vae.safetensors"
    if form == "original":
        save_file(inside, path)
    elif form == "original with prefix":
        save_file({f"vae.{key}": value for key, value in inside.items()}, path)
    elif form == "diffusers":
        save_file(folder, path)
    elif form == "a checkpoint's":
        save_file({f"first_stage_model.{key}": value for key, value in inside.items()}, path)
    elif form == "ckpt":
        path = tmp_path / "vae.ckpt"
        torch.save({"state_dict": inside}, path)
    else:
        path = tmp_path / "vae"
        path.mkdir()
        save_file(folder, path / "diffusion_pytorch_model.safetensors")
        (path / "config.json").write_bytes((originals.folder("sdxl") / "vae/config.json").read_bytes())
    wanted = {key: value + 1 for key, value in load_folder(originals.folder("sdxl"), FP32).vae.state_dict().items()}
    alone = load_vae(path, True, FP32, allow_pickle=form == "ckpt")
    assert_same(dict(alone.state_dict()), wanted)
    assert alone.config == load_folder(originals.folder("sdxl"), FP32).vae.config


def test_an_autoencoder_instead_of_the_checkpoints_own(originals: Any) -> None:
    """By a file that has none, one that has, and a folder."""
    tensors = originals.tensors("sd1")
    inside = {k: v + 1 for k, v in tensors.items() if k.startswith("first_stage_model.")}
    path = originals.save(inside, "vae.safetensors")
    bare = originals.save({k: v for k, v in tensors.items() if k not in inside}, "bare.safetensors")
    own = load_folder(originals.folder("sd1"), FP32).vae
    for checkpoint in (bare, originals.file("sd1"), originals.folder("sd1")):
        found = Pipeline.from_pretrained(checkpoint, "cpu", "fp32", vae=path).components.vae
        assert_same(dict(found.state_dict()), {key: value + 1 for key, value in own.state_dict().items()})
        assert found.config == own.config
    with pytest.raises(FastsdError, match="no autoencoder in this file.*vae"):
        load(bare)
    with pytest.raises(FastsdError, match=r"none\.safetensors: not an autoencoder"):
        load_vae(originals.save({"x": torch.ones(1)}, "none.safetensors"), False, FP32)


def test_a_checkpoint_that_torch_saved(originals: Any, tmp_path: Path) -> None:
    """`state_dict` among training's own values, parameters, tensors that share a storage and that are transposed."""
    tensors: dict[str, Any] = dict(originals.tensors("sd2"))
    both = torch.cat([tensors["model.diffusion_model.out.0.weight"], tensors["model.diffusion_model.out.0.bias"]])
    tensors["model.diffusion_model.out.0.weight"], tensors["model.diffusion_model.out.0.bias"] = both[:64], both[64:]
    for key in ("model.diffusion_model.time_embed.0.weight", "cond_stage_model.model.text_projection"):
        tensors[key] = torch.nn.Parameter(tensors[key].T.contiguous().T)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = tensors[key].to(memory_format=torch.channels_last)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 875000, "lr": [1e-4]}, tmp_path / "x.ckpt")
    torch.save(tensors, tmp_path / "flat.safetensors")  # whatever its name says
    wanted = weights(load(originals.file("sd2"), prediction="epsilon"))
    for name in ("x.ckpt", "flat.safetensors"):
        with pytest.raises(FastsdError, match="a pickle, which can hold programs.*allow_pickle"):
            load(tmp_path / name, prediction="epsilon")
        assert_same(weights(load(tmp_path / name, prediction="epsilon", allow_pickle=True)), wanted)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_byte_is_read_at_most_once(originals: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    read = TensorEntry.read

    def counted(entry: TensorEntry, *buffer: torch.Tensor | None) -> torch.Tensor:
        seen.append((entry.start, entry.start + entry.nbytes))
        return read(entry, *buffer)

    monkeypatch.setattr(TensorEntry, "read", counted)
    load(originals.file(family), prediction="epsilon")
    seen.sort()
    assert all(end <= start for (_, end), (start, _) in zip(seen, seen[1:]))


CHANGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        "sd1",
        lambda t: t.pop("model.diffusion_model.middle_block.1.norm.weight"),
        r"the key model\.diffusion_model\.middle_block\.1\.norm\.weight is missing",
    ),
    "missing in a fused matrix": (
        "sdxl",
        lambda t: t.pop("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"),
        r"the key conditioner\.embedders\.1\.model\.transformer\.resblocks\.1\.attn\.in_proj_weight is missing",
    ),
    "extra": (
        "sd1",
        lambda t: t.update({"first_stage_model.decoder.extra": torch.ones(2)}),
        r"the key first_stage_model\.decoder\.extra \[2\] matches no parameter",
    ),
    "another shape": (
        "sd1",
        lambda t: t.update({"model.diffusion_model.time_embed.2.weight": torch.ones(128, 127)}),
        r"the key model\.diffusion_model\.time_embed\.2\.weight is \[128, 127\]; the config expects \[128, 128\]",
    ),
    "thirds that are none": (
        "sd2",
        lambda t: t.update({"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.ones(193)}),
        r"the key cond_stage_model\.model\.transformer\.resblocks\.0\.attn\.in_proj_bias is \[193\]",
    ),
    "transposed": (
        "sdxl",
        lambda t: t.update(
            {"conditioner.embedders.1.model.text_projection": t["conditioner.embedders.1.model.text_projection"].T}
        ),
        "label_emb.0.0.weight",  # it reads as many numbers as the projection gives
    ),
    "whole numbers": (
        "sd1",
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int32)}),
        r"model\.diffusion_model\.out\.2\.bias is torch\.int32",
    ),
    "no text encoder": (
        "sd1",
        lambda t: [t.pop(key) for key in list(t) if key.startswith("cond_stage")],
        "no text encoder in this file",
    ),
    "another family's text encoder": (
        "sdxl",
        lambda t: [t.pop(key) for key in list(t) if key.startswith("conditioner.embedders.1.")],
        "no text encoder in this file",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_named_as_the_file_names_it(originals: Any, change: str) -> None:
    family, edit, message = CHANGES[change]
    tensors = dict(originals.tensors(family))
    edit(tensors)
    path = originals.save({k: v.contiguous() for k, v in tensors.items()}, f"{change}.safetensors")
    with pytest.raises(FastsdError, match=re.escape(str(path)) + ".*" + message):
        load(path, prediction="epsilon")


def test_a_picture_remembers_averaged_weights(originals: Any, tmp_path: Path, capsys: Any) -> None:
    """--ema draws another picture, and --from-image takes it again."""
    tensors = originals.tensors("sd1")
    near = {key: value - 0.99 if value.ndim else value for key, value in averages(tensors).items()}  # 0.01 away
    path = originals.save(tensors | near, "both.safetensors")
    base = ["-p", "x", "--seed", "1", "--steps", "1", "--device", "cpu", "--dtype", "fp32", "-W", "64", "-H", "64"]
    drawn = {}
    for name, words in (
        ("plain", [*base, "-m", str(path)]),
        ("ema", [*base, "-m", str(path), "--ema"]),
        ("again", ["--from-image", str(tmp_path / "ema.png")]),
    ):
        assert main([*words, "-o", str(tmp_path / f"{name}.png")]) == 0, capsys.readouterr().err
        drawn[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert drawn["again"] == drawn["ema"] != drawn["plain"]
    assert main([*base, "-m", str(originals.file("sd1")), "--ema", "-o", str(tmp_path / "x.png")]) == 2
    assert "no averaged weights (model_ema.*) in this file; leave out --ema" in capsys.readouterr().err
