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
from fastsd.kernels.launch.flash_attn import RESIDENT, TABLE, choose
from fastsd.kernels.triton import flash_attn as flash_attn_triton
from fastsd.kernels.triton import flash_attn_few_keys as flash_attn_few_keys_triton
from fastsd.kernels.triton import flash_attn_wide as flash_attn_wide_triton

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


class Recorder:
    """Stands for a kernel; keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            given = dict(zip((parameter.name for parameter in self.kernel.params), args)) | options
            self.arguments = {name: x.dtype if isinstance(x, torch.Tensor) else x for name, x in given.items()}

        return launch


def launched(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, capability: int, shape: tuple[int, int, int], **like: Any
) -> tuple[Any, dict[str, Any]]:
    """The kernel `name` of `module`, and what views of a fused projection launch it with on sm_`capability`."""
    causal = like.pop("causal", False)
    queries, keys, size = shape
    recorder = Recorder(getattr(module, name))
    monkeypatch.setattr(module, name, recorder)
    key = max(key for key in TABLE if key <= capability)
    monkeypatch.setattr(flash_attn_triton.architecture, "class_of", lambda device: key)
    q = torch.empty(1, queries, 3, 8, size, **like)[:, :, 0]
    k, v = torch.empty(1, keys, 2, 8, size, **like).unbind(2)
    flash_attn_triton.flash_attn(q, k, v, causal)
    assert recorder.arguments, f"{name} was not launched for {shape} on sm_{capability}"
    return recorder.kernel, recorder.arguments


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
def test_flash_attn_compiles(capability, shape, dtype, monkeypatch):
    kernel, arguments = launched(monkeypatch, flash_attn_triton, "_flash_attn_kernel", capability, shape, dtype=dtype)
    made = examined(kernel, capability, arguments)
    assert re.search(rf"\b{TENSOR_CORES[capability]}", made.machine)
    # A part of 64 x 16 keys among 8 warps leaves 8 bytes a thread.
    share = arguments["BLOCK_N"] * arguments["D2"] * 16 // (32 * arguments["num_warps"])
    assert made.copies and min(made.copies) == min(share or 128, 128), made
    assert max(made.stores) == 128


@pytest.mark.parametrize(("capability", "shape", "dtype"), targets(FEW))
def test_flash_attn_of_few_keys_compiles(capability, shape, dtype, monkeypatch):
    if shape[1] * shape[2] > RESIDENT[max(key for key in RESIDENT if key <= capability)]:
        pytest.skip("these keys do not fit this chip; the kernel for long sequences takes them")
    module = flash_attn_few_keys_triton
    like = {"dtype": dtype, "causal": shape[0] == 77}
    kernel, arguments = launched(monkeypatch, module, "_few_keys_kernel", capability, shape, **like)
    made = examined(kernel, capability, arguments)
    assert re.search(rf"\b{TENSOR_CORES[capability]}", made.machine)
    assert {*made.loads, *made.copies} >= {128} and max(made.stores) == 128, made


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("size", [40, 64, 80, 96, 128, 160])
def test_flash_attn_in_fp32_compiles(size, capability, monkeypatch):
    """Without tensor cores: products are exact."""
    shape, like = (256, 200, size), {"dtype": torch.float32}
    kernel, arguments = launched(monkeypatch, flash_attn_triton, "_flash_attn_kernel", capability, shape, **like)
    made = examined(kernel, capability, arguments)
    assert arguments["PRECISION"] == "ieee" and not re.search(r"\b\w+MMA\.", made.machine)


@pytest.mark.parametrize(
    "capability", [pytest.param(c, marks=() if c == 90 else pytest.mark.slow) for c in CAPABILITIES]
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_the_softmax_of_wide_heads_compiles(dtype, capability, monkeypatch):
    module, shape = flash_attn_wide_triton, (64, 4096, 512)
    kernel, arguments = launched(monkeypatch, module, "_softmax_kernel", capability, shape, dtype=dtype)
    examined(kernel, capability, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 64, 80, 96, 128, 160])
def test_flash_attn_compiles_for_amd(size, monkeypatch):
    """gfx942 takes the rows of sm_80; its 64 KiB of local memory hold them. Compiled, never run."""
    target = triton.backends.compiler.GPUTarget("hip", "gfx942", 64)
    shape, like = (1024, 1000, size), {"dtype": torch.float16}
    kernel, arguments = launched(monkeypatch, flash_attn_triton, "_flash_attn_kernel", 80, shape, **like)
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
