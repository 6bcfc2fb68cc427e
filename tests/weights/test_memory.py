"""Loading takes the weights and little more: SD1.5's UNet in a process of its own, as the system counts its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.config import SD15_UNET
from fastsd.model.unet import UNet
from fastsd.weights.configs import write_unet
from fastsd.weights.names import sources, stored_form

# VmHWM is the highest resident size so far.
LOAD = """
import gc, sys, torch
from functools import partial
from pathlib import Path
from fastsd.model.unet import UNet
from fastsd.weights.configs import read_unet
from fastsd.weights.load import find_files, load_module
def read(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
folder = Path(sys.argv[1])
config, _ = read_unet(folder / "config.json")
before = read("VmRSS")
unet = load_module(
    partial(UNet, config), find_files(folder, "diffusion_pytorch_model", False), torch.bfloat16, torch.device("cpu")
)
print(read("VmHWM") - before, sum(p.numel() * 2 for p in unet.parameters()))
"""


def write_zeros(file: Path, dtype: str, itemsize: int) -> None:
    """A checkpoint of nothing but zeros, which the file system does not even store."""
    with torch.device("meta"):
        unet = UNet(SD15_UNET)
    header, end = {}, 0
    for _, _, parts in sources(unet):
        for part in parts:
            shape = stored_form(part.key, torch.empty(part.shape, device="meta"), False).shape
            header[part.key] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [end, end + shape.numel() * itemsize],
            }
            end += shape.numel() * itemsize
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(("dtype", "itemsize"), [("BF16", 2), ("F32", 4)])
def test_peak_memory_is_the_weights(dtype: str, itemsize: int, tmp_path: Path) -> None:
    """At most 1.1 times the weights in the dtype they are loaded in."""
    write_zeros(tmp_path / "diffusion_pytorch_model.safetensors", dtype, itemsize)
    (tmp_path / "config.json").write_text(json.dumps(write_unet(SD15_UNET, 64)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True, text=True)
    peak, held = map(int, done.stdout.split())
    assert held == 2 * 859_520_964  # SD1.5's UNet
    assert peak <= 1.1 * held, f"{peak / held:.3f} times the weights"
