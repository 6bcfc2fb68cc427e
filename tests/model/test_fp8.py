"""A UNet whose products and convolutions are fp8."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from fastsd import Adapter, FastsdError, Pipeline
from fastsd.config import UNetConfig
from fastsd.kernels.linear_fp8 import FP8
from fastsd.model.fp8 import layers_in_fp8, quantize_unet
from fastsd.model.layers import Conv2d
from fastsd.model.unet import UNet
from fastsd.runtime import devices

CONFIG = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    num_attention_heads=(2, 2),
    cross_attention_dim=64,
    norm_num_groups=16,
)


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 8, 8, 4), torch.tensor([3.0, 801.0]), torch.randn(2, 77, 64)


def test_the_transformers_and_the_convolutions_of_wide_maps_are_fp8() -> None:
    names = layers_in_fp8(unet())
    assert {name.rpartition(".")[2] for name in names} == {
        *("to_qkv", "to_q", "0", "proj", "2"),
        *("proj_in", "proj_out", "conv_shortcut"),
        *("conv1", "conv2", "conv"),
    }
    assert "down_blocks.0.downsamplers.0.conv" in names and not any("upsamplers" in name for name in names)
    assert not any("to_kv" in name or "time" in name or name.startswith("conv") for name in names)
    narrow = UNet(replace(CONFIG, block_out_channels=(32, 48)))
    assert all(layer.weight.shape[1] >= 64 for layer in layers_in_fp8(narrow).values())


@torch.no_grad()
def test_the_output_differs_by_the_noise_of_the_rounding() -> None:
    """A product's rounding is 2^-4 of each operand at most, sqrt(2 / 3) of that on average: 5 %. Between the layers'
    outputs and the network's are norms and residuals, which keep errors from growing; random weights, so no more is
    said than that it is neither nothing nor as large as the result."""
    wide, fp8 = unet(), unet()
    quantize_unet(fp8)
    truth = wide(*inputs())
    error = (fp8(*inputs()) - truth).norm() / truth.norm()
    assert 1e-4 < error < 0.2


@torch.no_grad()
def test_weights_stay_fp8_when_a_network_moves_or_is_copied() -> None:
    net = unet()
    quantize_unet(net)
    before = net(*inputs())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), unet()):
        if next(iter(layers_in_fp8(other).values())).scale is None:
            quantize_unet(other)
        moved = other.to(torch.float64).to("cpu").float()
        for layer in layers_in_fp8(moved).values():
            weight, scale = layer.in_fp8()
            assert weight.dtype == FP8 and scale.dtype == torch.float32
        assert torch.equal(moved(*inputs()), before)


@torch.no_grad()
def test_a_convolution_that_was_packed_for_the_cpu_is_quantised_too() -> None:
    torch.manual_seed(0)
    plain, x = Conv2d(64, 64).requires_grad_(False).eval(), torch.randn(1, 5, 6, 64)
    packed = copy.deepcopy(plain)
    packed(x)
    for conv in (plain, packed):
        conv.quantize()
        assert conv.in_fp8()[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain(x), packed(x)) and not torch.equal(plain(x, add_bias=False), plain(x))
    assert torch.equal(plain(x, residual=x, relu=True), (plain(x) + x).clamp(min=0))


def test_fp8_needs_a_gpu_or_the_word_for_it() -> None:
    with pytest.raises(FastsdError, match="a CPU does not multiply fp8: use auto, or fp8-emulated"):
        Pipeline.from_pretrained(device="cpu", dtype="fp8")
    with pytest.raises(FastsdError, match="one of auto, fp32, fp16, bf16, fp8, fp8-emulated"):
        Pipeline.from_pretrained(device="cpu", dtype="fp4")


def test_an_old_gpu_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(
        FastsdError, match=r"RTX 3090 \(compute capability 8.6\) does not multiply fp8, which needs 8.9"
    ):
        devices.resolve_precision("fp8", torch.device("cuda", 0))


@pytest.mark.heavy
def test_a_pipeline_in_fp8() -> None:
    pipe = Pipeline.from_pretrained(device="cpu", dtype="fp8-emulated")
    result = pipe("a thick 8", seed=3, num_inference_steps=2)
    assert result.parameters["dtype"] == "fp8"
    with pytest.raises(FastsdError, match="fp8 take no adapters"):
        pipe.set_adapters([Adapter("any.safetensors")])
    with pytest.raises(FastsdError, match="load it again"):
        pipe.to(torch.float32)
    assert pipe.to("cpu").fp8 and pipe.set_adapters([]) == []
