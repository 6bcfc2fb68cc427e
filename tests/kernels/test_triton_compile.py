"""Every kernel compiled for every architecture class: no spills, shared memory that fits, wide accesses.

The launches are the tables' own, at shapes of SD1.5, of the SD and SDXL decoders and of CLIP.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget

from bench.compiled import SHARED, compile_kernel, source_of
from bench.intercept import KernelLaunch, intercepted_launches
from fastsd.kernels.launch import OPTIONS, groupnorm_silu
from fastsd.kernels.launch import rowwise as rows
from fastsd.kernels.launch.conv2d import UNUSED
from fastsd.kernels.triton import add_bias_residual as add_bias_residual_triton
from fastsd.kernels.triton import advance as advance_triton
from fastsd.kernels.triton import conv2d as conv2d_triton
from fastsd.kernels.triton import conv2d_fp8 as conv2d_fp8_triton
from fastsd.kernels.triton import geglu as geglu_triton
from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton
from fastsd.kernels.triton import groupnorm_silu_split as groupnorm_silu_split_triton
from fastsd.kernels.triton import layernorm as layernorm_triton

pytestmark = pytest.mark.heavy

AMD = 942  # gfx942, which takes the rows of sm_80: compiled, never run
QUICK = (75, 90, AMD)
TARGETS = [
    pytest.param(capability, dtype, marks=() if capability in QUICK and dtype is torch.float16 else pytest.mark.slow)
    for capability in (*SHARED, AMD)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    if dtype is not torch.bfloat16 or capability >= 80
]
GROUPNORM = [  # pixels, channels, of those in the first part
    (64, 1280, 1280),  # UNet, 8 x 8: one launch
    (1024, 640, 640),  # 20 channels a group: 8-byte vectors in one launch
    (4096, 320, 320),  # 10 channels a group, split
    (4096, 960, 640),  # the second part begins inside a group
    (1024 * 1024, 128, 128),  # decoder: split and merged
]


def class_of(capability: int) -> int:
    return {89: 86, AMD: 80}.get(capability, capability)


def examine(kernel: Any, capability: int, warps: int, arguments: dict[str, Any], bits: int, wide_loads: int) -> None:
    """bits: of every store to the result; wide_loads: how many loads have to be at least so wide."""
    if capability == AMD:
        examine_amd(kernel, warps, arguments, wide=bits == 128)
        return
    made = compile_kernel(kernel, capability, warps, arguments)
    name = f"{kernel.fn.__name__} on sm_{capability}: {made}"
    assert made.spills == 0, name
    assert made.shared <= SHARED[capability], name
    assert sum(width >= bits for width in made.loads) >= wide_loads, name
    assert not bits or max(made.stores) >= bits, name


def examine_amd(kernel: Any, warps: int, arguments: dict[str, Any], wide: bool) -> None:
    """wide: two loads and the store of a map have to be of 16 bytes. Weights may be narrower: 64 lanes share a row."""
    target = GPUTarget("hip", "gfx942", 64)
    made = triton.compile(source_of(kernel, arguments), target=target, options={"num_warps": warps, **OPTIONS})
    machine, name = made.asm["amdgcn"], f"{kernel.fn.__name__} on gfx942"
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", machine)
    assert spilled and set(spilled) == {"0"}, f"{name} spills: {spilled}"
    assert made.metadata.shared <= 65536, name
    assert not wide or (machine.count("_load_dwordx4") >= 2 and "_store_dwordx4" in machine), name


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("pixels", "channels", "first"), GROUPNORM)
def test_groupnorm_silu_compiles(pixels, channels, first, capability, dtype):
    launch = groupnorm_silu.choose(class_of(capability), pixels, channels, 32, dtype.itemsize)
    size = channels // 32
    splits = -(-pixels // launch.split_pixels) if launch.split_pixels else 1
    merged = 1 if launch.merge else splits
    arguments = {
        **dict.fromkeys(("x_ptr", "x2_ptr", "add_ptr", "weight_ptr", "bias_ptr", "out_ptr"), dtype),
        **dict.fromkeys(("ahead_ptr", "sum_ptr"), dtype if first == channels else None),
        **dict.fromkeys(("moments_ptr", "merged_ptr"), torch.float32),
        **{"HW": pixels, "C": channels, "C1": first, "eps": 1e-5, "groups": 32, "splits": merged},
        **{"split_pixels": launch.split_pixels, "apply_pixels": launch.apply_pixels},
        **{"stride_xb": pixels * first, "stride_xp": first, "stride_ab": channels},
        **{"stride_x2b": pixels * (channels - first), "stride_x2p": channels - first},
        **{"CPG": size, "G": launch.groups, "BLOCK_P": launch.block_p, "PARTS": 1 if first == channels else 2},
        **{"BLOCK_C": groupnorm_silu.power_of_two(launch.groups * size), "SILU": True},
        **{"BLOCK_G": groupnorm_silu.power_of_two(launch.groups), "BLOCK_S": groupnorm_silu.power_of_two(merged)},
        "GIVEN": False,
    }
    bits = 64 if launch.groups * channels // 32 * dtype.itemsize % 16 else 128
    if not launch.split_pixels:
        examine(groupnorm_silu_triton._groupnorm_silu_kernel, capability, launch.warps, arguments, bits, 4)
        return
    module = groupnorm_silu_split_triton
    examine(module._groupnorm_moments_kernel, capability, launch.warps, arguments, 0, 0)
    examine(module._groupnorm_apply_kernel, capability, launch.warps, arguments, bits, 2)
    if launch.merge:
        arguments |= {"splits": splits, "BLOCK_S": groupnorm_silu.power_of_two(splits)}
        examine(module._groupnorm_merge_kernel, capability, 4, arguments, 0, 0)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("columns", [320, 768, 1280])
def test_layernorm_compiles(columns, capability, dtype):
    launch = rows.layernorm(class_of(capability), columns)
    arguments = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "sum_ptr"), dtype),
        **dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), dtype),
        **{"R": 8192, "C": columns, "eps": 1e-5, "stride_xr": columns},
        **{"BLOCK_R": launch.block_rows, "BLOCK_C": launch.block_columns},
    }
    examine(layernorm_triton._layernorm_kernel, capability, launch.warps, arguments, 128, 2)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("columns", [128, 320, 1280])
def test_add_bias_residual_compiles(columns, capability, dtype):
    launch = rows.add_bias_residual(class_of(capability), columns)
    arguments = {
        **dict.fromkeys(("y_ptr", "bias_ptr", "residual_ptr"), dtype),
        **{"R": 8192, "C": columns, "stride_rr": columns},
        **{"BLOCK_R": launch.block_rows, "BLOCK_C": launch.block_columns, "RELU": False},
    }
    examine(add_bias_residual_triton._add_bias_residual_kernel, capability, launch.warps, arguments, 128, 2)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("pixels", "channels"), [(4096, 320), (16384, 320), (1024 * 1024, 128)])
def test_add_bias_residual_with_moments_compiles(pixels, channels, capability, dtype):
    if dtype is torch.float32:
        pytest.skip("in 16 bits only")
    launch = groupnorm_silu.choose(class_of(capability), pixels, channels, 32, dtype.itemsize)
    arguments = {
        **dict.fromkeys(("y_ptr", "bias_ptr", "residual_ptr"), dtype),
        **{"moments_ptr": torch.float32, "HW": pixels, "C": channels, "run": launch.split_pixels},
        **{"stride_rr": channels, "CPG": channels // 32, "G": launch.groups, "BLOCK_P": launch.block_p},
        "BLOCK_C": groupnorm_silu.power_of_two(launch.groups * channels // 32),
        "BLOCK_G": groupnorm_silu.power_of_two(launch.groups),
    }
    kernel = add_bias_residual_triton._residual_moments_kernel
    examine(kernel, capability, launch.warps, arguments, 128, 2)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("columns", [1280, 5120])
def test_geglu_compiles(columns, capability, dtype):
    launch = rows.geglu(class_of(capability), columns)
    arguments = {
        **dict.fromkeys(("y_ptr", "bias_ptr", "out_ptr"), dtype),
        **{"R": 8192, "N": columns, "stride_yr": 2 * columns},
        **{"BLOCK_R": launch.block_rows, "BLOCK_N": launch.block_columns},
    }
    examine(geglu_triton._geglu_kernel, capability, launch.warps, arguments, 128, 4)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("parts", [2, 3])
def test_advance_compiles(parts, capability, dtype):
    launch = rows.advance(class_of(capability))
    arguments = {
        **dict.fromkeys(("x_ptr", "table_ptr", "saved_ptr", "history_ptr", "noise_ptr"), torch.float32),
        **{"x_in_ptr": dtype, "out_ptr": dtype, "row_ptr": torch.int64, "rescale_ptr": torch.float32},
        **{"guidance": torch.float32, "image_guidance": torch.float32, "NL": 16384, "L": 16384},
        **{"PARTS": parts, "GUIDANCE_ON_DEVICE": True, "BLOCK": launch.block_columns},
    }
    # Two elements a thread, so that 16384 of them keep 64 multiprocessors busy.
    examine(advance_triton._advance_kernel, capability, launch.warps, arguments, 32, 8)


CONVOLUTIONS = {  # side of the map, input and output channels, stride; whether boxes are read by TMA where there is one
    "boxes of 128 + 32 channels": (64, 320, 320, 1, True),
    "boxes, weights first": (512, 128, 128, 1, True),
    "boxes, split": (8, 1280, 1280, 1, True),
    "an image's channels": (64, 128, 3, 1, True),
    "stride 2": (64, 320, 320, 2, False),
    "the latent's channels": (64, 4, 320, 1, False),
}


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_compiles(case, capability, dtype):
    if capability == 75 or dtype == torch.float32:
        assert class_of(capability) in UNUSED or dtype not in conv2d_triton.DTYPES
        return
    side, inputs, outputs, stride, boxes = CONVOLUTIONS[case]
    x = torch.empty(2, side, side, inputs, dtype=dtype, device="meta")
    weight = torch.empty(outputs, 3, 3, inputs, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    residual = None if stride == 2 else x.new_empty(2, side, side, outputs)
    found: list[KernelLaunch] = []
    with intercepted_launches(class_of(capability), lambda *launch: found.append(KernelLaunch(case, *launch))):
        conv2d_triton.conv2d(x, weight, x.new_empty(outputs), stride, (1, 1, 1, 1), residual)
    for launch in found:
        if capability == AMD:
            examine_amd(launch.kernel, launch.arguments["num_warps"], launch.arguments, wide=False)
            continue
        made = launch.compiled(capability)
        assert made.spills == 0 and made.shared <= SHARED[capability], (case, capability, made)
    if capability >= 90 and capability != AMD:
        assert ("UTMALDG" in found[0].compiled(capability).machine) == boxes
    elif capability != AMD:
        assert max(found[0].compiled(capability).copies) == (64 if inputs == 4 else 128)
    assert capability != 90 or "HGMMA" in found[0].compiled(capability).machine


@pytest.mark.parametrize("capability", [75, 100])
def test_the_launches_for_which_a_class_has_its_own_tiles_spill_nothing(capability):
    """With the tiles of other classes each of these spills: a norm of 8 x 8 pixels in two parts on sm_75; on sm_100 the
    encoder's first convolution, and the last pass of a norm with two results."""
    image = torch.empty(1, 512, 512, 3, dtype=torch.float16, device="meta")
    found: list[KernelLaunch] = []
    with intercepted_launches(capability, lambda *launch: found.append(KernelLaunch("", *launch))):
        if capability == 75:
            x, vector = image.new_empty(2, 8, 8, 1280), image.new_empty(2560)
            groupnorm_silu_triton.groupnorm_silu(x, vector, vector, 32, 1e-5, skip=x)
        else:
            weight = image.new_empty(128, 3, 3, 3).permute(0, 3, 1, 2)
            conv2d_triton.conv2d(image, weight, image.new_empty(128), 1, (1, 1, 1, 1))
            x, vector = image.new_empty(1, 128, 128, 512), image.new_empty(512)
            groupnorm_silu_triton.groupnorm_silu(x, vector, vector, 32, 1e-6, silu=False, ahead=vector)
    assert len(found) == {75: 1, 100: 3}[capability]
    assert not any(launch.compiled(capability).spills for launch in found)


