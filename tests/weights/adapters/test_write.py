"""Adapters that are written: every key has a name and a role that the reader knows; what a form lacks is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.files.hashes import adapter_hash
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.adapters.roles import split_key
from fastsd.weights.adapters.write import StoredLayer, write_adapter
from tests.support.tiny import all_weights, sd1, sdxl

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
SIZES = {"attn1.to_q": (64, 64), "attn1.to_v": (64, 64), "ff.net.2": (64, 256)}


def lora(alpha: float = 2.0) -> list[StoredLayer]:
    """A matrix, a 1 x 1 convolution of SD 1, a 3 x 3 one, and a text encoder's; ranks 2 and 4."""
    generator = torch.Generator().manual_seed(3)

    def layer(network: str, name: str, out: int, *inputs: int, rank: int = 2) -> StoredLayer:
        down = 0.2 * torch.randn(rank, *inputs, generator=generator)
        up = 0.2 * torch.randn(out, rank, generator=generator)
        return StoredLayer(network, name, (out, *inputs), {"down": down, "up": up}, rank, alpha)

    layers = [layer("unet", f"{BLOCK}.{name}", *size) for name, size in SIZES.items()]
    layers.append(layer("unet", "mid_block.attentions.0.proj_in", 64, 64, rank=4))
    layers.append(layer("unet", "mid_block.resnets.0.conv1", 64, 64, 3, 3))
    layers.append(layer("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", 32, 32))
    return layers


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def components(request: pytest.FixtureRequest) -> Components:
    return {"sd1": sd1, "sdxl": sdxl}[request.param]()


def changed(components: Components, path: Path) -> dict[str, torch.Tensor]:
    adapters = Adapters(components)
    assert adapters.set([Adapter(path)]) == []
    weights = {key: value.clone() for key, value in all_weights(components).items()}
    adapters.set([])
    return weights


def test_every_form_says_the_same(components: Components, tmp_path: Path) -> None:
    """alpha / rank is 1 and 1/2 here, so multiplying it into a tensor is exact."""
    base = {key: value.clone() for key, value in all_weights(components).items()}
    paths = {"kohya": tmp_path / "a.safetensors", "diffusers": tmp_path / "d", "peft": tmp_path / "p"}
    for form, path in paths.items():
        write_adapter(path, form, lora(), components, dtype="fp32")
    kohya = changed(components, paths["kohya"])
    assert sum(not torch.equal(kohya[key], base[key]) for key in base) == 5  # q and v share a matrix here
    for form in ("diffusers", "peft"):
        found = changed(components, paths[form])
        assert all(torch.equal(found[key], kohya[key]) for key in base), form


def test_names_and_shapes_of_kohya(components: Components, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a.safetensors", "kohya", lora(), components, {"ss_epoch": "3"}, "bf16")
    tensors = load_file(file)
    assert all(split_key(key)[1] is not None for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    block = "middle_block_1" if components.xl else "mid_block_attentions_0"
    assert tensors[f"lora_unet_{block}_proj_in.alpha"].shape == ()
    convolution = () if components.xl else (1, 1)  # SDXL stores its projections as matrices
    assert tensors[f"lora_unet_{block}_proj_in.lora_down.weight"].shape == (4, 64, *convolution)
    conv1 = "middle_block_0_in_layers_2" if components.xl else "mid_block_resnets_0_conv1"
    assert tensors[f"lora_unet_{conv1}.lora_up.weight"].shape == (64, 2, 1, 1)
    te = "lora_te1_" if components.xl else "lora_te_"
    assert f"{te}text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in tensors


def test_metadata(components: Components, tmp_path: Path) -> None:
    """The hash is A1111's: of the tensors alone. diffusers' form has PEFT's configs, with each layer's rank."""
    file = write_adapter(tmp_path / "a.safetensors", "kohya", lora(), components, {"ss_epoch": "3"})
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_epoch"] == "3"
    assert metadata["sshs_model_hash"].startswith(adapter_hash(file.read_bytes()))
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    with safe_open(write_adapter(tmp_path / "d", "diffusers", lora(), components), "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert config["unet.r"] == config["unet.lora_alpha"] == 2
    assert config["unet.rank_pattern"] == {r"mid_block\.attentions\.0\.proj_in": 4}


BAD = {
    "form": ("a.safetensors", {"form": "khoya"}, r"format is 'khoya'; it should be .*; did you mean kohya\?"),
    "dtype": ("a.safetensors", {"dtype": "fp8"}, "dtype is 'fp8'; it should be fp16, bf16, fp32"),
    "suffix": ("a.pt", {}, "a.pt: it should end in .safetensors"),
    "exists": ("old.safetensors", {}, "old.safetensors: .*exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, message = BAD[case]
    (tmp_path / "old.safetensors").write_bytes(b"kept")
    arguments = {"form": "kohya", "layers": lora(), "components": sd1()} | changes
    with pytest.raises(FastsdError, match=message):
        write_adapter(tmp_path / name, **arguments)
    assert (tmp_path / "old.safetensors").read_bytes() == b"kept"


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    layers = lora()
    layers[0].tensors["up"][0] = float("nan")
    with pytest.raises(FastsdError, match=r"attn1.to_q holds NaN or infinite values \(up\); not written"):
        write_adapter(tmp_path / "a.safetensors", "kohya", layers, sd1())
    assert not (tmp_path / "a.safetensors").exists()


def test_diffusers_has_no_lokr(tmp_path: Path) -> None:
    factors = {"kron_w1": torch.ones(8, 8), "kron_w2": torch.ones(8, 8)}
    layer = StoredLayer("unet", f"{BLOCK}.attn1.to_q", (64, 64), factors, 8, 8.0)
    with pytest.raises(FastsdError, match="opens no LoKr .*kohya and peft hold it"):
        write_adapter(tmp_path, "diffusers", [layer], sd1())
