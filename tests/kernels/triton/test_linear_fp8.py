"""The kernels of `linear_fp8` and `geglu_fp8`: the specification's numbers, and its products to one rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.kernels import linear_fp8 as specification
from fastsd.kernels.geglu_fp8 import geglu_fp8_ref
from fastsd.kernels.launch.linear import Gemm
from fastsd.kernels.triton import geglu_fp8 as geglu_module
from fastsd.kernels.triton import linear as product_module
from fastsd.kernels.triton import linear_fp8 as module
from fastsd.kernels.triton import linear_tiles
from tests.support.triton_checks import DEVICE, broken_with_importers, check, must_fail, rand

if DEVICE == "cuda" and torch.cuda.get_device_capability() < module.OLDEST_GPU:
    pytest.skip("this GPU does not multiply fp8", allow_module_level=True)

FP16 = torch.float16
SMALL = Gemm(32, 32, 16, 32, 4, 2)
TILES = {"pointers": SMALL, "descriptors": replace(SMALL, tma=True), "split": replace(SMALL, splits=3)}
if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
    del TILES["descriptors"]


def run(
    shape: tuple[int, ...], k: int, launch: Gemm | None, activation: str = "none", skip: int = 0, kernels: Any = module
) -> None:
    """shape: of the result."""
    x, w = rand(*shape[:-1], k, dtype=FP16, scale=3.0), rand(shape[-1], k + skip, dtype=FP16, scale=(k + skip) ** -0.5)
    bias, residual = rand(shape[-1], dtype=FP16, seed=1), rand(*shape, dtype=FP16, seed=2)
    second = rand(*shape[:-1], skip, dtype=FP16, seed=3) if skip else None

    def kernel(x, w, bias, residual, second):
        return kernels.linear_fp8(x, *specification.quantize(w), bias, activation, residual, second, launch)

    def plain(x, w, bias, residual, second):
        return specification.linear_fp8_ref(x, *specification.quantize(w), bias, activation, residual, second)

    check(kernel, plain, x, w, bias, residual, second)


def run_geglu(shape: tuple[int, ...], k: int, launch: Gemm | None, kernels: Any = geglu_module) -> None:
    x, w, bias = (
        rand(*shape[:-1], k, dtype=FP16),
        rand(2 * shape[-1], k, dtype=FP16, scale=0.2),
        rand(2 * shape[-1], dtype=FP16),
    )

    def kernel(x, w, bias):
        return kernels.geglu_fp8(x, *specification.quantize(w), bias, launch)

    check(kernel, lambda x, w, bias: geglu_fp8_ref(x, *specification.quantize(w), bias), x, w, bias)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 500.0])
@pytest.mark.parametrize(("k", "skip"), [(16, 0), (320, 0), (48, 80), (5120, 0), (2560, 1920)])
def test_rows_are_quantised_to_the_numbers_of_the_specification(k, skip, scale):
    x = rand(3, k + skip, dtype=FP16, scale=scale).clamp(-60000, 60000).to(DEVICE)
    x[0, 0], x[1] = x[0].abs().max() * 2, 0
    first, second = x[:, :k].contiguous(), x[:, k:].contiguous() if skip else None
    values, scales = module.quantize(first, second)
    wanted, wanted_scales = specification.quantize(x)
    assert torch.equal(values.float(), wanted.float()) and torch.equal(scales, wanted_scales)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("shape", "k", "skip"), [((35, 41), 112, 0), ((2, 3, 8), 16, 0), ((1, 40), 256, 0), ((35, 24), 48, 80)]
)
def test_linear_fp8(shape, k, skip, tile):
    run(shape, k, TILES[tile], skip=skip)


@pytest.mark.parametrize("tile", [name for name in TILES if name != "split"])
def test_geglu_fp8(tile):
    run_geglu((35, 41), 112, Gemm(32, 16, 16, 32, 4, 2, tma=TILES[tile].tma))
    run_geglu((2, 3, 8), 16, Gemm(32, 16, 16, 32, 4, 2, tma=TILES[tile].tma))


def test_the_launches_of_the_tables():
    run((130, 168), 272, None, "silu")
    run_geglu((130, 136), 144, None)


FAULTS = {
    "forgets the scales of rows": (linear_tiles, "tl.load(scale_x_ptr + row", "tl.load(scale_x_ptr + 0 * row"),
    "forgets the scales of columns": (linear_tiles, "tl.load(scale_w_ptr + column", "tl.load(scale_w_ptr + 0 * column"),
    "scales the second part as the first": (
        product_module,
        "scale_w_ptr, row, c2,",
        "scale_w_ptr, row, c2 - COLUMNS1,",
    ),
    "takes a scale that is too small": (module, ">> 23) - 8", ">> 23) - 9"),
    "takes a scale of another row": (module, "scale_ptr + row", "scale_ptr + 0 * row"),
    "reads the skip input for x": (module, "row * stride_skip", "0 * row"),
    "writes the skip input at the beginning": (module, "out_ptr + K1 + k", "out_ptr + k"),
    "forgets to round to what fits": (module, "-448.0, 448.0", "-224.0, 224.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_notice_when_linear_fp8(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken, *change = FAULTS[fault]
    chain = [linear_tiles, product_module, module]
    importers = chain[chain.index(broken) + 1 :]
    with must_fail():
        kernels = broken_with_importers(broken, *change, importers, tmp_path, monkeypatch)
        run((35, 41), 48, SMALL, skip=80, kernels=kernels)


def test_geglu_scales_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    change = "scale_w_ptr, row, N + c1,", "scale_w_ptr, row, c1,"
    kernels = broken_with_importers(product_module, *change, [module, geglu_module], tmp_path, monkeypatch)
    with must_fail():
        run_geglu((35, 41), 112, Gemm(32, 16, 16, 32, 4, 2), kernels=kernels)


def fp8(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=FP16).to(specification.FP8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 16)}, "16 bits"),
        ({"weight": torch.ones(4, 16, dtype=FP16)}, "it needs .4, 16. torch.float8"),
        ({"weight": fp8(4, 32)}, r"weight is \[4, 32\]"),
        ({"scale": torch.ones(3)}, "scale is"),
        ({"bias": torch.ones(4)}, "bias is"),
        ({"x": torch.ones(2, 8, dtype=FP16), "weight": fp8(4, 8)}, "multiples of 16"),
        ({"x": torch.ones(0, 16, dtype=FP16)}, "0 rows"),
    ],
)
def test_linear_fp8_refuses(arguments: dict[str, torch.Tensor], message: str):
    given = {"x": torch.ones(2, 16, dtype=FP16), "weight": fp8(4, 16), "scale": torch.ones(4)} | arguments
    with pytest.raises(ValueError, match=message):
        module.linear_fp8(**given)
