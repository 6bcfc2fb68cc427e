"""Files of upscalers: every layout and wrapping gives the same network; anything else is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.errors import FastsdError
from fastsd.model.upscalers import CompactConfig, UpscalerConfig
from fastsd.runtime import memory
from fastsd.weights.convert import convert
from fastsd.weights.inspect import inspect
from fastsd.weights.layouts.upscaler_file import load_upscaler
from fastsd.weights.layouts.upscaler_names import OTHERS, describe_upscaler
from tests.support.upscalers import TINY_COMPACT, TINY_RRDB, State, in_layout, random_state, write_upscaler

FP32 = torch.float32
NETWORKS: dict[str, UpscalerConfig] = {
    "x4": TINY_RRDB,
    "x1": replace(TINY_RRDB, doublings=0, blocks=2),
    "x2, unshuffled": replace(TINY_RRDB, unshuffle=2),
    "ESRGAN+": replace(TINY_RRDB, plus=True),
    "grey": replace(TINY_RRDB, channels=1),
}


def is_the_same(network: Any, config: UpscalerConfig, state: State) -> bool:
    found = network.state_dict()
    return network.config == config and set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize("layout", ["new", "middle", "old"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    config = NETWORKS[name]
    state = random_state(config)
    save_file(in_layout(state, layout), tmp_path / "x.safetensors")
    assert is_the_same(load_upscaler(tmp_path / "x.safetensors", FP32), config, state)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_compact_one(scale: int, tmp_path: Path) -> None:
    config = CompactConfig(features=8, convolutions=3, scale=scale)
    path = write_upscaler(tmp_path / "x.safetensors", config)
    assert is_the_same(load_upscaler(path, FP32), config, random_state(config))


WRAPPED: dict[str, Any] = {
    "plain": lambda own, other: own,
    "params": lambda own, other: {"params": own},
    "averaged weights first": lambda own, other: {"params": other, "params_ema": own},
    "beside a count": lambda own, other: {"params_ema": own, "iter": 5},
    "a state dict": lambda own, other: {"state_dict": own, "epoch": 3},
    "from parallel training": lambda own, other: {f"module.{key}": tensor for key, tensor in own.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wraps_the_table(name: str, tmp_path: Path) -> None:
    own, other = random_state(TINY_RRDB), random_state(TINY_RRDB, seed=1)
    torch.save(WRAPPED[name](own, other), tmp_path / "x.pth")
    assert is_the_same(load_upscaler(tmp_path / "x.pth", FP32, allow_pickle=True), TINY_RRDB, own)
    with pytest.raises(FastsdError, match="allow it with allow_pickle"):
        load_upscaler(tmp_path / "x.pth", FP32)


def test_a_safetensors_file_of_both_tables(tmp_path: Path) -> None:
    own, other = random_state(TINY_COMPACT), random_state(TINY_COMPACT, seed=1)
    both = {f"params_ema.{key}": tensor for key, tensor in own.items()}
    save_file(both | {f"params.{key}": tensor for key, tensor in other.items()}, tmp_path / "x.safetensors")
    assert is_the_same(load_upscaler(tmp_path / "x.safetensors", FP32), TINY_COMPACT, own)


def test_half_weights_become_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    state = {key: tensor.half() for key, tensor in random_state(TINY_COMPACT).items()}
    save_file(state, tmp_path / "x.safetensors")
    network = load_upscaler(tmp_path / "x.safetensors", FP32)
    assert all(tensor.dtype == FP32 for tensor in network.state_dict().values())


def without(key: str) -> Any:
    return lambda state: state.pop(key)


def with_zeros(key: str, *shape: int) -> Any:
    return lambda state: state.update({key: torch.zeros(shape)})


BAD = {  # a change of an RRDB network's table, and the message
    "a layer is missing": (without("conv_hr.bias"), r"the key conv_hr.bias \[16\] is missing"),
    "its first layer is missing": (without("conv_first.weight"), "the key conv_first.weight is missing"),
    "another layer": (with_zeros("attention.weight", 2), r"the key attention.weight \[2\] matches no parameter"),
    "another shape": (with_zeros("conv_body.weight", 8, 16, 3, 3), "the key conv_body.weight is "),
    "an empty layer": (with_zeros("conv_hr.weight", 0, 16, 3, 3), "no upscaler has such a layer"),
    "four channels": (with_zeros("conv_last.weight", 4, 16, 3, 3), "images have 4 channels"),
    "channels that do not fit": (with_zeros("conv_first.weight", 16, 7, 3, 3), "it reads 7 channels and gives 3"),
    "far too many blocks": (with_zeros("body.999.rdb1.conv1.weight", 8, 16, 3, 3), "in 1000 blocks"),
    "infinite": (with_zeros("conv_hr.bias", 16), None),
}


@pytest.mark.parametrize("name", BAD)
def test_defects_of_an_esrgan(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    state = random_state(TINY_RRDB)
    change(state)
    if message is None:
        state["conv_hr.bias"][3], message = float("inf"), "holds infinite values"
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=message) as caught:
        load_upscaler(tmp_path / "x.safetensors", FP32)
    assert caught.value.path == tmp_path / "x.safetensors" and "\n" not in str(caught.value)


BAD_COMPACT = {
    "another activation": (with_zeros("body.1.weight", 16, 16, 3, 3), "its second layer is no PReLU"),
    "a last layer that does not fit": (with_zeros("body.6.weight", 13, 16, 3, 3), "gives 13 channels for 3"),
    "a layer is missing": (without("body.3.weight"), r"the key body.3.weight \[16\] is missing"),
}


@pytest.mark.parametrize("name", BAD_COMPACT)
def test_defects_of_a_compact_one(name: str, tmp_path: Path) -> None:
    change, message = BAD_COMPACT[name]
    state = random_state(TINY_COMPACT)
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=message):
        load_upscaler(tmp_path / "x.safetensors", FP32)


OTHER_FILES = {
    "a checkpoint": ("model.diffusion_model.input_blocks.0.0.weight", "a checkpoint of Stable Diffusion; use it with"),
    "a ControlNet": ("control_model.input_blocks.0.0.weight", "not an upscaler but a ControlNet"),
    "TAESD": ("decoder.layers.0.weight", "not an upscaler but TAESD"),
    "SwinIR": (
        "layers.0.residual_group.blocks.0.attn.relative_position_index",
        "of another kind, SwinIR; fastsd reads",
    ),
    "DAT": ("before_RG.1.weight", "of another kind, DAT"),
    "HAT": ("layers.0.residual_group.blocks.0.conv_block.cab.0.weight", "of another kind, HAT"),
    "nothing known": ("weights", "not an upscaler that fastsd knows: its keys are like 'weights'"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    key, message = OTHER_FILES[name]
    save_file({key: torch.zeros(3, 3, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=message):
        load_upscaler(tmp_path / "x.safetensors", FP32)


def test_no_table_and_half_a_file(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    whole = write_upscaler(tmp_path / "x.safetensors")
    (tmp_path / "half.safetensors").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save({}, tmp_path / "nothing.pth")
    for file, message in {
        "nothing.pth": "it holds no tensors",
        "list.pth": "it holds a list",
        "half": "download it again",
        "empty": "empty",
    }.items():
        with pytest.raises(FastsdError, match=message):
            load_upscaler(tmp_path / (file if "." in file else f"{file}.safetensors"), FP32, allow_pickle=True)
    with pytest.raises(FastsdError, match="no such"):
        load_upscaler(tmp_path / "none.safetensors", FP32)


def test_memory_is_asked_for_before_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_upscaler(tmp_path / "x.safetensors")
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(FastsdError, match="GiB are free on cpu"):
        load_upscaler(path, FP32)


def test_inspect_names_them(tmp_path: Path) -> None:
    torch.save({"params_ema": random_state(TINY_RRDB)}, tmp_path / "x.pth")
    facts = dict(inspect(tmp_path / "x.pth", allow_pickle=True))
    assert facts["kind"] == "an upscaler (ESRGAN); use it with fastsd upscale, or --hires-upscaler"
    assert f"{len(random_state(TINY_RRDB))} tensors" in facts["size"]
    save_file({"before_RG.1.weight": torch.zeros(2)}, tmp_path / "dat.safetensors")
    assert "(DAT), which fastsd does not read" in dict(inspect(tmp_path / "dat.safetensors"))["kind"]


def test_each_kind_has_a_name_of_its_own() -> None:
    names = [name for name, _ in OTHERS]
    assert len(set(names)) == len(names)
    assert describe_upscaler(["text_model.encoder.layers.0.self_attn.q_proj.weight"]) is None


@pytest.mark.parametrize("layout", ["new", "old"])
def test_it_is_converted(layout: str, tmp_path: Path) -> None:
    """To safetensors, by the names of Real-ESRGAN's files, in the precision that is asked for; every bit is kept."""
    state = random_state(TINY_RRDB)
    torch.save({"params_ema": in_layout(state, layout), "iter": 3}, tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "x.safetensors", allow_pickle=True) == []
    assert is_the_same(load_upscaler(tmp_path / "x.safetensors", FP32), TINY_RRDB, state)
    convert(tmp_path / "x.safetensors", tmp_path / "half.safetensors", torch.float16)
    found = load_file(tmp_path / "half.safetensors")
    assert all(torch.equal(found[key], tensor.half()) for key, tensor in state.items()) and set(found) == set(state)
    for target, options, message in (
        ("folder", {}, "one file"),
        ("y.safetensors", {"ema": True}, "has none; leave it out"),
    ):
        with pytest.raises(FastsdError, match=message):
            convert(tmp_path / "x.safetensors", tmp_path / target, **options)
        assert not (tmp_path / target).exists()
