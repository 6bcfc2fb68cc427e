"""Configs: errors name the key; the committed config agrees with what other modules assume."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsd.errors import FastsdError
from fastsd.train.settings import Data, read_settings
from tests.support.training import write_config

ROOT = Path(__file__).parents[2]


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
def test_an_invalid_config_is_one_line_that_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(FastsdError) as caught:
        read_settings(config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_of_the_bundled_model() -> None:
    settings = read_settings(ROOT / "configs" / "digits.toml")
    assert settings.diffusion.scheduler.prediction_type == "v_prediction"
    assert settings.autoencoder.model.downscale == 8
    # The evaluation augments real digits by the defaults of `Data`, as the model's training images were.
    assert settings.data == Data(mnist="data/mnist")
