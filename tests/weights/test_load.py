"""Weight files: variants, shards, keys that do not match, one read per tensor, and the memory that loading takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.config import SD15_UNET
from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.weights import load_folder
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.unet_config import write_unet
from tests.support.folders import TEXT_FILE, UNET_FILE, VAE_FILE, Tensors, rewrite, same_weights, shard
from tests.support.sparse import write_zeros
from tests.support.tiny import all_weights, sd1


def test_conversion_to_another_dtype_rounds_as_torch_does(saved: Path) -> None:
    expected = {key: value.to(torch.bfloat16) for key, value in all_weights(sd1()).items()}
    found = all_weights(load_folder(saved, torch.bfloat16))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_each_tensor_is_read_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[Path, int]] = Counter()
    read = TensorEntry.read

    def counted(entry: TensorEntry, *buffer: torch.Tensor | None) -> torch.Tensor:
        reads[entry.path, entry.start] += 1
        return read(entry, *buffer)

    monkeypatch.setattr(TensorEntry, "read", counted)
    load_folder(saved, torch.float32)
    stored = sum(len(load_file(saved / file)) for file in (UNET_FILE, VAE_FILE, TEXT_FILE))
    assert len(reads) == stored and set(reads.values()) == {1}


def test_half_precision_uses_the_fp16_variant(folder: Path) -> None:
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file({k: (v + 1).half() for k, v in load_file(folder / UNET_FILE).items()}, half)
    plain, key = sd1().unet.conv_in.weight, "unet.conv_in.weight"
    assert torch.equal(all_weights(load_folder(folder, torch.float32))[key], plain)
    assert torch.equal(all_weights(load_folder(folder, torch.float16))[key], (plain + 1).half())
    (folder / UNET_FILE).unlink()  # only the variant is left
    assert torch.equal(all_weights(load_folder(folder, torch.float32))[key], (plain + 1).half().float())


@pytest.mark.parametrize(
    "index", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json", "{}.fp16.safetensors.index.json"]
)
def test_shards(folder: Path, index: str) -> None:
    shard(folder / UNET_FILE, 3, folder / "unet" / index.format("diffusion_pytorch_model"))
    shard(folder / TEXT_FILE, 2, folder / "text_encoder" / index.format("model"))
    assert same_weights(load_folder(folder, torch.float32), sd1())


def test_a_key_in_two_shards(folder: Path) -> None:
    shard(folder / UNET_FILE, 2, folder / "unet/diffusion_pytorch_model.safetensors.index.json")
    first = next(iter(load_file(folder / "unet/part-0.safetensors").items()))
    rewrite(folder / "unet/part-1.safetensors", lambda stored: stored | dict([first]))
    with pytest.raises(FastsdError, match="appears twice"):
        load_folder(folder, torch.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "sub/part.safetensors"])
def test_a_shard_outside_the_folder(folder: Path, name: str) -> None:
    (folder / UNET_FILE).unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(FastsdError, match="is not the name of a file in the same folder"):
        load_folder(folder, torch.float32)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_a_malformed_index_of_shards(folder: Path, text: str) -> None:
    (folder / UNET_FILE).unlink()
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(FastsdError, match=r"index\.json: (weight_map is missing|not a JSON object|not JSON)"):
        load_folder(folder, torch.float32)


def test_a_missing_shard(folder: Path) -> None:
    shard(folder / UNET_FILE, 2, folder / "unet/diffusion_pytorch_model.safetensors.index.json")
    (folder / "unet/part-1.safetensors").unlink()
    with pytest.raises(FastsdError, match=r"part-1.safetensors: missing, though .*index.json names it"):
        load_folder(folder, torch.float32)


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda stored: {k: v for k, v in stored.items() if k != key}


BAD_WEIGHTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without("conv_in.weight"), r"the key conv_in.weight \[32, 4, 3, 3\] is missing"),
    "missing part of a fused matrix": (
        without("mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"),
        r"attn1.to_k.weight \[64, 64\] is missing",
    ),
    "extra": (lambda s: s | {"conv_in.lora": torch.ones(3)}, r"conv_in.lora \[3\] matches no parameter"),
    "shape": (
        lambda s: s | {"conv_in.weight": torch.ones(32, 9, 3, 3)},
        r"conv_in.weight is \[32, 9, 3, 3\]; the config expects \[32, 4, 3, 3\]",
    ),
    "transposed": (
        lambda s: s | {"time_embedding.linear_1.weight": torch.ones(32, 128)},
        r"linear_1.weight is \[32, 128\]; the config expects \[128, 32\]",
    ),
    "integers": (
        lambda s: s | {"conv_in.bias": torch.ones(32, dtype=torch.int64)},
        "conv_in.bias is torch.int64; it should be a floating-point tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_the_message_names_file_key_and_shapes(folder: Path, case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    rewrite(folder / UNET_FILE, change)
    with pytest.raises(FastsdError, match=message) as error:
        load_folder(folder, torch.float32)
    assert "diffusion_pytorch_model.safetensors" in str(error.value) and "\n" not in str(error.value)


# VmHWM is the process's peak resident size.
LOAD = """
import sys, torch
from functools import partial
from pathlib import Path
from fastsd.model.unet import UNet
from fastsd.weights.layouts.unet_config import read_unet
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


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize(("dtype", "itemsize"), [("BF16", 2), ("F32", 4)])
def test_peak_memory_is_the_weights(dtype: str, itemsize: int, tmp_path: Path) -> None:
    """At most 1.1 times the weights in the dtype they are loaded in; measured in a process of its own."""
    with torch.device("meta"):
        unet = UNet(SD15_UNET)
    write_zeros(unet, tmp_path / "diffusion_pytorch_model.safetensors", dtype, itemsize)
    (tmp_path / "config.json").write_text(json.dumps(write_unet(SD15_UNET, 64)))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, capture_output=True, text=True)
    peak, weights = map(int, done.stdout.split())
    assert weights == 2 * 859_520_964  # SD 1.5's UNet
    assert peak <= 1.1 * weights, f"{peak / weights:.3f} times the weights"
