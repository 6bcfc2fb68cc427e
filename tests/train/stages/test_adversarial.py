"""A checkpoint distilled to two steps: what is trained is what the exported model does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.pipeline import Pipeline
from fastsd.train import checkpoint
from fastsd.train.figures import read_metrics
from fastsd.train.parts import split
from fastsd.train.processes import Processes
from fastsd.train.stages.adversarial import AdversarialStage
from fastsd.train.training import TrainingRun, read_config, train
from fastsd.train.tuning.pairs import teach
from fastsd.weights import save_folder
from tests.support import tiny
from tests.support.project import ROOT
from tests.support.training import write_data

CONFIG = """
out = "{folder}/run"
model = "{folder}/model"
threads = 2
precision = "fp32"
checkpoint_minutes = 100.0
[data]
kind = "digits"
path = "{folder}/mnist"
limit = 12
[adversarial]
steps = 2
[adversarial.pairs]
count = 10
steps = 3
guidance = 2.0
[adversarial.discriminator]
start = 1
channels = 4
r1 = 0.1
[adversarial.fit]
steps = 4
batch_size = 4
rate = 1e-3
schedule = "constant"
warmup = 0
average = 0.0
validate_every = 4
validate_share = 0.2
sample_every = 4
"""
SCHEDULER = SchedulerConfig(
    sampler="ddim", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adversarial")
    components = tiny.sd1(vae=replace(tiny.VAE, block_out_channels=(4, 4, 4, 8)))
    components.scheduler = SCHEDULER
    save_folder(components, path / "model", torch.float32)
    write_data(path)
    (path / "config.toml").write_text(CONFIG.format(folder=path.as_posix()))
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(folder / "config.toml", out=folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def stage(folder: Path) -> AdversarialStage:
    """The stage before its first step, with pairs."""
    (folder / "made").mkdir()
    run = TrainingRun(read_config(folder / "config.toml"), folder / "made", Processes())
    (trainer,) = run.trainers
    assert isinstance(trainer.stage, AdversarialStage)
    with run.job.workers:
        trainer.stage.prepare()
    return trainer.stage


@pytest.mark.heavy
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(folder: Path, whole: Path) -> None:
    """Two steps, then two more: the figures and the weights of four, bit for bit; the pairs are made once."""
    half, config = folder / "half", folder / "config.toml"
    train(config, out=half, changes=["adversarial.fit.steps=2"])
    made = (half / "pairs.pt").stat().st_mtime_ns
    train(config, out=half, resume=True)
    assert (half / "pairs.pt").stat().st_mtime_ns == made

    def figures(run: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in line.items() if k != "minutes" and not k.startswith("val_")}
                for line in read_metrics(run / "metrics.jsonl")]  # fmt: skip

    assert figures(half) == figures(whole) and len(figures(whole)) == 4
    for player in ("model", "discriminator"):
        first, second = (checkpoint.load(run / "adversarial.pt")[player]["model"] for run in (half, whole))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.heavy
def test_the_figures(whole: Path) -> None:
    """The discriminator learns from the first step on and counts from the second; the last step validates."""
    lines = read_metrics(whole / "metrics.jsonl")
    assert ["fooled" in line for line in lines] == [False, True, True, True]
    assert all(line["judge"] > 0 and line["r1"] > 0 for line in lines)
    assert lines[-1]["val_distill"] > 0
    grid = Image.open(whole / "samples" / "adversarial-0000004.png")
    assert grid.width > 2 * 96 and grid.height > 3 * 96  # two held-out pairs; the teacher's, one step, two steps


@pytest.mark.heavy
def test_the_exported_model_samples_in_two_steps(whole: Path, folder: Path) -> None:
    pipe = Pipeline.from_pretrained(whole / "model", device="cpu", dtype="fp32")
    assert pipe.defaults == {
        "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "ddim", "schedule": "default", "width": 64,
        "height": 64,
    }  # fmt: skip
    assert pipe.components.scheduler.timestep_spacing == "trailing"
    assert pipe("three", seed=0).images[0].size == (64, 64)


def test_training_samples_as_the_pipeline_does(stage: AdversarialStage) -> None:
    """The student's last sample is the pipeline's latent at its settings, the teacher's pair that of a guided call."""
    texts, noise = ["three", "a thick 4"], stage.pairs.noise([0, 1])
    given = noise.permute(0, 3, 1, 2)
    pipe = Pipeline(replace(stage.components, scheduler=stage.scheduler), torch.device("cpu"), torch.float32)

    def latents(**settings: float) -> torch.Tensor:
        found = [pipe(text, latents=one[None], output_type="latent", width=64, height=64, **settings).images
                 for text, one in zip(texts, given)]  # type: ignore[arg-type]  # fmt: skip
        return torch.cat([torch.as_tensor(one) for one in found]).permute(0, 2, 3, 1)

    with torch.no_grad():
        ours = stage.student_sample(noise, stage.captions(texts), 2)
    # Rounding: some 30 products of at most 600 terms in each of two calls, in another order; errors that grow as the
    # root of their number stay below 2^-23 * sqrt(600 * 60) = 2e-5 of the largest value.
    largest = float(ours.abs().max())
    torch.testing.assert_close(ours, latents(num_inference_steps=2, guidance_scale=1.0), rtol=0, atol=2e-5 * largest)
    taught = teach(stage.teacher, stage, noise, texts, 3, 2.0)
    expected = latents(num_inference_steps=3, guidance_scale=2.0)
    # Guidance of 2 adds twice the one half's error and once the other's, in each of three calls.
    torch.testing.assert_close(taught, expected, rtol=0, atol=9 * 2e-5 * float(taught.abs().max()))


