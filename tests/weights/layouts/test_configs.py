"""Untrusted configs: every key with every invalid kind of value is either usable or refused in one line."""

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
from fastsd.sampling.build import build
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.scheduler import read_scheduler, write_scheduler
from tests.support.tiny import CLIP, UNET, VAE

NONSENSE: list[Any] = [
    *(None, True, 0, -1, 1, 3, 7, 2**15, 2**20, 2**30, 2**70),  # counts that would take time or memory, or exceed int64
    *(0.0, -0.5, 1e300, math.nan, math.inf),  # Python's JSON reader accepts the last two
    *("", "x", "\ud800", "x" * 10_000),
    *([], [0], [1], ["x"], [[1]], [{}], [True, True], [2**15, 2**15], [2**19, 2**19], {}, {"a": 1}),
]


def builds(network: Callable[[Any], Any]) -> Callable[[Any], None]:
    def build_on_meta(config: Any) -> None:
        with torch.device("meta"):
            network(config[0] if isinstance(config, tuple) else config)

    return build_on_meta


def finite_table(config: SchedulerConfig) -> None:
    table = build(config.sampler, 4, config, schedule=config.schedule)
    assert bool(torch.as_tensor(table.rows).isfinite().all())


# The reader of a file, a valid file, and what an accepted config must allow.
FILES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], Callable[[Any], None]]] = {
    "unet": (unet_config.read_unet, unet_config.write_unet(UNET, 8), builds(UNet)),
    "vae": (configs.read_vae, configs.write_vae(VAE, 8), builds(AutoencoderKL)),
    "text_encoder": (configs.read_clip, configs.write_clip(CLIP), builds(TextEncoder)),
    "scheduler": (read_scheduler, write_scheduler(SchedulerConfig(sampler="euler")), finite_table),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, (_, valid, _) in FILES.items() for key in valid])
def test_nonsense_is_refused_in_one_line_or_works(name: str, key: str, tmp_path: Path) -> None:
    read, valid, use = FILES[name]
    file = tmp_path / "config.json"
    for value in NONSENSE:
        file.write_text(json.dumps(valid | {key: value}))
        try:
            config = read(file)
        except FastsdError as error:
            message = str(error)
            assert message.startswith(f"{file}: ") and "\n" not in message and len(message) < 600, value
            continue
        try:
            use(config)
        except FastsdError as error:  # a schedule of one timestep cannot give four
            assert name == "scheduler" and "\n" not in str(error), value


@pytest.mark.parametrize("name", FILES)
def test_a_valid_config_is_read(name: str, tmp_path: Path) -> None:
    read, valid, use = FILES[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(valid))
    use(read(file))
