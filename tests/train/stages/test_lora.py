"""A LoRA trained by a config: it learns, resumes bit for bit, and its file does what training saw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.train.training import read_config, train
from fastsd.weights import save_folder
from fastsd.weights.adapters.apply import Adapter
from tests.support import tiny
from tests.support.training import write_data

ROOT = Path(__file__).parent.parent.parent.parent
CONFIG = """
out = "{folder}/run"
model = "{folder}/model"
threads = 1
precision = "fp32"
checkpoint_minutes = 100.0
[data]
kind = "digits"
path = "{folder}/mnist"
limit = 12
[lora.adapter]
rank = 2
alpha = 2.0
dropout = 0.1
networks = ["unet"]
targets = ["linear", "convolution"]
[lora.fit]
steps = 4
batch_size = 2
rate = 1e-2
warmup = 0
average = 0.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, a tiny data set and a config."""
    path = tmp_path_factory.mktemp("lora")
    for name, components in (("model", tiny.sd1()), ("xl", tiny.sdxl())):
        components.vae = AutoencoderKL(replace(tiny.VAE, block_out_channels=(4, 4, 4, 8)))
        save_folder(components, path / name, torch.float32)
    write_data(path)
    (path / "config.toml").write_text(CONFIG.format(folder=path.as_posix()))
    return path


def run(folder: Path, out: str, *changes: str, resume: bool = False) -> Path:
    train(folder / "config.toml", out=folder / out, resume=resume, changes=changes)
    return folder / out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}


def test_a_run_and_its_file(folder: Path) -> None:
    """The file changes what the checkpoint generates, and says what made it."""
    out = run(folder, "whole")
    file = out / "model" / "lora.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "2" and metadata["ss_num_train_images"] == "12"
    assert metadata["modelspec.title"] == "lora" and metadata["modelspec.prediction_type"] == "epsilon"
    pipe = Pipeline.from_pretrained(folder / "model", device="cpu", dtype="fp32")
    arguments: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "output_type": "latent"}
    before = pipe("a cat", **arguments).images
    assert pipe.adapters.set([Adapter(file)]) == []
    assert not torch.equal(torch.as_tensor(pipe("a cat", **arguments).images), torch.as_tensor(before))


def test_a_resumed_run_is_the_same_bit_for_bit(folder: Path) -> None:
    """Two steps, then two more, with dropout: the losses and the file of four."""
    whole = run(folder, "four")
    half = run(folder, "half", "lora.fit.steps=2", "lora.fit.schedule=constant")
    run(folder, "half", "lora.fit.schedule=constant", resume=True)
    constant = run(folder, "four-constant", "lora.fit.schedule=constant")
    assert losses(half) == losses(constant) and len(losses(half)) == 4
    ours, theirs = (tensors(path / "model" / "lora.safetensors") for path in (half, constant))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(whole)[:1] == losses(constant)[:1]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "changes",
    [
        ("lora.adapter.kind=lokr", "lora.adapter.dora=true", "lora.recompute=true", "lora.fit.accumulate=2"),
        ('lora.adapter.networks=["unet", "text_encoder"]', "lora.loss.min_snr=5", "lora.loss.noise_offset=0.1"),
        ("lora.dtype=bf16", "precision=bf16", 'lora.save.formats=["kohya", "diffusers", "peft"]'),
        ("precision=bf16", "lora.fit.validate_every=1", "lora.fit.validate_share=0.25"),  # the checkpoint stays in fp32
        ("model={folder}/xl", 'lora.adapter.networks=["unet", "text_encoder", "text_encoder_2"]'),
        ("lora.prior.prompt=a digit", "lora.prior.images=2", "lora.prior.steps=1", 'lora.sample.prompts=["a", "b"]',
         "lora.fit.sample_every=2", "lora.fit.validate_every=2", "lora.fit.validate_share=0.25"),
    ],
    ids=["lokr", "text", "bf16", "bf16 products", "sdxl", "prior"],
)  # fmt: skip
def test_other_settings_train_too(changes: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    changes = tuple(change.replace("{folder}", folder.as_posix()) for change in changes)
    out = run(folder, str(tmp_path / "run"), "lora.fit.steps=2", *changes)
    assert len(losses(out)) == 2 and all(loss > 0 for loss in losses(out))
    assert (out / "model" / "lora.safetensors").is_file()
    if any("prior" in change for change in changes):
        assert len(list((out / "class").glob("*.png"))) == 2
        assert (out / "samples" / "lora-0000002.png").is_file()


@pytest.mark.heavy
def test_it_learns(folder: Path) -> None:
    """Forty steps on twelve images of bars: validation on the same noise costs less than before."""
    out = run(folder, "learns", "lora.fit.steps=40", "lora.fit.validate_every=39", "lora.fit.validate_share=0.25")
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated = [line["val_loss"] for line in found if "val_loss" in line]
    assert validated[-1] < losses(out)[0]


BAD = {
    "--model .*: it should be a checkpoint": ("model=",),
    "rank is 0; it should be a whole number from 1": ("lora.adapter.rank=0",),
    "alpha is nan": ("lora.adapter.alpha=nan",),
    "'attn2.to_kk' names no layer of unet; did you mean": ('lora.adapter.targets=["attn2.to_kk"]',),
    "save.formats is 'khoya'; .*did you mean kohya": ('lora.save.formats=["khoya"]',),
    "no such": ("model={folder}/nothing",),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str, folder: Path, tmp_path: Path) -> None:
    changes = [change.replace("{folder}", folder.as_posix()) for change in BAD[message]]
    with pytest.raises(FastsdError, match=message.replace("--model .*: ", "")):
        train(folder / "config.toml", out=tmp_path / "run", changes=changes)
    assert not (tmp_path / "run" / "lora.pt").exists()


@pytest.mark.heavy
def test_the_example_of_the_docs(tmp_path: Path) -> None:
    """configs/lora-digits.toml in a shortened form, on the bundled model, through the command line."""
    out = tmp_path / "run"
    changes = ["data.limit=8", "lora.fit.steps=2", "lora.fit.batch_size=2", "lora.sample.steps=1"]
    flags = [flag for change in changes for flag in ("--set", change)]
    config = str(ROOT / "configs" / "lora-digits.toml")
    assert (
        main(["train", "--config", config, "--out", str(out), *flags, "--set", f"data.path={ROOT / 'data/mnist'}"]) == 0
    )
    assert sorted(path.name for path in (out / "model").iterdir()) == [
        "outlines.safetensors",
        "pytorch_lora_weights.safetensors",
        "trained.json",
    ]
    image = tmp_path / "3.png"
    lora = str(out / "model" / "outlines.safetensors")
    assert main(["--prompt", "3", "--lora", lora, "--steps", "1", "-o", str(image)]) == 0
    assert image.is_file()
    assert main(["train", "--config", config, "--out", str(tmp_path / "bad"), "--set", "lora.adapter.rank=0"]) == 2


@pytest.mark.parametrize("name", ["lora-digits", "lora-sd15", "lora-sdxl", "textual-inversion", "finetune"])
def test_the_example_configs_are_read(name: str) -> None:
    settings = read_config(ROOT / "configs" / f"{name}.toml", ["model=digits", "data.path=somewhere"])
    assert settings.model == "digits" and len(settings.stages) == 1
