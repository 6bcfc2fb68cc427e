"""What every kernel compiles to at every row of the launch tables, without a GPU.

    python -m bench.compile_report             print the table
    python -m bench.compile_report --write     and keep it in docs/compile_report.txt
    python -m bench.compile_report --sm 90     one architecture only (printed, never kept)

Launchers are called with tensors that have shapes but no memory, and what they would launch is compiled instead. The
counts are those of the innermost loop with the most products, or without products the most loads; where there is no
loop, of the whole kernel. The bound is predicted from issue slots, tensor cores, exponentials and memory of one warp's
share of a multiprocessor; nothing here was run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench.compiled import SHARED, Compiled, compile_kernel
from fastsd.kernels.launch import architecture
from fastsd.kernels.triton import advance as advance_triton
from fastsd.kernels.triton import flash_attn as flash_attn_triton
from fastsd.kernels.triton import flash_attn_few_keys as flash_attn_few_keys_triton
from fastsd.kernels.triton import flash_attn_wide as flash_attn_wide_triton
from fastsd.kernels.triton import geglu as geglu_triton
from fastsd.kernels.triton import groupnorm_silu as groupnorm_silu_triton
from fastsd.kernels.triton import layernorm as layernorm_triton

REPORT = Path(__file__).parent.parent / "docs" / "compile_report.txt"
MODULES = (
    *(advance_triton, flash_attn_few_keys_triton, flash_attn_triton, flash_attn_wide_triton),
    *(geglu_triton, groupnorm_silu_triton, layernorm_triton),
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Of a multiprocessor in a clock: FLOP of dense 16-bit products with fp32 sums, bytes of memory. From the data sheets of
# T4, A100, RTX 3090, RTX 4090, H100 SXM, B200 and RTX 5090, at their boost clocks.
TENSOR = {75: 1024, 80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
MEMORY = {75: 5.0, 80: 13.4, 86: 6.7, 89: 3.1, 90: 14.5, 100: 29.2, 120: 4.4}
EXPONENTIALS = 16  # on all of them
PARTS = 4  # of a multiprocessor, each issuing an instruction of a warp in a clock

GROUPNORM = [  # pixels, channels, of those in the first part
    (64, 1280, 1280),
    (1024, 640, 640),
    (4096, 320, 320),
    (4096, 960, 640),
    (1024 * 1024, 128, 128),
]
ATTENTION = [  # queries, keys, heads, head size
    *((4096, 4096, 8, size) for size in (32, 40, 64)),
    *((1024, 1024, 8, size) for size in (64, 80, 96, 128)),
    (256, 256, 8, 160),
    *((4096, 77, 8, 40), (4096, 77, 10, 64), (1024, 77, 8, 80), (256, 77, 8, 160)),
    (77, 77, 12, 64),
    (4096, 4096, 1, 512),
]


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is launched with: dtypes for tensors, numbers, constants, compiler options."""

    case: str
    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """What one warp does in a turn of a loop: instructions, FLOP of products (None: not told by the code),
    exponentials, bytes read and written."""

    instructions: int
    products: int
    flop: int | None
    exponentials: int
    bytes: int


class _Recorder:
    """Stands for a kernel; tells what it is launched with instead of launching it."""

    def __init__(self, kernel: Any, tell: Callable[[Any, dict[str, Any]], None]) -> None:
        self.kernel, self.tell = kernel, tell

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            given = dict(zip((parameter.name for parameter in self.kernel.params), args)) | options
            self.tell(self.kernel, {name: x.dtype if isinstance(x, torch.Tensor) else x for name, x in given.items()})

        return launch


