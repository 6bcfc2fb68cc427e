"""Small training runs: exact resume, the exported model, errors."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.train import checkpoint, loop
from fastsd.train.training import train
from fastsd.weights import load_folder
from tests.support.training import write_config


def differences(a: object, b: object, path: str = "") -> list[str]:
    """The paths at which two checkpoints differ; times are not compared."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [path]
        return [d for key in a if key != "minutes" for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{path}/{i}")]
    return [] if a == b else [path]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 10 steps per stage."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(write_config(folder))
    return folder


def train_until(config: Path, stage: str, step: int, resume: bool) -> None:
    """Train, save at `step` of `stage`, and interrupt the run two steps later."""
    validated = loop.Trainer._validated

    def interrupted(self: loop.Trainer) -> dict[str, float]:
        if self.stage.name == stage and self.step == step:
            self.save()
        if self.stage.name == stage and self.step == step + 2:
            raise KeyboardInterrupt
        return validated(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_validated", interrupted)
        train(config, resume=resume)


def test_resumed_run_is_bit_identical(uninterrupted: Path, tmp_path: Path) -> None:
    # The learning rate depends on the total number of steps, so the config must be the same. The interruption comes
    # from outside, as a kill would.
    config = write_config(tmp_path)
    for stage, step in (("vae", 5), ("unet", 5)):
        with pytest.raises(KeyboardInterrupt):
            train_until(config, stage, step, resume=stage == "unet")
    train(config, resume=True)
    for name in ("vae.pt", "latents.pt", "unet.pt"):
        expected, resumed = (checkpoint.load(folder / "run" / name) for folder in (uninterrupted, tmp_path))
        assert differences(expected, resumed) == []
    # The comparison can fail: one more step gives another checkpoint.
    train(write_config(tmp_path, unet_steps=11), resume=True)
    assert "/step" in differences(expected, checkpoint.load(tmp_path / "run" / "unet.pt"))


def test_export_has_vocabulary_defaults_and_averaged_weights(uninterrupted: Path) -> None:
    components = load_folder(uninterrupted / "model", torch.float32)
    assert components.sample_size == 8 and "eight" in components.known_words
    assert components.defaults["width"] == 64 and components.defaults["sampler"] == "ddim"
    assert components.tokenizers[0]("eight").shape == (1, 16)
    average = checkpoint.load(uninterrupted / "run" / "unet.pt")["denoiser"]["average"]["unet.conv_out.weight"]
    loaded = components.unet.conv_out.weight  # may be packed for oneDNN
    loaded = loaded.to_dense() if loaded.is_mkldnn else loaded
    torch.testing.assert_close(loaded, average, rtol=2**-11, atol=2**-24)  # fp16 rounding


def test_diffusers_opens_the_export_in_fp32_by_default(uninterrupted: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(uninterrupted / "model"), safety_checker=None)
    assert {theirs.unet.dtype, theirs.vae.dtype, theirs.text_encoder.dtype} == {torch.float32}
    assert theirs.tokenizer.model_max_length == 16 and theirs.scheduler.config.rescale_betas_zero_snr
    components = load_folder(uninterrupted / "model", torch.float32)
    ids = components.tokenizers[0](["a thick eight", "zebra"])
    with torch.inference_mode():
        ours = components.text_encoders[0](ids).hidden
        expected = theirs.text_encoder(ids)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_export_only_writes_the_same_model(uninterrupted: Path, tmp_path: Path) -> None:
    train(write_config(uninterrupted), export=tmp_path / "again", export_only=True)
    model = uninterrupted / "model"
    files = list(model.rglob("*.safetensors"))
    assert len(files) == 3  # UNet, autoencoder, text encoder
    for file in files:
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(model)).read_bytes()


def test_existing_run_and_unusable_checkpoints_are_errors(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    config = write_config(folder)
    shutil.copytree(uninterrupted / "run", folder / "run")
    with pytest.raises(FastsdError, match="--resume"):
        train(config)
    truncated = (folder / "run" / "unet.pt").read_bytes()[:1000]
    (folder / "run" / "unet.pt").write_bytes(truncated)
    with pytest.raises(FastsdError, match=r"unet\.pt: cannot be read"):
        train(config, resume=True)
    (folder / "run" / "unet.pt").unlink()
    config.write_text(config.read_text().replace("[4, 4, 4, 8]", "[4, 4, 8, 8]"))
    with pytest.raises(FastsdError) as caught:
        train(config, resume=True)
    assert "changed: vae.model.block_out_channels from [4, 4, 4, 8] to [4, 4, 8, 8]" in str(caught.value)
    (folder / "run" / "config.toml").unlink()
    with pytest.raises(FastsdError, match=r"vae\.pt: does not match"):
        train(config, resume=True)


def test_no_run_is_resumed_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no run there to resume; without --resume one begins"):
        train(write_config(tmp_path), out=tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_run_of_a_version_with_fewer_keys_is_resumed(uninterrupted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    shutil.copytree(uninterrupted / "run", tmp_path / "run")
    recorded = tmp_path / "run" / "config.toml"
    lines = recorded.read_text().splitlines(keepends=True)
    recorded.write_text("".join(line for line in lines if not line.startswith(("max_bad =", "caption ="))))
    assert len(recorded.read_text().splitlines()) == len(lines) - 2
    train(config, resume=True)
    assert {"max_bad = 0.01\n", 'caption = ""\n'} <= set(recorded.read_text().splitlines(keepends=True))


def test_missing_and_damaged_files_are_errors(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    file = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FastsdError, match="damaged"):
        train(config)
    file.write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(FastsdError, match="not an IDX file"):
        train(config)
    file.unlink()
    with pytest.raises(FastsdError, match="train-images-idx3-ubyte.gz: no such file"):
        train(config)
    with pytest.raises(FastsdError, match="--config"):
        train(tmp_path / "nothing.toml")
    with pytest.raises(FastsdError, match="nothing to export"):
        train(config, export_only=True)
