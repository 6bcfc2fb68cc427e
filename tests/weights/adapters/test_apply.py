"""Adapters come and go without a trace, in place, and a bad one changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.weights.adapters.apply import Adapter, Adapters
from tests.support.tiny import all_weights, assert_same, sd1

Tensors = dict[str, torch.Tensor]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SIZES = {"attn1.to_q": (32, 32), "attn1.to_k": (32, 32), "attn1.to_v": (32, 32), "ff.net.2": (32, 128)}
CONVOLUTION = "unet.down_blocks.0.resnets.0.conv1"


@pytest.fixture
def components() -> Components:
    """A model after one call, which packs the weights of convolutions on the CPU."""
    model = sd1()
    model.unet.eval().requires_grad_(False)
    with torch.inference_mode():
        model.unet(torch.randn(1, 8, 8, 4), torch.tensor([3.0]), torch.randn(1, 5, 32))
    return model


def snapshot(components: Components) -> Tensors:
    return {key: value.clone() for key, value in all_weights(components).items()}


def lora(layers: dict[str, tuple[int, int]], seed: int = 0) -> Tensors:
    """A random LoRA of rank 2; layers with their outputs and inputs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        tensors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(2, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(outputs, 2, generator=generator)
    return tensors


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two LoRAs that share the layer to_q; each has layers that the other does not, the first a convolution."""
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for seed, names in enumerate((("attn1.to_q", "attn1.to_v"), ("attn1.to_q", "attn1.to_k", "ff.net.2"))):
        tensors = lora({f"unet.{BLOCK}.{name}": SIZES[name] for name in names}, seed)
        if seed == 0:
            tensors |= {f"{CONVOLUTION}.lora_A.weight": 0.2 * torch.randn(2, 32, 3, 3)}
            tensors |= {f"{CONVOLUTION}.lora_B.weight": 0.2 * torch.randn(32, 2, 1, 1)}
        save_file(tensors, paths[seed])
    return paths


def test_an_adapter_has_a_path() -> None:
    with pytest.raises(FastsdError, match="the path is empty"):
        Adapter("")  # type: ignore[arg-type]


def test_an_earlier_adapter_leaves_no_trace(components: Components, files: list[Path]) -> None:
    adapters = Adapters(components)
    before = snapshot(components)
    adapters.set([Adapter(files[1])])
    alone = snapshot(components)
    assert any(not torch.equal(alone[key], before[key]) for key in before)
    adapters.set([Adapter(files[0]), Adapter(files[1], unet=3.0)])
    key = "unet.down_blocks.0.resnets.0.conv1.weight"
    assert not torch.equal(all_weights(components)[key], before[key])
    adapters.set([Adapter(files[1])])
    assert_same(all_weights(components), alone)
    adapters.set([Adapter(files[1], unet=0.0)])
    assert_same(all_weights(components), before)
    adapters.set([])
    assert_same(all_weights(components), before)


def test_weights_keep_their_addresses(components: Components, files: list[Path]) -> None:
    """A captured graph reads them by address. Packed convolutions, which only the CPU has, are rebuilt."""
    parameters = dict(components.unet.named_parameters())
    before = {key: (id(p), p.data_ptr()) for key, p in parameters.items() if p.ndim == 2}
    Adapters(components).set([Adapter(files[1])])
    parameters = dict(components.unet.named_parameters())
    assert {key: (id(p), p.data_ptr()) for key, p in parameters.items() if p.ndim == 2} == before


def test_names_of_the_original_layout(components: Components, tmp_path: Path) -> None:
    """kohya's trainer uses them for SDXL."""
    same = {
        "down_blocks_0_attentions_0": "input_blocks_1_1",
        "mid_block_attentions_0": "middle_block_1",
        "up_blocks_1_attentions_0": "output_blocks_2_1",
    }
    results = []
    for names in (same.keys(), same.values()):
        layers = {
            f"lora_unet_{name}_transformer_blocks_0_attn2_to_q": (width, width)
            for name, width in zip(names, (32, 64, 32), strict=True)
        }
        kohya = {
            key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value
            for key, value in lora(layers, seed=3).items()
        }
        save_file(kohya, tmp_path / "kohya.safetensors")
        adapters, before = Adapters(components), snapshot(components)
        adapters.set([Adapter(tmp_path / "kohya.safetensors")])
        results.append(snapshot(components))
        assert any(not torch.equal(results[-1][key], before[key]) for key in before)
        adapters.set([])
    assert_same(*results)


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 2)}
UNKNOWN = {
    "unet.nowhere.lora_A.weight": torch.ones(2, 64),
    "unet.nowhere.lora_B.weight": torch.ones(64, 2),
}
BAD: dict[str, tuple[Tensors, str]] = {
    "a layer of another model": (GOOD | UNKNOWN, "1 of its layers are not in this model: unet.nowhere; .*skips them"),
    "a bias that the model lacks": (
        GOOD | {f"{LAYER}.lora_B.bias": torch.ones(64)},
        rf"1 of its layers are not in this model: {LAYER} \(a bias\); .*skips them",
    ),
    "too many outputs": (
        GOOD | {f"{LAYER}.lora_B.weight": torch.ones(65, 2)},
        r"to_q \(.*\) does not fit the model's \[64, 64\]",
    ),
    "ranks that differ": (GOOD | {f"{LAYER}.lora_B.weight": torch.ones(64, 3)}, "does not fit"),
    "half of a pair": ({f"{LAYER}.lora_A.weight": torch.ones(2, 64)}, "does not fit"),
    "NaN": (GOOD | {f"{LAYER}.lora_B.weight": torch.full((64, 2), torch.nan)}, "NaN"),
    "a key without a role": (GOOD | {"unet.conv_in.weight": torch.ones(1)}, "no known role"),
    "no adapter": ({"model.diffusion_model.out.2.weight": torch.ones(1)}, "not an adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_changes_nothing(components: Components, files: list[Path], tmp_path: Path, case: str) -> None:
    adapters = Adapters(components)
    adapters.set([Adapter(files[0])])
    before = snapshot(components)
    tensors, message = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(FastsdError, match=message):
        adapters.set([Adapter(files[1]), Adapter(tmp_path / "bad.safetensors")])
    assert_same(all_weights(components), before)
    assert adapters.active == (Adapter(files[0]),)


def test_a_missing_file_and_a_strength_out_of_range(components: Components, files: list[Path], tmp_path: Path) -> None:
    before, adapters = snapshot(components), Adapters(components)
    with pytest.raises(FastsdError, match="no such adapter"):
        adapters.set([Adapter(tmp_path / "missing.safetensors")])
    with pytest.raises(FastsdError, match="strength 1000"):
        adapters.set([Adapter(files[0], unet=1000.0)])
    assert_same(all_weights(components), before)


def test_unknown_layers_can_be_skipped(components: Components, tmp_path: Path) -> None:
    save_file(GOOD | UNKNOWN, tmp_path / "partial.safetensors")
    before, adapters = snapshot(components), Adapters(components)
    notes = adapters.set([Adapter(tmp_path / "partial.safetensors")], allow_partial=True)
    assert len(notes) == 1 and "unet.nowhere" in notes[0]
    assert any(not torch.equal(value, before[key]) for key, value in all_weights(components).items())
    adapters.set([])
    assert_same(all_weights(components), before)