def test_the_gradient_is_that_of_the_weighted_sum(stage: AdversarialStage) -> None:
    """The way through the teacher is gone back once; the student's gradient is that of the plain sum all the same."""
    part = split(0, stage.stream, 1, 4, 1)[0]
    batch = stage.batch(part)
    parameters = list(stage.components.unet.parameters())
    total, metrics = stage.loss("model", batch, part)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    text = stage.captions(batch["texts"])
    made = stage.student_sample(batch["noise"], text, batch["calls"])
    verdicts = stage.discriminator(stage._maps(made, batch, "sample", text), batch["sample_t"], text.pooled)
    adversarial = -torch.stack([verdict.mean() for verdict in verdicts]).mean()
    plain = (made - batch["sample"]).square().mean() + metrics["gan_weight"] * adversarial
    # The value's two terms cancel in part, and the weight was rounded to fp32 with them.
    terms = metrics["distill"] + abs(metrics["gan_weight"] * metrics["fooled"])
    assert abs(float(total.detach() - plain.detach())) < 1e-5 * terms
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in expected if g is not None]).norm()
    for one, other in zip(found, expected):
        if one is not None and other is not None:
            # fp32 sums of up to 64 * 64 places in another order, of the whole gradient's norm
            assert float((one - other).norm()) < 1e-5 * float(norm)


def test_pairs_do_not_depend_on_their_neighbours(stage: AdversarialStage) -> None:
    assert torch.equal(stage.pairs.noise([7, 3])[1], stage.pairs.noise([3])[0])
    assert not torch.equal(stage.pairs.noise([3]), stage.pairs.noise([4]))
    rows = np.concatenate([stage.pair_order.validation[0], stage.pair_order.training[0]])
    assert sorted(rows.tolist()) == list(range(10)) and len(stage.pair_order.validation[0]) == 2


@pytest.mark.heavy
def test_another_teacher_makes_other_pairs(folder: Path, whole: Path) -> None:
    """The file that is there is of other settings: it is not taken."""
    out = folder / "other"
    out.mkdir()
    (out / "pairs.pt").write_bytes((whole / "pairs.pt").read_bytes())
    train(folder / "config.toml", out=out, changes=["adversarial.pairs.guidance=3", "adversarial.fit.steps=1"])
    before, after = (checkpoint.load(run / "pairs.pt") for run in (whole, out))
    assert before["texts"] == after["texts"] and not torch.equal(before["samples"], after["samples"])


BAD = {
    "steps is 9; it should be from 1 to 8": "adversarial.steps=9",
    "distill is 0.0; it should be above 0": "adversarial.distill=0",
    "pairs.count is 0; it should be at least 1": "adversarial.pairs.count=0",
    "discriminator.levels is .*the first below the second": "adversarial.discriminator.levels=[0.7, 0.2]",
    "discriminator.weight is -1.0; it should be at least 0": "adversarial.discriminator.weight=-1",
    "epsilon cannot start from zero terminal SNR": "model={folder}/epsilon",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str, folder: Path, tmp_path: Path) -> None:
    if "epsilon" in message and not (folder / "epsilon").exists():
        components = tiny.sd1(vae=replace(tiny.VAE, block_out_channels=(4, 4, 4, 8)))
        components.scheduler = replace(SCHEDULER, prediction_type="epsilon")
        save_folder(components, folder / "epsilon", torch.float32)
    with pytest.raises(FastsdError, match=message):
        train(
            folder / "config.toml", out=tmp_path / "run", changes=[BAD[message].replace("{folder}", folder.as_posix())]
        )


def test_the_example_config_is_read() -> None:
    settings = read_config(ROOT / "configs" / "digits-2-steps.toml")
    assert settings.model == "digits" and settings.stages["adversarial"].steps == 2
