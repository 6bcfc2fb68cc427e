"""Single files in the original layout give the images of their folders; averaged weights; one line for each defect."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.weights import load_folder, load_single_file
from fastsd.weights.convert import convert
from fastsd.weights.formats.safetensors_file import TensorEntry
from tests.support import original
from tests.support.tiny import all_weights, assert_same

FP32 = torch.float32
Tensors = dict[str, torch.Tensor]


def load(path: Path, **arguments: Any) -> Any:
    return load_single_file(path, FP32, **arguments)


@pytest.mark.parametrize("family", original.WITH_KINDS)
def test_a_file_gives_the_images_of_its_folder(originals: Any, family: str) -> None:
    """Text to image, image to image with the refiner, inpainting, editing, with a depth map."""
    arguments: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    if family == "refiner" or any(kind in family for kind in ("inpainting", "InstructPix2Pix")):
        pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
        arguments |= {"image": Image.fromarray(pixels), "strength": 1.0}
    else:
        arguments |= {"width": 32, "height": 32}
    if "depth" in family:
        arguments["depth_image"] = Image.linear_gradient("L")
    if "inpainting" in family:
        left = (np.arange(32) < 16).repeat(32).reshape(32, 32)
        arguments["mask_image"] = Image.fromarray(left.astype(np.uint8) * 255)
    prediction = "v_prediction" if family == "sd2" else None  # which the tests' files of SD 2 do not say
    found = Pipeline.from_pretrained(originals.file(family), "cpu", "fp32", prediction=prediction)("a cat", **arguments)
    expected = Pipeline.from_pretrained(originals.folder(family), "cpu", "fp32")("a cat", **arguments)
    assert float(expected.images.std()) > 0
    assert float((found.images - expected.images).abs().max()) <= 1e-4 * float(expected.images.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(originals: Any, dtype: torch.dtype) -> None:
    """Loaded in their own dtype bit for bit, and in fp32 to the same values."""
    halved = {key: value.to(dtype) for key, value in originals.tensors("sd1").items()}
    path = originals.save(halved, f"{dtype}.safetensors")
    folder = load_folder(originals.folder("sd1"), FP32)
    expected = {key: value.to(dtype) for key, value in all_weights(folder).items()}
    assert_same(all_weights(load_single_file(path, dtype)), expected)
    assert_same(all_weights(load(path)), {key: value.float() for key, value in expected.items()})


def with_averages(tensors: Tensors, difference: float = 1.0) -> Tensors:
    """The tensors, and a moving average of the UNet that differs by `difference`, as training stores it."""
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value + difference
        for key, value in tensors.items()
        if key.startswith("model.diffusion_model.")
    }
    return tensors | averages | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7)}


def test_averaged_weights(originals: Any, tmp_path: Path) -> None:
    """They replace the UNet's weights if asked for; a file without them, or without one of them, is refused."""
    tensors = originals.tensors("sd1")
    path = originals.save(with_averages(tensors), "averaged.safetensors")
    plain = all_weights(load(originals.file("sd1")))
    expected = {key: value + 1 if key.startswith("unet.") else value for key, value in plain.items()}
    assert_same(all_weights(load_single_file(path, FP32, ema=True)), expected)
    convert(path, tmp_path / "alone.safetensors", ema=True)
    assert_same(all_weights(load(tmp_path / "alone.safetensors")), expected)
    with pytest.raises(FastsdError, match=r"no averaged weights \(model_ema\.\*\) in this file; leave out ema"):
        load_single_file(originals.file("sd1"), FP32, ema=True)
    incomplete = {key: value for key, value in with_averages(tensors).items() if not key.endswith("out2weight")}
    with pytest.raises(FastsdError, match=r"the key model_ema\.diffusion_modelout2weight is missing"):
        load_single_file(originals.save(incomplete, "incomplete.safetensors"), FP32, ema=True)


