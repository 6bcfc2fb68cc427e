"""Configs that nobody vouches for: every key with every kind of nonsense is read, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.sampling.samplers import build
from fastsd.weights.layouts import configs
from tests.support.tiny import CLIP, UNET, VAE

NONSENSE: list[Any] = [
    *(None, True, 0, -1, 1, 3, 7, 2**15, 2**20, 2**30, 2**70),  # counts that take forever, memory, or no int64
    *(0.0, -0.5, 1e300, math.nan, math.inf),  # JSON as Python reads it has these two
    *("", "x", "\ud800", "x" * 10_000),
    *([], [0], [1], ["x"], [[1]], [{}], [True, True], [2**15, 2**15], [2**19, 2**19], {}, {"a": 1}),
]


def built(kind: Callable[[Any], Any]) -> Callable[[Any], None]:
    def build_on_meta(config: Any) -> None:
        with torch.device("meta"):
            kind(config[0] if isinstance(config, tuple) else config)

    return build_on_meta


def finite_table(config: SchedulerConfig) -> None:
    table = build(config.sampler, 4, config, schedule=config.schedule)
    assert bool(torch.as_tensor(table.rows).isfinite().all())


# How a file is read, one that is right, and what a config that was accepted must be good for.
FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], Callable[[Any], None]]] = {
    "unet": (configs.read_unet, configs.write_unet(UNET, 8), built(UNet)),
    "vae": (configs.read_vae, configs.write_vae(VAE, 8), built(AutoencoderKL)),
    "text_encoder": (configs.read_clip, configs.write_clip(CLIP), built(TextEncoder)),
    "scheduler": (configs.read_scheduler, configs.write_scheduler(SchedulerConfig(sampler="euler")), finite_table),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (_, right, _) in FILES.items() for key in right])
def test_nonsense_is_refused_in_one_line_or_works(name: str, key: str, tmp_path: Path) -> None:
    read, right, use = FILES[name]
    file = tmp_path / "config.json"
    for value in NONSENSE:
        file.write_text(json.dumps(right | {key: value}))
        try:
            config = read(file)
        except FastsdError as error:
            message = str(error)
            assert message.startswith(f"{file}: ") and "\n" not in message and len(message) < 600, value
            continue
        try:
            use(config)
        except FastsdError as error:  # a schedule of one step has no four
            assert name == "scheduler" and "\n" not in str(error), value


@pytest.mark.parametrize("name", FILES)
def test_what_is_right_is_read(name: str, tmp_path: Path) -> None:
    read, right, use = FILES[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(right))
    use(read(file))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("unet", "layers_per_block", 2**30, "it should be a number from 1 to 8"),
        ("unet", "transformer_layers_per_block", 10**6, "from 1 to 24, or a list of 2"),
        ("unet", "norm_num_groups", 0, "from 1 to"),
        ("vae", "scaling_factor", 0, "from 1e-06 to"),
        ("vae", "scaling_factor", math.nan, "scaling_factor is nan"),
        ("text_encoder", "num_hidden_layers", 10**9, "from 1 to 256"),
        ("scheduler", "beta_end", 12, "beta_end is 12"),
        ("scheduler", "_class_name", ["PNDMScheduler"], "fastsd supports"),
    ],
)
def test_limits_are_named(name: str, key: str, value: Any, said: str, tmp_path: Path) -> None:
    read, right, _ = FILES[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(right | {key: value}))
    with pytest.raises(FastsdError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: {key} is ") and said in str(caught.value)
