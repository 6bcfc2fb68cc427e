"""Kernels compiled without a GPU, and properties of their machine code: registers, spills, shared memory, widths."""

from __future__ import annotations

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
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64"}


@dataclass(frozen=True)
class Compiled:
    """Machine code and its properties.

    Attributes:
        registers: per thread. spills: bytes of local memory per thread. shared: bytes of shared memory.
        loads, stores, copies: bits of each access; copies are from global to shared memory.
        machine: the disassembled code.
    """

    registers: int
    spills: int
    shared: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    copies: tuple[int, ...]
    machine: str = field(repr=False)


def compile_kernel(kernel: Any, capability: int, warps: int, arguments: Mapping[str, Any], **options: Any) -> Compiled:
    """Compile for sm_`capability` as a launch with these arguments would.

    Args:
        arguments: for each parameter a torch dtype (a pointer, 16-byte aligned), an int or float (typed and specialised
            as by Triton: 1 becomes a constant, a multiple of 16 is marked as one), None, or the value of a constexpr.
        options: further compiler options (num_stages, maxnreg).
    """
    source = source_of(kernel, arguments)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, **options, **OPTIONS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        machine = _run("nvdisasm", "-c", file.name)
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert counts is not None, usage
    return Compiled(
        registers=int(counts[1]),
        spills=int(counts[2]) + int(counts[3]),
        shared=binary.metadata.shared,
        loads=_widths("LDG", machine),
        stores=_widths("STG", machine),
        copies=_widths("LDGSTS", machine),
        machine=machine,
    )


def source_of(kernel: Any, arguments: Mapping[str, Any]) -> ASTSource:
    """The source that Triton compiles for a launch with these arguments, see `compile_kernel`."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.dtype):
            signature[parameter.name] = "*" + TYPES[value]
            attributes[(i,)] = [["tt.divisibility", 16]]
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


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(BINARIES, tool), *arguments], capture_output=True, text=True, check=True).stdout
