"""The attention kernels compiled for every architecture class, as they are launched there.

They spill nothing, fit shared memory, multiply on tensor cores (16 bits) and read whole vectors.
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

from bench.compiled import SHARED, Compiled, compile_kernel, source_of
from bench.dryrun import compiles
from bench.intercept import KernelLaunch, intercepted_launches
from fastsd.kernels.launch.flash_attn import RESIDENT, TABLE, choose
from fastsd.kernels.triton import flash_attn as flash_attn_triton
from fastsd.kernels.triton import flash_attn_gradients as flash_attn_gradients_triton

pytestmark = pytest.mark.heavy

CAPABILITIES = [capability for capability in SHARED if capability >= 80]
HALF = (torch.float16, torch.bfloat16)
# Queries, keys, head size.
LONG = [
    (4096, 4096, 32),
    (4096, 4096, 40),  # SD1.5 at 512 x 512, first level; heads of 40 begin at odd multiples of 16 bytes
    (4096, 4000, 40),  # the last block of keys is short
    (4096, 4096, 64),  # SDXL, SD2
    (1024, 1024, 64),
    (1024, 1000, 80),  # SD1.5, second level
    (1024, 1000, 96),
    (1024, 1000, 128),
    (256, 256, 160),  # SD1.5, third level
    (256, 225, 160),
]
FEW = [(4096, 77, 40), (4096, 77, 64), (1024, 77, 80), (256, 77, 160), (77, 77, 64), (64, 128, 128), (64, 128, 160)]
QUICK = {(90, 4096, 40), (90, 4096, 64), (90, 77, 40), (90, 77, 64), (80, 4000, 40), (86, 225, 160), (120, 77, 160)}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def launched(name: str, capability: int, shape: tuple[int, int, int], **like: Any) -> tuple[Any, dict[str, Any]]:
    """The kernel `name`, and what views of a fused projection launch it with on sm_`capability`."""
    causal = like.pop("causal", False)
    queries, keys, size = shape
    q = torch.empty(1, queries, 3, 8, size, device="meta", **like)[:, :, 0]
    k, v = torch.empty(1, keys, 2, 8, size, device="meta", **like).unbind(2)
    found: list[tuple[Any, dict[str, Any]]] = []
    with intercepted_launches(capability, lambda *launch: found.append(launch)):
        flash_attn_triton.flash_attn(q, k, v, causal)
    (one,) = found
    assert one[0].fn.__name__ == name, f"{one[0]} takes {shape} on sm_{capability}"
    return one


def examined(kernel: Any, capability: int, arguments: dict[str, Any]) -> Compiled:
    options = {"num_stages": arguments.get("num_stages", 1)}
    if arguments.get("maxnreg"):
        options["maxnreg"] = arguments["maxnreg"]
    made = compile_kernel(kernel, capability, arguments["num_warps"], arguments, **options)
    assert made.spills == 0 and made.shared <= SHARED[capability], made
    assert "MUFU.EX2" in made.machine
    return made


def targets(shapes: list[tuple[int, int, int]]) -> list[Any]:
    return [
        pytest.param(
            *(capability, shape, dtype),
            id=f"sm_{capability}-{'-'.join(map(str, shape))}-{str(dtype)[6:]}",
            marks=() if (capability, *shape[1:]) in QUICK and dtype is torch.float16 else pytest.mark.slow,
        )
        for capability in CAPABILITIES
        for shape in shapes
        for dtype in HALF
    ]


@pytest.mark.parametrize(("capability", "shape", "dtype"), targets(LONG))
def test_flash_attn_compiles(capability, shape, dtype):
    kernel, arguments = launched("_flash_attn_kernel", capability, shape, dtype=dtype)
    made = examined(kernel, capability, arguments)
    assert re.search(rf"\b{TENSOR_CORES[capability]}", made.machine)
    # A part of 64 x 16 keys among 8 warps leaves 8 bytes a thread.
    share = arguments["BLOCK_N"] * arguments["D2"] * 16 // (32 * arguments["num_warps"])
    assert made.copies and min(made.copies) == min(share or 128, 128), made
    assert max(made.stores) == 128


@pytest.mark.parametrize(("capability", "shape", "dtype"), targets(FEW))
def test_flash_attn_of_few_keys_compiles(capability, shape, dtype):
    if shape[1] * shape[2] > RESIDENT[max(key for key in RESIDENT if key <= capability)]:
        pytest.skip("these keys do not fit this chip; the kernel for long sequences takes them")
    like = {"dtype": dtype, "causal": shape[0] == 77}
    kernel, arguments = launched("_few_keys_kernel", capability, shape, **like)
    made = examined(kernel, capability, arguments)
    assert re.search(rf"\b{TENSOR_CORES[capability]}", made.machine)
    assert {*made.loads, *made.copies} >= {128} and max(made.stores) == 128, made


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("size", [40, 64, 80, 96, 128, 160])
def test_flash_attn_in_fp32_compiles(size, capability):
    """Without tensor cores: products are exact."""
    shape, like = (256, 200, size), {"dtype": torch.float32}
    kernel, arguments = launched("_flash_attn_kernel", capability, shape, **like)
    made = examined(kernel, capability, arguments)
    assert arguments["PRECISION"] == "ieee" and not re.search(r"\b\w+MMA\.", made.machine)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", [(1024, 1000, size) for size in (32, 40, 64, 80, 96, 128, 160)] + [(77, 77, 64)])
@pytest.mark.parametrize("dtype", HALF)
def test_both_passes_of_training_compile(dtype, shape, capability):
    """One shape for sm_90 is compiled by tests/bench/test_dryrun_ways.py."""
    queries, keys, size = shape
    q, k, v = (torch.empty(1, n, 8, size, dtype=dtype, device="meta") for n in (queries, keys, keys))
    found: list[KernelLaunch] = []
    with intercepted_launches(capability, lambda *launch: found.append(KernelLaunch("", *launch))):
        out, lse = flash_attn_gradients_triton.forward(q, k, v, queries == keys)
        flash_attn_gradients_triton.backward(out, q, k, v, out, lse, queries == keys)
    assert len(found) == 3
    for launch in found:
        size_of = compiles.size_of(launch, capability)
        assert compiles.wrong(launch, size_of, capability) is None, (launch.kernel.fn.__name__, size_of)


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_the_softmax_of_wide_heads_compiles(dtype, capability):
    kernel, arguments = launched("_softmax_kernel", capability, (64, 4096, 512), dtype=dtype)
    examined(kernel, capability, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 64, 80, 96, 128, 160])
def test_flash_attn_compiles_for_amd(size):
    """gfx942 takes the rows of sm_80; its 64 KiB of local memory hold them. Compiled, never run."""
    target = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
    shape, like = (1024, 1000, size), {"dtype": torch.float16}
    kernel, arguments = launched("_flash_attn_kernel", 80, shape, **like)
    source = source_of(kernel, arguments)
    binary = triton.compile(source, target=target, options={"num_warps": arguments["num_warps"], "num_stages": 2})
    assert binary.metadata.shared <= 65536 and "v_mfma" in binary.asm["amdgcn"]


def test_every_row_of_the_table_is_used():
    """So that the shapes above compile all of it."""
    for capability in CAPABILITIES:
        key = max(key for key in TABLE if key <= capability)
        used = {choose(key, *shape[:2], 8, shape[2], 2) for shape in LONG}
        tiles = {(t.rows, t.keys, t.warps, t.stages, t.padded) for t in TABLE[key].values()}
        assert {(t.rows, t.keys, t.warps, t.stages, t.padded) for t in used} == tiles
