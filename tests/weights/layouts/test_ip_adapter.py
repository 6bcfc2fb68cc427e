"""IP-Adapter's files: both forms, and what is no such file or another one, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd import FastsdError
from fastsd.weights.layouts.vision import load_vision
from tests.support.ip_adapters import PROJECTION, make_tower, write_adapter
from tests.support.pipelines import tiny_pipeline

pytestmark = pytest.mark.heavy
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("ip"), tiny_pipeline().components.unet)


def test_a_bin_file_is_the_same(adapter: Path, tmp_path: Path) -> None:
    pipe, tables = tiny_pipeline(), dict[str, Tensors]()
    for key, value in load_file(adapter).items():
        tables.setdefault(key.split(".")[0], {})[key.split(".", 1)[1]] = value
    torch.save(tables, tmp_path / "ip.bin")
    with pytest.raises(FastsdError, match="a pickle, which can hold programs"):
        pipe.load_ip_adapter(tmp_path / "ip.bin")
    tower = adapter.parent / "image_encoder"
    found = pipe.load_ip_adapter(tmp_path / "ip.bin", tower, allow_pickle=True)
    expected = pipe.load_ip_adapter(adapter)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_sdxls_files_find_the_tower_of_models(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "sdxl_models").mkdir()
    file = tmp_path / "sdxl_models" / "ip.safetensors"
    save_file(load_file(adapter), file)
    with pytest.raises(
        FastsdError, match=rf"vision tower of {PROJECTION} features; give its folder or file with ip_enc"
    ):
        tiny_pipeline().load_ip_adapter(file)
    torch.manual_seed(4)
    make_tower(tmp_path / "models" / "image_encoder")
    assert tiny_pipeline().load_ip_adapter(file).encoder is not None


def without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"a": torch.zeros(1)}, "not an IP-Adapter"),
        (lambda t: t | {"ip_adapter.0.to_k_lora.down.weight": torch.zeros(1)}, "an IP-Adapter of face ids"),
        (lambda t: t | {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(1)}, "an IP-Adapter of face ids"),
        (lambda t: t | {"ip_adapter.2.to_k_ip.weight": torch.zeros(1)}, "the key ip_adapter.2.to_k_ip.weight"),
        (lambda t: t | {"ip_adapter.1.to_k_ip.weight": torch.zeros(32, 64)}, "it belongs to another family"),
        (without("image_proj.proj.weight"), "not an IP-Adapter that fastsd knows"),
        (without("image_proj.norm.bias"), "image_proj.norm.bias"),
        (without("ip_adapter.1.to_v_ip.weight"), "to_v_ip.weight"),
        (lambda t: t | {"image_proj.proj.weight": torch.zeros(128, 7)}, "vision tower of 7 features"),
    ],
    ids=["nothing", "face", "face-plus", "number", "family", "kind", "norm", "layer", "tower"],
)
def test_other_files_are_named(adapter: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], said: str) -> None:
    save_file(change(load_file(adapter)), tmp_path / "ip.safetensors")
    (tmp_path / "image_encoder").symlink_to(adapter.parent / "image_encoder")
    with pytest.raises(FastsdError, match=said):
        tiny_pipeline().load_ip_adapter(tmp_path / "ip.safetensors")


def test_other_towers_are_named(adapter: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    torch.manual_seed(4)
    tensors = load_file(adapter.parent / "image_encoder" / "model.safetensors")
    save_file(tensors, tmp_path / "tower.safetensors")
    with pytest.raises(FastsdError, match="a vision tower of 48 channels; without a config.json"):
        pipe.load_ip_adapter(adapter, tmp_path / "tower.safetensors")
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "open.safetensors")
    with pytest.raises(FastsdError, match="it has open_clip's names"):
        load_vision(tmp_path / "open.safetensors", torch.float32, torch.device("cpu"))
