"""Training runs in miniature: exact resume, atomic checkpoints, what is exported, bad input."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsd.config import VAEConfig
from fastsd.errors import FastsdError
from fastsd.model.vae import AutoencoderKL
from fastsd.train import checkpoint
from fastsd.train.autoencoder import centre
from fastsd.train.digits import enlarge, read_digits
from fastsd.train.loop import learning_rate, split
from fastsd.train.run import train
from fastsd.train.settings import Fit, read_settings
from fastsd.train.strokes import measure
from fastsd.weights import load_folder

CONFIG = """
out = "{folder}/run"
export = "{folder}/model"
threads = 2
precision = "fp32"
checkpoint_minutes = 100.0
[data]
mnist = "{folder}/mnist"
passes = 2
[autoencoder.model]
block_out_channels = [4, 4, 4, 8]
layers_per_block = 1
norm_num_groups = 2
scaling_factor = 1.0
[autoencoder.fit]
steps = {first}
batch_size = 4
warmup = 2
[diffusion.unet]
block_out_channels = [8, 16]
layers_per_block = 1
transformer_layers_per_block = [1, 1]
num_attention_heads = [1, 2]
cross_attention_dim = 8
norm_num_groups = 4
[diffusion.text]
vocab_size = 0
hidden_size = 8
intermediate_size = 16
num_hidden_layers = 1
num_attention_heads = 1
max_position_embeddings = 16
[diffusion.scheduler]
prediction_type = "v_prediction"
rescale_betas_zero_snr = true
timestep_spacing = "trailing"
sampler = "ddim"
[diffusion.fit]
steps = {second}
batch_size = 8
warmup = 2
"""


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def make(folder: Path, first: int = 10, second: int = 10) -> Path:
    """A config and a data set of 40 made-up pictures."""
    mnist = folder / "mnist"
    if not mnist.exists():
        mnist.mkdir(parents=True)
        generator = np.random.default_rng(0)
        images = np.zeros((40, 28, 28), np.uint8)
        for image in images:
            top, left = generator.integers(5, 12, size=2)
            image[top : top + 10, left : left + 4] = 255
        write_idx(mnist / "train-images-idx3-ubyte.gz", images)
        write_idx(mnist / "train-labels-idx1-ubyte.gz", (np.arange(40) % 10).astype(np.uint8))
    config = folder / f"config_{first}_{second}.toml"
    config.write_text(CONFIG.format(folder=folder.as_posix(), first=first, second=second))
    return config


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two checkpoints differ, times left out."""
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
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 and 10 steps in one go."""
    folder = tmp_path_factory.mktemp("straight")
    train(make(folder))
    return folder


def test_stopped_and_resumed_is_the_same_to_the_bit(straight: Path, tmp_path: Path) -> None:
    # The rate at a step depends on the number of steps, so the config must be the whole run's; the stop comes from the
    # outside, as a kill would.
    config = make(tmp_path)
    for stage, kept in (("autoencoder", 5), ("diffusion", 5)):
        with pytest.raises(KeyboardInterrupt):
            _train_until(config, stage, kept, resume=stage == "diffusion")
    train(config, resume=True)
    for name in ("autoencoder.pt", "latents.pt", "diffusion.pt"):
        wanted, got = (checkpoint.load(folder / "run" / name) for folder in (straight, tmp_path))
        assert differences(wanted, got) == []
    # The comparison can fail: one more step is another checkpoint.
    train(make(tmp_path, second=11), resume=True)
    assert "/step" in differences(wanted, checkpoint.load(tmp_path / "run" / "diffusion.pt"))


def _train_until(config: Path, stage: str, step: int, resume: bool) -> None:
    """Train; save at `step` of `stage`, and be interrupted two steps later."""
    from fastsd.train import loop

    follow = loop.Stage._follow

    def interrupted(self: loop.Stage) -> None:
        follow(self)
        if self.name == stage and self.step == step - 1:
            self.step += 1
            self.save()
            self.step -= 1
        if self.name == stage and self.step == step + 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Stage, "_follow", interrupted)
        train(config, resume=resume)


def test_the_export_loads_with_its_words_and_defaults(straight: Path) -> None:
    components = load_folder(straight / "model", torch.float32)
    assert components.sample_size == 8 and "eight" in components.known_words
    assert components.defaults["width"] == 64 and components.defaults["sampler"] == "ddim"
    assert components.tokenizers[0]("eight").shape == (1, 16)
    # Averaged weights, to fp16's rounding.
    average = checkpoint.load(straight / "run" / "diffusion.pt")["average"]["unet.conv_out.weight"]
    loaded = components.unet.conv_out.weight  # may be packed for oneDNN
    loaded = loaded.to_dense() if loaded.is_mkldnn else loaded
    torch.testing.assert_close(loaded, average, rtol=2**-11, atol=2**-24)


def test_diffusers_opens_the_export_without_being_told_a_dtype(straight: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(straight / "model"), safety_checker=None)
    assert {theirs.unet.dtype, theirs.vae.dtype, theirs.text_encoder.dtype} == {torch.float32}
    assert theirs.tokenizer.model_max_length == 16 and theirs.scheduler.config.rescale_betas_zero_snr
    components = load_folder(straight / "model", torch.float32)
    ids = components.tokenizers[0](["a thick eight", "zebra"])
    with torch.inference_mode():
        ours = components.text_encoders[0](ids).hidden
        wanted = theirs.text_encoder(ids)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_export_only_writes_the_same_model(straight: Path, tmp_path: Path) -> None:
    train(make(straight), export=tmp_path / "again", export_only=True)
    for file in (straight / "model").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(straight / "model")).read_bytes()


def test_centred_latents_decode_to_the_same_picture() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(VAEConfig(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1)).double()
    image = torch.rand(2, 16, 16, 3, dtype=torch.float64) * 2 - 1
    offset, spread = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    with torch.no_grad():
        before = vae.encode(image)
        picture = vae.decode(before.mean)
        centre(vae, offset, spread)
        after = vae.encode(image)
        torch.testing.assert_close(after.mean, (before.mean - offset) / spread, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after.logvar, before.logvar - 2 * spread.log(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(vae.decode(after.mean), picture, rtol=1e-12, atol=1e-12)


def test_a_killed_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stage.pt"
    checkpoint.save({"step": 1, "w": torch.ones(3)}, path)

    def killed(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save({"step": 3}, path)
    assert checkpoint.load(path)["step"] == 3 and [p.name for p in tmp_path.iterdir()] == ["stage.pt"]


def test_damaged_checkpoints_and_runs_in_the_way_are_refused(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    config = make(folder)
    shutil.copytree(straight / "run", folder / "run")
    with pytest.raises(FastsdError, match="--resume"):
        train(config)
    half = (folder / "run" / "diffusion.pt").read_bytes()[:1000]
    (folder / "run" / "diffusion.pt").write_bytes(half)
    with pytest.raises(FastsdError, match=r"diffusion\.pt: cannot be read"):
        train(config, resume=True)
    (folder / "run" / "diffusion.pt").unlink()
    other = config.read_text().replace("[4, 4, 4, 8]", "[4, 4, 8, 8]")
    config.write_text(other)
    with pytest.raises(FastsdError, match=r"autoencoder\.pt: does not fit"):
        train(config, resume=True)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("passes = 2", "pases = 2", "unknown key data.pases"),
        ("steps = 10", "", "autoencoder.fit.steps is missing"),
        ("batch_size = 4", 'batch_size = "4"', "autoencoder.fit.batch_size is '4'"),
        ("batch_size = 8", "batch_size = 0", "diffusion.fit.batch_size is 0"),
        ("[4, 4, 4, 8]", "4", "autoencoder.model.block_out_channels is 4"),
        ("hidden_size = 8", "hidden_size = 16", "diffusion.text.hidden_size is 16"),
        ('precision = "fp32"', 'precision = "fp8"', "precision is 'fp8'"),
        ("[data]", "[data", "not TOML"),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    config = make(tmp_path)
    config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(FastsdError) as caught:
        read_settings(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_damaged_data(tmp_path: Path) -> None:
    config = make(tmp_path)
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


def test_the_bundled_config_is_valid() -> None:
    settings = read_settings(Path(__file__).parents[2] / "configs" / "digits.toml")
    assert settings.diffusion.scheduler.prediction_type == "v_prediction"
    assert settings.autoencoder.model.downscale == 8


def test_learning_rate_rises_then_falls() -> None:
    fit = Fit(steps=100, rate=1.0, warmup=10, final_rate=0.1)
    assert [learning_rate(fit, step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert learning_rate(fit, 55) == pytest.approx(0.55)
    assert learning_rate(fit, 100) == pytest.approx(0.1)


def test_split() -> None:
    assert split(7, 2) == [4, 3] and split(1, 4) == [1] and split(9, 3) == [3, 3, 3]


def test_enlarged_digits_stay_whole_upright_and_where_they_were() -> None:
    digits = read_digits(Path(__file__).parents[2] / "data" / "mnist", "t10k")
    assert len(digits.images) == len(digits.labels) == 10_000
    images = digits.images[:200]
    large = enlarge(images, 1.15, 0.2)
    edges = torch.cat([large[:, 0], large[:, -1], large[:, :, 0], large[:, :, -1]], dim=1)
    assert float(edges.max()) == 0.0
    # The centre of mass moves with the picture; the contrast shifts it by less than a pixel.
    for axis in (1, 2):
        before = centre_of_mass(torch.from_numpy(images.copy()).float(), axis) * 64 / 28
        assert float((centre_of_mass(enlarge(images), axis) - before).abs().max()) < 1.0
    # Slant is what a shear adds to: exactly so for the second moments of the same ink.
    flat, sheared = (measure(enlarge(images, 0.8, shear).numpy()).slant for shear in (0.0, 0.2))
    np.testing.assert_allclose(sheared - flat, 0.2, atol=0.03)


def centre_of_mass(pictures: torch.Tensor, axis: int) -> torch.Tensor:
    profile = pictures.sum(3 - axis)
    places = torch.arange(profile.shape[1]) + 0.5
    return profile @ places / profile.sum(1)
