"""Configs: errors name the key; the committed config agrees with what other modules assume."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.train import record
from fastsd.train.settings import DigitsData
from fastsd.train.stages.unet import UNetSettings
from fastsd.train.stages.vae import VaeSettings
from fastsd.train.tables import write_toml
from fastsd.train.training import read_config
from tests.support.training import write_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("passes = 2", "pases = 2", "unknown key data.pases; did you mean data.passes?"),
        ("[vae.fit]", "[vea.fit]", "unknown key vea; did you mean vae?"),
        ("steps = 10", "", "vae.fit.steps is missing"),
        ("batch_size = 4", 'batch_size = "4"', "vae.fit.batch_size is '4'"),
        ("batch_size = 8", "batch_size = 0", "unet.fit.batch_size is 0"),
        ("[4, 4, 4, 8]", "4", "vae.model.block_out_channels is 4"),
        ("hidden_size = 8", "hidden_size = 16", "unet.text.hidden_size is 16"),
        ('precision = "fp32"', 'precision = "fp8"', "precision is 'fp8'"),
        ("[data]", "[data", "not TOML"),
        ("[4, 4, 4, 8]", "[]", "vae.model.block_out_channels is []"),
        ("[4, 4, 4, 8]", "[4, 4, 4, 9]", "vae.model.norm_num_groups is 2, which does not divide the width 9"),
        ("[vae.fit]", "[vae.fit]\nbetas = [0.9, 1.0]", "vae.fit.betas has 1.0"),
    ],
)
def test_an_invalid_config_is_one_line_that_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(FastsdError) as caught:
        read_config(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ("seed=-1", "seed is -1; it should be at least 0 and at most 9223372036854775807"),
        ("threads=-1", "threads is -1; it should be at least 0"),
        ("data.limit=-3", "data.limit is -3; it should be at least 0"),
        ("data.memory_gb=nan", "data.memory_gb is nan; it should be a finite number"),
        ("unet.fit.rate=-1.0", "unet.fit.rate is -1.0; it should be at least 0"),
        ("unet.fit.sample_every=-1", "unet.fit.sample_every is -1; it should be at least 0"),
        ("unet.empty=2", "unet.empty is 2.0; it should be at least 0 and at most 1"),
        ("vae.kl_weight=inf", "vae.kl_weight is inf; it should be a finite number"),
        ("unet.scheduler.beta_start=nan", "unet.scheduler.beta_start is nan"),
        ("unet.scheduler.num_train_timesteps=0", "unet.scheduler.num_train_timesteps is 0"),
        ("unet.scheduler.prediction_type=foo", "unet.scheduler.prediction_type is 'foo'; it should be one of epsilon"),
        ("unet.scheduler.sampler=foo", "unet.scheduler.sampler: 'foo' is unknown"),
        ("defaults.sampler=foo", "defaults.sampler: 'foo' is unknown"),
        ("defaults.schedule=foo", "defaults.schedule: 'foo' is unknown"),
        ("defaults.num_inference_steps=0", "defaults.num_inference_steps is 0"),
        ("unet.text.num_attention_heads=3", "unet.text.num_attention_heads is 3, which does not divide the width 8"),
        ("unet.model.num_attention_heads=[3, 3]", "unet.model.num_attention_heads is 3, which does not divide"),
        ("unet.model.num_attention_heads=[1, 1, 1]", "unet.model.num_attention_heads has 3 values"),
    ],
)
def test_values_beyond_their_limits_are_named(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(FastsdError) as caught:
        read_config(write_config(tmp_path), [change])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text(), encoding="utf-8-sig")
    assert read_config(config).stages


def test_the_config_of_the_bundled_model() -> None:
    settings = read_config(ROOT / "configs" / "digits.toml")
    vae, unet = settings.stages["vae"], settings.stages["unet"]
    assert isinstance(vae, VaeSettings) and isinstance(unet, UNetSettings) and list(settings.stages) == ["vae", "unet"]
    assert unet.scheduler.prediction_type == "v_prediction"
    assert vae.model.downscale == 8
    # The evaluation augments real digits by the defaults of `DigitsData`, as the model's training images were.
    assert settings.data.path == "data/mnist" and settings.data.digits == DigitsData()


def test_set_replaces_values_of_the_file(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    changes = ["unet.fit.steps=7", "unet.fit.betas=[0.5, 0.9]", "precision=bf16", 'data.path = "a=b"']
    settings = read_config(config, changes)
    assert settings.stages["unet"].fit.steps == 7 and settings.stages["unet"].fit.betas == (0.5, 0.9)
    assert settings.precision == "bf16" and settings.data.path == "a=b"
    assert settings.stages["vae"] == read_config(config).stages["vae"]
    for change, message in (
        ("unet.fit.stpes=7", "unknown key unet.fit.stpes; did you mean unet.fit.steps?"),
        ("steps", "--set is 'steps'; it should be key=value"),
        ("out.value=1", "out is a value, not a table"),
    ):
        with pytest.raises(FastsdError) as caught:
            read_config(config, [change])
        assert message in str(caught.value)


def test_the_resolved_config_reads_as_the_same_settings(tmp_path: Path) -> None:
    settings = read_config(write_config(tmp_path), ["unet.scheduler.trained_betas=[0.5, 0.25]", "data.path='a\\b \"ü'"])
    path = tmp_path / "resolved.toml"
    path.write_text(write_toml(record.resolved(settings)), encoding="utf-8")
    assert read_config(path) == settings