@contextmanager
def recorded(capability: int, tell: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Inside this context launches are told, not done, and every device is of this compute capability."""
    with ExitStack() as stack:
        of = patch.object(architecture, "of", lambda device: architecture._of_capability(capability))
        stack.enter_context(of)
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(patch.object(module, name, _Recorder(value, tell)))
        yield


def launches(capability: int, dtype: torch.dtype) -> list[Launch]:
    """Every launch of every op at the shapes above, as sm_`capability` would get it, each once."""
    found: dict[str, Launch] = {}

    def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
        like: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        for pixels, channels, first in GROUPNORM:
            x, vector = torch.empty(1, 1, pixels, first, **like), torch.empty(channels, **like)
            skip = torch.empty(1, 1, pixels, channels - first, **like) if first < channels else None
            add = torch.empty(1, channels, **like)
            case = f"groupnorm_silu {pixels}x{first}" + ("" if skip is None else f"+{channels - first}")
            run = groupnorm_silu_triton.groupnorm_silu
            yield case, lambda a=(x, vector, vector, 32, 1e-5, True, add, skip), run=run: run(*a)
        for columns in (320, 768, 1280):
            x, vector = torch.empty(1024, columns, **like), torch.empty(columns, **like)
            run = layernorm_triton.layernorm
            yield f"layernorm {columns}", lambda a=(x, vector, vector, 1e-5, x), run=run: run(*a)
        for columns in (1280, 5120):
            y, vector = torch.empty(1024, 2 * columns, **like), torch.empty(2 * columns, **like)
            yield f"geglu {columns}", lambda a=(y, vector), run=geglu_triton.geglu_gate: run(*a)
        wide = [torch.empty(shape, device="meta") for shape in ((1, 64, 64, 4), (3, 1, 64, 64, 4), (2, 1, 64, 64, 4))]
        state, history, noise = wide
        out, row = torch.empty(2, 64, 64, 4, **like), torch.empty(1, dtype=torch.int64, device="meta")
        table, guidance = torch.empty(31, 16, device="meta"), torch.empty(1, device="meta")
        yield (
            "advance",
            lambda: advance_triton.advance(
                state, torch.empty(1, 64, 64, 4, **like), out, table, row, state, history, noise, guidance
            ),
        )
        for queries, keys, heads, size in ATTENTION if capability >= 80 else []:  # sm_75 takes PyTorch's
            causal = queries == 77
            q = torch.empty(1, queries, 3, heads, size, **like)[:, :, 0]
            k, v = torch.empty(1, keys, 2, heads, size, **like).unbind(2)
            case = f"flash_attn {queries}x{keys}x{size}" + (" causal" if causal else "")
            yield case, lambda a=(q, k, v, causal), run=flash_attn_triton.flash_attn: run(*a)

    for case, call in calls():

        def tell(kernel: Any, arguments: dict[str, Any], case: str = case) -> None:
            kernel_name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
            name = case if kernel_name == case.split()[0] else f"{case}: {kernel_name}"
            found.setdefault(name, Launch(name, kernel, arguments))

        with recorded(capability, tell):
            call()
    return list(found.values())


def compiled(launch: Launch, capability: int) -> Compiled:
    """The launch, compiled for sm_`capability`."""
    arguments = launch.arguments
    options = {name: arguments[name] for name in ("num_stages", "maxnreg") if arguments.get(name)}
    return compile_kernel(launch.kernel, capability, arguments.get("num_warps", 4), arguments, **options)


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);")
LABEL = re.compile(r"^\s*(\.L_\w+):")


def main_loop(machine: str) -> Loop:
    """The loop that the kernel spends its time in, see this file's docstring."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in machine.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction and instruction[1] != "NOP":
            code.append((instruction[1], instruction[2]))
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            # A branch to itself is the end of the program.
            if instruction[1].startswith("BRA") and target and labels.get(target[1], len(code)) < len(code) - 1:
                loops.append((labels[target[1]], len(code)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counted = [counts([name for name, _ in code[start:end]]) for start, end in inner]
    return max(counted, key=lambda loop: (loop.products, loop.bytes)) if counted else counts([name for name, _ in code])


def counts(names: list[str]) -> Loop:
    """The figures of a run of instructions."""
    flop: int | None = 0
    products = moved = 0
    for name in names:
        opcode = name.split(".")[0]
        if opcode in ("HMMA", "HGMMA", "UTCHMMA"):
            products += 1
            each = _flop(name)
            flop = None if flop is None or each is None else flop + each
        elif opcode in ("LDG", "STG", "LDGSTS"):
            width = re.search(r"\.[US]?(8|16|64|128)\b", name)
            moved += 32 * int(width[1] if width else 32) // 8
    return Loop(len(names), products, flop, sum(name.startswith("MUFU.EX2") for name in names), moved)


def _flop(name: str) -> int | None:
    """Of one warp in a product: HMMA.16816 is 16 x 8 x 16; HGMMA.64xNx16 is done by four warps."""
    group = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
    if group:
        return 2 * int(group[1]) * int(group[2]) * int(group[3]) // 4
    sizes = {"HMMA.16816": 2 * 16 * 8 * 16, "HMMA.1688": 2 * 16 * 8 * 8}
    return next((value for start, value in sizes.items() if name.startswith(start)), None)


def bound(loop: Loop, capability: int) -> str:
    """What a turn of the loop waits for, by the clocks that one warp's share takes of each unit.

    Memory counts where there are no products: attention reads its keys again and again from the cache.
    """
    clocks = {"issue": float(loop.instructions), "exp": loop.exponentials * 32 * PARTS / EXPONENTIALS}
    if loop.products and loop.flop is not None:
        clocks["tensor"] = loop.flop * PARTS / TENSOR[capability]
    elif not loop.products:
        clocks["memory"] = loop.bytes * PARTS / MEMORY[capability]
    name = max(clocks, key=lambda unit: clocks[unit])
    return f"{name} {clocks[name]:.0f}"


HEAD = " sm dtype launch" + " " * 46 + "regs spill shared  loop  mma  exp  bound"


def line(launch: Launch, capability: int, dtype: str) -> str:
    """One row of the report."""
    made = compiled(launch, capability)
    loop = main_loop(made.machine)
    return (
        f"{capability:>3} {dtype:5} {launch.case:50} {made.registers:>4} {made.spills:>5} {made.shared:>6} "
        f"{loop.instructions:>5} {loop.products:>4} {loop.exponentials:>4}  {bound(loop, capability)}"
    )


def lines(capability: int) -> Iterator[str]:
    """The rows of one architecture."""
    for name, dtype in DTYPES.items():
        if dtype is torch.bfloat16 and capability < 80:
            continue
        for launch in launches(capability, dtype):
            yield line(launch, capability, name)


def heading() -> str:
    """The versions that the figures belong to, and the columns."""
    return (
        f"Triton {triton.__version__}. Compiled, not run. regs: of a thread; spill: bytes of a thread; shared: bytes.\n"
        "Of one warp in a turn of the main loop: instructions, products on tensor cores, exponentials;\n"
        f"bound: predicted, with the clocks that it takes.\n{HEAD}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, choices=sorted(SHARED), help="this architecture only")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}")
    arguments = parser.parse_args()
    if arguments.write and arguments.sm:
        parser.error("--write keeps all architectures; leave --sm out")
    rows = [heading()]
    print(rows[0])
    for capability in (arguments.sm,) if arguments.sm else SHARED:
        for row in lines(capability):
            print(row, flush=True)
            rows.append(row)
    if arguments.write:
        REPORT.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
