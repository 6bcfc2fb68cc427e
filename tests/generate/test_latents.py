"""The autoencoder: widened where it overflows in fp16, captured where the image is small enough.

Tapes stand in for CUDA graphs, as in tests/test_graph.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsd.config import SchedulerConfig, TAESDConfig
from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.model.taesd import TAESD
from fastsd.pipeline import Pipeline
from tests.support.pipelines import PHOTO, graphed_pipeline, latents, tiny_pipeline
from tests.support.tape import TapeRecorder

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def test_tiny_autoencoders() -> None:
    """TAESD in the autoencoder's place, and another for previews: each has graphs of its own, though both decode."""
    torch.manual_seed(0)
    config = TAESDConfig(block_out_channels=(8,) * 4)
    own, shown = (TAESD(config).eval().requires_grad_(False) for _ in range(2))
    plain = tiny_pipeline()
    plain.components.vae = own
    recorder = TapeRecorder()
    eager = Pipeline(plain.components, plain.device, plain.dtype, preview=shown)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(recorder), preview=shown)
    for settings in ({"image": PHOTO, "strength": 0.5}, {"image": PHOTO.rotate(90), "strength": 0.9}, {}):
        steps, wanted = (list(p.stream("a cat", seed=1, num_inference_steps=4, **settings)) for p in (pipe, eager))
        assert np.array_equal(steps[0].preview(), wanted[0].preview())
        assert np.array_equal(steps[-1].result.images[0], wanted[-1].result.images[0])
        assert not np.array_equal(steps[0].preview(), pipe.decode(steps[0]._estimate.denoised(SchedulerConfig()))[0])
    assert recorder.recorded == 5  # encoder, two decoders, text, step


def test_the_autoencoder_that_overflows_is_widened_once() -> None:
    """20 of 20 images; the graphs of the old weights are dropped, and one note says so."""
    plain = tiny_pipeline(dtype=torch.float16)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(TapeRecorder()))
    with torch.no_grad():
        plain.components.vae.decoder.conv_in.weight.mul_(1e5)  # beyond fp16's 65504 in a map, fine in fp32
    notes = []
    for seed in range(20):
        result = pipe("a cat", seed=seed, num_inference_steps=1)
        assert np.asarray(result.images[0]).std() > 0
        notes += result.notes
    assert notes == ["the autoencoder overflowed in fp16; it runs in fp32 from now on"]


def test_large_images_leave_the_autoencoder_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recorder = graphed_pipeline()
    latents(pipe, image=PHOTO)
    captures = recorder.recorded
    monkeypatch.setattr("fastsd.generate.latents.CAPTURED", 64 * 64 - 1)
    photo = pipe("a cat", seed=1).images[0]
    assert recorder.recorded == captures
    monkeypatch.undo()
    assert np.array_equal(pipe("a cat", seed=1).images[0], photo) and recorder.recorded == captures + 1


def test_an_encoder_that_overflows_is_widened_too() -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    pipe = Pipeline(plain.components, plain.device, plain.dtype, Graphs(TapeRecorder()))
    with torch.no_grad():
        plain.components.vae.encoder.conv_in.weight.mul_(1e5)  # itself within fp16, its map not
    notes = []
    for seed in range(3):
        result = pipe("a cat", image=PHOTO, seed=seed, strength=0.5, num_inference_steps=2, output_type="latent")
        assert torch.isfinite(result.images).all()
        notes += result.notes
    assert notes == ["the autoencoder overflowed in fp16; it runs in fp32 from now on"]


@pytest.mark.parametrize("overflows", [True, False])
def test_the_dtype_of_the_autoencoder_is_chosen_in_loading(
    model: Path, tmp_path: Path, overflows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its config says; the retrained autoencoder of SDXL says that it does not overflow."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": overflows}))
    played = torch.float32 if overflows else torch.float16
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp16")
    assert {p.dtype for p in pipe.components.vae.parameters()} == {played}
    assert {p.dtype for p in pipe.components.unet.parameters()} == {torch.float16}
    monkeypatch.setattr("fastsd.pipeline.autoencoder_dtype", lambda *_: torch.bfloat16)  # as on a newer GPU
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp16")
    assert next(pipe.components.vae.parameters()).dtype == torch.bfloat16
    image = pipe("a cat", seed=1, num_inference_steps=1, image=PHOTO, strength=1.0).images[0]
    assert np.asarray(image).std() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_value_that_is_not_finite_is_enough(
    value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    plain.components.vae.to(dtype)
    vae, decode = plain.components.vae, plain.components.vae.decode
    ran = []

    def spoilt(z: torch.Tensor) -> torch.Tensor:
        ran.append(z.dtype)
        image = decode(z)
        if z.dtype == dtype:
            image[0, 5, 7, 1] = value
        return image

    monkeypatch.setattr(vae, "decode", spoilt)
    for _ in range(3):
        assert plain("a cat", seed=1, num_inference_steps=1).images[0].size == (64, 64)
    assert ran == [dtype] + [torch.float32] * 3  # one image is decoded twice, and the weights converted once


def test_a_model_that_is_not_finite_is_an_error_and_leaves_the_autoencoder_as_it_is() -> None:
    plain = tiny_pipeline(dtype=torch.float16)
    with torch.no_grad():
        plain.components.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FastsdError, match="not finite.*dtype"):
        plain("a cat", seed=1, num_inference_steps=1)
    assert plain.components.vae.quant_conv.weight.dtype == torch.float16
