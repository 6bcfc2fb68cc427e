"""What the compiler makes of the launches that dry runs meet, under the Triton that comes first on the path.

python -m bench.compile_report --models [--sm 90]    a row for each kernel
python -m bench.dryrun.compiles FILE SM              of a file that `bench.dryrun.launches.dumps` wrote; as JSON:
                                                     Triton's version, how many were compiled, what is wrong
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from bench import compile_report
from bench.compile_report import KernelLaunch
from bench.compiled import SHARED
from bench.dryrun.launches import launches, loads

EVERY: list[KernelLaunch] = []  # what processes that are forked from this one find here: kernels cannot be sent to them


@dataclass(frozen=True)
class CodeSize:
    """A compiled launch: registers and bytes spilled of a thread, bytes of shared memory; or why there is none.

    looped: a loop reads or writes what was spilled. A number that is kept in memory from one loop to the next costs
    nothing.
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""
    looped: bool = False


def size_of(launch: KernelLaunch, sm: int) -> CodeSize:
    """Compile a launch for sm_`sm`."""
    try:
        made = compile_report.compiled(launch, sm)
    except Exception as error:  # of any kind: the compiler's own, and those of the tools that it calls
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or ["no message"])[-1]
        return CodeSize(error=f"{type(error).__name__}: {reason}")
    return CodeSize(
        made.registers, made.spills, made.shared, looped=bool(made.spills) and spills_in_a_loop(made.machine)
    )


def spills_in_a_loop(machine: str) -> bool:
    """Whether local memory is accessed between a label and a later branch to it."""
    labels: dict[str, int] = {}
    accesses: list[int] = []
    for i, line in enumerate(machine.splitlines()):
        label = compile_report.LABEL.match(line)
        target = re.search(r"\bBRA[.\w]* .*`\((\.L_\w+)\)", line)
        if label:
            labels[label[1]] = i
        elif re.search(r"\b(?:LDL|STL)\b", line):
            accesses.append(i)
        elif target and any(labels.get(target[1], i) < access for access in accesses):
            return True
    return False


def wrong(launch: KernelLaunch, size: CodeSize, sm: int) -> str | None:
    """Why this launch is not as it should be."""
    if size.error:
        return f"{launch.case}: {size.error}"
    # Exact fp32 attention has no tensor cores to wait for: there the assembler may prefer one more program, and keep a
    # number or two in memory outside the loop.
    spills = size.looped and launch.arguments.get("q_ptr") != torch.float32
    if spills or size.shared > SHARED[sm]:
        return f"{launch.case}: {size.spills} bytes spilled, {size.shared} of {SHARED[sm]} bytes of shared memory"
    return None


def _size_of(job: tuple[int, int]) -> CodeSize:
    return size_of(EVERY[job[0]], job[1])


def compile_all(found: list[KernelLaunch], sm: int) -> list[CodeSize]:
    """Compile launches for sm_`sm`, on all cores."""
    EVERY[:] = found
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(_size_of, [(i, sm) for i in range(len(found))], chunksize=1)


HEAD = " sm kernel                          launches  regs  spill  shared   limit"


def rows(sm: int) -> Iterator[str]:
    """Of each kernel that the models launch on sm_`sm`: how many launches, and the most that any of them takes; then
    the launches that are not as they should be."""
    found = launches(sm)
    sizes = compile_all(found, sm)
    by_kernel: defaultdict[str, list[CodeSize]] = defaultdict(list)
    for launch, size in zip(found, sizes):
        by_kernel[launch.kernel.fn.__name__.strip("_").removesuffix("_kernel")].append(size)
    for kernel, made in sorted(by_kernel.items()):
        most = (max(getattr(size, name) for size in made) for name in ("registers", "spills", "shared"))
        registers, spills, shared = most
        yield f"{sm:>3} {kernel:30} {len(made):>9} {registers:>5} {spills:>6} {shared:>7} {SHARED[sm]:>7}"
    yield from (f"{sm:>3} ! {problem}" for problem in map(wrong, found, sizes, [sm] * len(found)) if problem)


def main(file: str, sm: str) -> None:
    found = loads(Path(file).read_bytes())
    sizes = compile_all(found, int(sm))
    problems = [problem for launch, size in zip(found, sizes) if (problem := wrong(launch, size, int(sm)))]
    print(json.dumps({"triton": triton.__version__, "compiled": len(sizes), "wrong": problems}))


if __name__ == "__main__":
    main(*sys.argv[1:])
