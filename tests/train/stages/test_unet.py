"""The stage `unet` on image folders: objectives, the exported model, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.model.unet_levels import UNetLevel
from fastsd.pipeline import Pipeline
from fastsd.train import checkpoint
from fastsd.train.figures import read_metrics
from fastsd.train.training import train
from fastsd.weights import load_folder, save_folder
from tests.support import tiny
from tests.support.training import CONFIG

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 images in three colours, and a config of an autoencoder that is trained for two steps."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "images").mkdir()
    lines = []
    for n in range(24):
        name, colour = list(COLOURS.items())[n % 3]
        size = (32, 32) if n < 16 else (48, 24)
        Image.new("RGB", size, colour).save(folder / "images" / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "text": [name, f"all {name}"]})
    (folder / "images" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    text = CONFIG.format(folder=folder.as_posix(), vae_steps=2, unet_steps=4)
    text = text.replace('kind = "digits"', 'kind = "folder"\nresolution = 32').replace("/mnist", "/images")
    text = text.replace("replacement = true", "vocabulary = 540").replace("rescale_betas_zero_snr = true\n", "")
    (folder / "config.toml").write_text(text)
    return folder


EPSILON = 'unet.scheduler.prediction_type="epsilon"'


GAN = ["weight=0.5", "start=1", "channels=4", "layers=2", "features=1.0"]
LINEAR = ['beta_schedule="linear"', "beta_start=1e-4", "beta_end=0.02"]
MARUYAMA = 'defaults.sampler="euler_maruyama"'
RUNS = {
    "buckets": ["data.buckets=true", *(f"vae.gan.{change}" for change in GAN)],
    "weighted": ["unet.min_snr=5", "unet.noise_offset=0.1", 'unet.model.skip="add"', "data.augment.flip=true"],
    "vp": [EPSILON, 'unet.sde="vp"', MARUYAMA, "unet.fit.sample_every=4", *(f"unet.scheduler.{c}" for c in LINEAR)],
    "ve": [EPSILON, 'unet.sde="ve"', MARUYAMA],
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.heavy
def test_the_model_of_every_objective_generates(folder: Path, name: str) -> None:
    out = folder / name
    train(folder / "config.toml", out=out, export=out / "model", changes=RUNS[name])
    lines = read_metrics(out / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["stage"] == "unet"]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    judged = ["judge" in line for line in lines if line["stage"] == "vae"]
    assert judged == ([False, True] if name == "buckets" else [False, False])
    pipe = Pipeline.from_pretrained(out / "model", dtype="fp32", device="cpu")
    image = pipe("all red", seed=0, num_inference_steps=3).images[0]
    assert image.size == (32, 32) and np.asarray(image).std() > 0
    if name == "vp":
        grid = Image.open(out / "samples" / "unet-0000004.png")
        assert grid.width > 6 * 96 and grid.height > 2 * 96
    if name == "buckets":
        buckets = json.loads((out / "record.json").read_text())["data"]["buckets"]
        assert sorted(buckets.values()) == [8, 16] and buckets["32x32"] == 16


@pytest.mark.heavy
def test_a_text_encoder_that_stays_as_it_is(folder: Path) -> None:
    """It is not trained, the exported model has it with its tokenizer, and a resumed run loads it again."""
    save_folder(tiny.sd1(), folder / "given", torch.float32)
    text = (folder / "config.toml").read_text()
    own, rest = text[text.index("[unet.text]") :].split("[unet.scheduler]")
    text = text.replace(own, "").replace("cross_attention_dim = 8", "cross_attention_dim = 32")
    config, out = folder / "frozen.toml", folder / "frozen"
    config.write_text(
        text.replace("[unet.model]", f'[unet]\ntext_from = "{(folder / "given").as_posix()}"\n[unet.model]')
    )
    train(config, out=out, export=out / "model", changes=["unet.fit.steps=2"])
    train(config, out=out, export=out / "model", resume=True)
    assert len(read_metrics(out / "metrics.jsonl")) == 6
    exported = load_folder(out / "model", torch.float32)
    given = tiny.all_weights(tiny.sd1())
    found = tiny.all_weights(exported)
    kept = [key for key in given if key.startswith("text0")]
    assert kept and all(torch.equal(found[key], given[key].half().float()) for key in kept)
    assert exported.tokenizers[0].ids("all red") == tiny.sd1().tokenizers[0].ids("all red")
    state = checkpoint.load(out / "unet.pt")["denoiser"]["model"]
    assert all(key.startswith("unet.") for key in state)


@pytest.mark.heavy
def test_recomputed_blocks_give_the_same_losses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []  # the blocks that ran; several threads append
    run_block = UNetLevel._whole_block

    def counted(self: UNetLevel, i: int, *inputs: Any) -> torch.Tensor:
        calls.append(i)
        return run_block(self, i, *inputs)

    monkeypatch.setattr(UNetLevel, "_whole_block", counted)
    counts, losses = [], []
    for recompute in ("false", "true"):
        out = folder / f"recompute-{recompute}"
        train(folder / "config.toml", out=out, export=out / "model", changes=[f"unet.recompute={recompute}"])
        counts.append(len(calls))
        losses.append([line["loss"] for line in read_metrics(out / "metrics.jsonl") if line["stage"] == "unet"])
        calls.clear()
    assert losses[0] == losses[1]
    assert counts[1] == 2 * counts[0]


def test_what_does_not_go_together_is_one_line(folder: Path) -> None:
    for change, message in (
        ('unet.sde="sub-vp"', "unet.sde is 'sub-vp'; it should be one of"),
        ('unet.sde="vp"', 'unet.scheduler.prediction_type = "epsilon"'),
        ("unet.sigma_min=60", "the first below the second"),
        ("unet.text_from=digits", "one of the two is needed: the table unet.text"),
        ("vae.lpips_weight=-1", "it should be at least 0"),
        ("vae.gan.features=1.0", "needs a discriminator"),
    ):
        with pytest.raises(FastsdError) as caught:
            train(folder / "config.toml", out=folder / "none", changes=[change])
        assert message in str(caught.value) and not (folder / "none").exists()
