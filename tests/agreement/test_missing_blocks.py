"""UNets without some of SDXL's blocks, as SSD-1B's and Vega's, agree with diffusers on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.config import UNetConfig
from fastsd.model.unet import UNet
from fastsd.weights.layouts.unet_config import read_unet, write_unet
from fastsd.weights.load import find_files, load_module
from tests.support.families import make_unet
from tests.support.matching import nchw, nhwc, relative_error

DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D")
CASES: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "down_block_types": DOWN,
        "up_block_types": UP,
        "transformer_layers_per_block": [1, [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 1, 3], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Vega": {
        "down_block_types": DOWN,
        "up_block_types": UP,
        "transformer_layers_per_block": [1, 2],
        "mid_block_type": "UNetMidBlock2D",
    },
    "no lowest level": {
        "down_block_types": DOWN,
        "up_block_types": UP,
        "transformer_layers_per_block": [1, 2],
        "mid_block_type": None,
    },
    "lists in a level with a middle": {
        "down_block_types": DOWN,
        "up_block_types": UP,
        "transformer_layers_per_block": [1, [3, 1]],
        "reverse_transformer_layers_per_block": [2, 1],
    },
    "attention on one path alone": {
        "down_block_types": DOWN,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": [1, 2],
    },
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_unet(case: str, tmp_path: Path) -> None:
    """1e-5 relative in fp32, as for the usual ones; and the config that fastsd writes means the same."""
    import diffusers

    torch.manual_seed(list(CASES).index(case))
    theirs = make_unet(**CASES[case], layers_per_block=2, use_linear_projection=True)
    theirs.save_pretrained(tmp_path)
    config, _ = read_unet(tmp_path / "config.json")
    ours = load_module(
        lambda: UNet(config), find_files(tmp_path, "diffusion_pytorch_model", False), torch.float32, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(1)
    for size in ((8, 8), (7, 13)):
        x, context = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 9, 32, generator=generator)
        timestep = torch.tensor([3.0, 801.0])
        expected = theirs(x, timestep, context).sample
        assert relative_error(nchw(ours(nhwc(x), timestep, context)), expected) < 1e-5
    again = diffusers.UNet2DConditionModel.from_config(write_unet(config, 8))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_a_depth_that_diffusers_cannot_say_is_refused() -> None:
    from fastsd.errors import FastsdError

    with pytest.raises(FastsdError, match="a folder cannot store that the UNet's lowest level has depth 3 below .* 2"):
        write_unet(UNetConfig(transformer_layers_per_block=(1, 1, 1, 2), mid_transformer_layers=3), 8)
