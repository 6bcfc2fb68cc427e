"""Loading takes the weights and little more: measured in a process of its own, as the system counts it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsd.weights import save_folder
from tests.weights.tiny import UNET, sd1

WIDE = replace(UNET, block_out_channels=(512, 512), layers_per_block=3, transformer_layers_per_block=(1, 1))

# VmHWM is the highest resident size so far. A small network is loaded first, so that libraries are paid for.
LOAD = """
import gc, sys, torch
from functools import partial
from pathlib import Path
from fastsd.model.unet import UNet
from fastsd.weights.configs import read_unet
from fastsd.weights.load import find_files, load_module
def read(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def load(folder):
    config, _ = read_unet(folder / "config.json")
    files = find_files(folder, "diffusion_pytorch_model", False)
    return load_module(partial(UNet, config), files, dtype, torch.device("cpu"))
dtype = getattr(torch, sys.argv[3])
load(Path(sys.argv[1]) / "unet")
gc.collect()
before = read("VmRSS")
unet = load(Path(sys.argv[2]) / "unet")
print(read("VmHWM") - before, sum(p.numel() * dtype.itemsize for p in unet.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(
    ("stored", "loaded"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_peak_memory_is_the_weights(stored: str, loaded: str, tmp_path: Path) -> None:
    """At most 1.1 times the weights in the dtype they are loaded in. The largest tensor is 3 % of them, as in SD1.5."""
    save_folder(sd1(), tmp_path / "small", torch.float32)
    save_folder(sd1(WIDE), tmp_path / "wide", getattr(torch, stored))
    words = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "wide"), loaded]
    peak, held = map(int, subprocess.run(words, check=True, capture_output=True, text=True).stdout.split())
    assert held > 200 * 2**20
    assert peak <= 1.1 * held