FP8_PRODUCTS = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}  # of the instruction


@pytest.mark.parametrize("capability", FP8_PRODUCTS)
def test_conv2d_fp8_multiplies_fp8(capability):
    """Neither in 16 bits nor by single numbers; of SD1.5's first level, where a step is 64 channels deep."""
    e4m3 = conv2d_fp8_triton.FP8
    x = torch.empty(2, 64, 64, 320, dtype=torch.float16, device="meta")
    weight = torch.empty(320, 3, 3, 320, dtype=e4m3, device="meta").permute(0, 3, 1, 2)
    scale, bias = torch.empty(320, dtype=torch.float32, device="meta"), x.new_empty(320)
    found: list[KernelLaunch] = []
    with intercepted_launches(class_of(capability), lambda *launch: found.append(KernelLaunch("", *launch))):
        conv2d_fp8_triton.conv2d_fp8(x, weight, scale, bias, 1, (1, 1, 1, 1), x)
    *quantising, convolving = [launch.compiled(capability) for launch in found]
    assert len(quantising) == 2 and all(made.spills == 0 for made in (*quantising, convolving))
    assert convolving.shared <= SHARED[capability]
    products = set(re.findall(r"\b(\w*MMA)\b", convolving.machine))
    assert products == {FP8_PRODUCTS[capability]}
    assert ("UTMALDG" in convolving.machine) == (capability >= 90)
