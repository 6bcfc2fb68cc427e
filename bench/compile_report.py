"""The machine code of every launch at Stable Diffusion's shapes, for every architecture, without a GPU.

    python -m bench.compile_report             print the table
    python -m bench.compile_report --write     also write it to docs/compile_report.txt
    python -m bench.compile_report --sm 90     print the rows of one architecture
    python -m bench.compile_report --models    what the models launch, a row for each kernel;
                                               --write: to docs/kernels.md; --triton FOLDER: another version too

Launchers are called with tensors on the meta device, and their launches are compiled instead of run. The counts are
those of the innermost loop with the most products, or, without products, with the most loads; without a loop, those of
the whole kernel. The bound is predicted from the issue slots, tensor cores, exponentials and memory bandwidth of one
warp's share of a multiprocessor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from bench.compiled import SHARED
from bench.dryrun import compile_table
from bench.intercept import KernelLaunch
from bench.kernel_calls import launches
from bench.machine_code import Loop, main_loop

REPORT = Path(__file__).parent.parent / "docs" / "compile_report.txt"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Per multiprocessor and clock: FLOP of dense 16-bit products with fp32 sums, bytes of memory. From the data sheets of
# T4, A100, RTX 3090, RTX 4090, H100 SXM, B200 and RTX 5090, at their boost clocks.
TENSOR = {75: 1024, 80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
MEMORY = {75: 5.0, 80: 13.4, 86: 6.7, 89: 3.1, 90: 14.5, 100: 29.2, 120: 4.4}
EXPONENTIALS = 16  # per multiprocessor and clock, on all of them
PARTS = 4  # partitions of a multiprocessor; each issues one warp instruction per clock


def bound(loop: Loop, capability: int) -> str:
    """The unit that limits an iteration of the loop, by the clocks that one warp's share takes of each unit.

    Memory counts only without products: attention reads its keys repeatedly from the cache.
    """
    clocks = {"issue": float(loop.instructions), "exp": loop.exponentials * 32 * PARTS / EXPONENTIALS}
    if loop.products and loop.flop is not None:
        clocks["tensor"] = loop.flop * PARTS / TENSOR[capability]
    elif not loop.products:
        clocks["memory"] = loop.bytes * PARTS / MEMORY[capability]
    name = max(clocks, key=lambda unit: clocks[unit])
    return f"{name} {clocks[name]:.0f}"


HEAD = " sm dtype launch" + " " * 46 + "regs spill shared  loop  mma  exp  bound"


def line(launch: KernelLaunch, capability: int, dtype: str) -> str:
    """One row of the report."""
    code = launch.compiled(capability)
    loop = main_loop(code.machine)
    return (
        f"{capability:>3} {dtype:5} {launch.case:50} {code.registers:>4} {code.spills:>5} {code.shared:>6} "
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
    """The version of Triton, and the columns."""
    return (
        f"Triton {triton.__version__}. Compiled, not run. regs: per thread; spill: bytes per thread; shared: bytes.\n"
        "Per warp and iteration of the main loop: instructions, tensor core products, exponentials;\n"
        f"bound: predicted, with its clocks.\n{HEAD}"
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, choices=sorted(SHARED), help="this architecture only")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}; with --models, docs/kernels.md")
    parser.add_argument("--models", action="store_true", help="instead what the models launch, by kernel")
    parser.add_argument(
        "--triton", action="append", type=Path, default=[], metavar="FOLDER",
        help="with --models: also under the version that `pip install --target FOLDER triton==...` put there",
    )  # fmt: skip
    arguments = parser.parse_args(given)
    if arguments.write and arguments.sm:
        parser.error("--write keeps all architectures; leave --sm out")
    if arguments.triton and not arguments.models:
        parser.error("--triton is for --models")
    for folder in arguments.triton:
        if not (folder / "triton" / "__init__.py").is_file():
            parser.error(f"--triton: there is no Triton in {folder}; pip install --no-deps --target puts it there")
    if arguments.models:
        found = compile_table.compile_models((arguments.sm,) if arguments.sm else SHARED, arguments.triton)
        if arguments.write:
            page = compile_table.PAGE.read_text(encoding="utf-8")
            new = compile_table.written(page, compile_table.markdown(found))
            compile_table.PAGE.write_text(new, encoding="utf-8")
        return
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
