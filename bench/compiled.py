"""Kernels compiled without a GPU, and properties of their machine code: registers, spills, shared memory, widths."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsd.kernels.launch import OPTIONS

BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
SHARED = {
    75: 65536,
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}  # bytes available to a block
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Unaligned:
    """A pointer that is no multiple of 16 bytes. One that is, is its dtype alone."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Compiled:
    """Machine code and its properties.

    Attributes:
        registers: per thread. spills: bytes of local memory per thread. shared: bytes of shared memory.
        binary: the cubin, disassembled only when its code is asked for.
    """

    registers: int
    spills: int
    shared: int
    binary: bytes = field(repr=False)

    @functools.cached_property
    def machine(self) -> str:
        """The code itself."""
        return _run("nvdisasm", self.binary, "-c")

    @property
    def loads(self) -> tuple[int, ...]:
        """Bits of each load from memory."""
        return _widths("LDG", self.machine)

    @property
    def stores(self) -> tuple[int, ...]:
        """Bits of each store to memory."""
        return _widths("STG", self.machine)

    @property
    def copies(self) -> tuple[int, ...]:
        """Bits of each copy from memory to shared memory."""
        return _widths("LDGSTS", self.machine)


def compile_kernel(kernel: Any, capability: int, warps: int, arguments: Mapping[str, Any], **options: Any) -> Compiled:
    """Compile for sm_`capability` as a launch with these arguments would.

    Args:
        arguments: for each parameter a torch dtype (a pointer, 16-byte aligned), `Unaligned`, a tensor descriptor, an
            int or float (typed and specialised as by Triton: 1 becomes a constant, a multiple of 16 is marked as one),
            None, or the value of a constexpr.
        options: further compiler options (num_stages, maxnreg).
    """
    source = source_of(kernel, arguments)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, **options, **OPTIONS})
    cubin = binary.asm["cubin"]
    usage = _run("cuobjdump", cubin, "--dump-resource-usage")
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert counts is not None, usage
    return Compiled(int(counts[1]), int(counts[2]) + int(counts[3]), binary.metadata.shared, cubin)


def source_of(kernel: Any, arguments: Mapping[str, Any]) -> ASTSource:
    """The source that Triton compiles for a launch with these arguments, see `compile_kernel`."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.dtype):
            signature[parameter.name] = "*" + TYPES[value]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, Unaligned):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _widths(instruction: str, machine: str) -> tuple[int, ...]:
    suffixes = re.findall(rf"\b{instruction}\.E((?:\.\w+)*)", machine)
    return tuple(int((re.search(r"\.[US]?(8|16|64|128)\b", suffix) or ["", "32"])[1]) for suffix in suffixes)


def _run(tool: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(BINARIES, tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
