"""Loading takes the weights and little more, converting one of them: in a process of its own, as the system counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastsd.config import SD15_UNET
from fastsd.model.unet import UNet
from fastsd.weights.layouts.configs import write_unet
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.save import weights_file, write_configs
from tests.support import original

ALLOWANCE = 22 * 2**20  # for headers and lists of keys

# VmHWM is the highest resident size so far.
LOAD = """
import gc, sys, torch
from functools import partial
from pathlib import Path
from fastsd.model.unet import UNet
from fastsd.weights.layouts.configs import read_unet
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


CONVERT = """
import sys, torch
from fastsd.runtime.devices import DTYPES
from fastsd.weights.convert import convert
def read(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
convert(sys.argv[4], sys.argv[2] + ".safetensors", torch.bfloat16)  # whatever is loaded once, is
before = read("VmRSS")
convert(sys.argv[1], sys.argv[2], DTYPES.get(sys.argv[3]))
print(read("VmHWM") - before)
"""


def write_zeros(module: nn.Module, file: Path, dtype: str, itemsize: int) -> None:
    """A network of nothing but zeros, which the file system does not even store."""
    header, end = {}, 0
    for _, _, parts in sources(module):
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
    with torch.device("meta"):
        unet = UNet(SD15_UNET)
    write_zeros(unet, tmp_path / "diffusion_pytorch_model.safetensors", dtype, itemsize)
    (tmp_path / "config.json").write_text(json.dumps(write_unet(SD15_UNET, 64)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True, text=True)
    peak, held = map(int, done.stdout.split())
    assert held == 2 * 859_520_964  # SD1.5's UNet
    assert peak <= 1.1 * held, f"{peak / held:.3f} times the weights"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["as it is", "bf16"])
def test_converting_takes_the_memory_of_one_tensor(dtype: str, originals: Any, tmp_path: Path) -> None:
    """To a file and back: the largest tensor as it is read and, in another precision, as it is written."""
    components = original.components("sd1")
    config = replace(components.unet.config, block_out_channels=(320, 480, 480))
    with torch.device("meta"):
        components = replace(components, unet=UNet(config))
    folder, file, back = tmp_path / "folder", tmp_path / "file.safetensors", tmp_path / "back"
    write_configs(components, folder)
    for name, module in components.networks():
        write_zeros(module, folder / weights_file(name), "F32", 4)
    sizes = [part.shape for _, _, parts in sources(components.unet) for part in parts]
    largest, total = (4 * fold(torch.Size(shape).numel() for shape in sizes) for fold in (max, sum))
    limit = ALLOWANCE + (largest if dtype == "as it is" else largest * 3 // 2)
    assert total > 10 * limit and largest > ALLOWANCE // 2, "the model is too small for this to say anything"
    for source, target in ((folder, file), (file, back)):
        words = [sys.executable, "-c", CONVERT, str(source), str(target), dtype, str(originals.folder("sd1"))]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back to the system
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
        assert int(done.stdout) <= limit, f"{int(done.stdout) / largest:.2f} times the largest tensor"
