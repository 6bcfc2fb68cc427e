"""Values outside a config's limits are refused, with the limit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.scheduler import read_scheduler, write_scheduler
from tests.support.tiny import CLIP, UNET, VAE

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "unet": (unet_config.read_unet, unet_config.write_unet(UNET, 8)),
    "vae": (configs.read_vae, configs.write_vae(VAE, 8)),
    "text_encoder": (configs.read_clip, configs.write_clip(CLIP)),
    "scheduler": (read_scheduler, write_scheduler(SchedulerConfig(sampler="euler"))),
}


@pytest.mark.parametrize(
    ("name", "key", "value", "limit"),
    [
        ("unet", "layers_per_block", 2**30, "it should be a number from 1 to 8"),
        ("unet", "transformer_layers_per_block", 10**6, "from 1 to 24, or a list of 2"),
        ("unet", "norm_num_groups", 0, "from 1 to"),
        ("vae", "scaling_factor", 0, "from 1e-06 to"),
        ("vae", "scaling_factor", math.nan, "scaling_factor is nan"),
        ("text_encoder", "num_hidden_layers", 10**9, "from 1 to 256"),
        ("scheduler", "beta_end", 12, "beta_end is 12"),
        ("scheduler", "_class_name", ["PNDMScheduler"], "near are PNDMScheduler"),
    ],
)
def test_the_message_names_the_limit(name: str, key: str, value: Any, limit: str, tmp_path: Path) -> None:
    read, valid = CONFIGS[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(valid | {key: value}))
    with pytest.raises(FastsdError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: {key} is ") and limit in str(caught.value)