def test_an_image_records_averaged_weights(originals: Any, tmp_path: Path, capsys: Any) -> None:
    """--ema changes the image, and --from-image uses the average again."""
    path = originals.save(with_averages(originals.tensors("sd1"), 0.01), "both.safetensors")
    base = ["-p", "x", "--seed", "1", "--steps", "1", "--device", "cpu", "--dtype", "fp32", "-W", "64", "-H", "64"]
    images = {}
    for name, words in (
        ("plain", [*base, "-m", str(path)]),
        ("ema", [*base, "-m", str(path), "--ema"]),
        ("again", ["--from-image", str(tmp_path / "ema.png")]),
    ):
        assert main([*words, "-o", str(tmp_path / f"{name}.png")]) == 0, capsys.readouterr().err
        images[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert images["again"] == images["ema"] != images["plain"]
    assert main([*base, "-m", str(originals.file("sd1")), "--ema", "-o", str(tmp_path / "x.png")]) == 2
    assert "no averaged weights (model_ema.*) in this file; leave out --ema" in capsys.readouterr().err


def test_other_keys_of_original_files_are_ignored(originals: Any) -> None:
    """Averages, the training schedule, the autoencoder's loss, scalars and keys of other programs."""
    extra = {"betas": torch.ones(1000), "alphas_cumprod": torch.ones(1000), "denoiser.sigmas": torch.ones(1000)}
    extra |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    extra |= {"first_stage_model.loss.logvar": torch.ones(()), "first_stage_model.model_ema.decay": torch.ones(())}
    extra |= {"embedding_manager.embedder.transformer.x": torch.ones(3)}
    path = originals.save(with_averages(originals.tensors("sd1")) | extra, "more.safetensors")
    assert_same(all_weights(load(path)), all_weights(load(originals.file("sd1"))))


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_byte_is_read_at_most_once(originals: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[tuple[int, int]] = []
    read = TensorEntry.read

    def counted(entry: TensorEntry, *buffer: torch.Tensor | None) -> torch.Tensor:
        spans.append((entry.start, entry.start + entry.nbytes))
        return read(entry, *buffer)

    monkeypatch.setattr(TensorEntry, "read", counted)
    load(originals.file(family), prediction="epsilon")
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))


OPENCLIP = "conditioner.embedders.1.model."
CHANGES: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "missing": (
        "sd1",
        lambda t: t.pop("model.diffusion_model.middle_block.1.norm.weight"),
        r"the key model\.diffusion_model\.middle_block\.1\.norm\.weight is missing",
    ),
    "missing in a fused matrix": (
        "sdxl",
        lambda t: t.pop(f"{OPENCLIP}transformer.resblocks.1.attn.in_proj_weight"),
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
    "not divisible by three": (
        "sd2",
        lambda t: t.update({"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.ones(193)}),
        r"the key cond_stage_model\.model\.transformer\.resblocks\.0\.attn\.in_proj_bias is \[193\]",
    ),
    "transposed": (
        "sdxl",
        lambda t: t.update({f"{OPENCLIP}text_projection": t[f"{OPENCLIP}text_projection"].T}),
        "label_emb.0.0.weight",  # whose width includes the projection's
    ),
    "integers": (
        "sd1",
        lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int32)}),
        r"model\.diffusion_model\.out\.2\.bias is torch\.int32",
    ),
    "no text encoder": (
        "sd1",
        lambda t: [t.pop(key) for key in list(t) if key.startswith("cond_stage")],
        "no text encoder in this file",
    ),
    "half of a family's text encoders": (
        "sdxl",
        lambda t: [t.pop(key) for key in list(t) if key.startswith("conditioner.embedders.1.")],
        "no text encoder in this file",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_message_uses_the_keys_of_the_file(originals: Any, change: str) -> None:
    family, edit, message = CHANGES[change]
    tensors = dict(originals.tensors(family))
    edit(tensors)
    path = originals.save({k: v.contiguous() for k, v in tensors.items()}, f"{change}.safetensors")
    with pytest.raises(FastsdError, match=re.escape(str(path)) + ".*" + message):
        load(path, prediction="epsilon")
