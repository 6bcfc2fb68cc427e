"""What the compiler makes of the launches that dry runs meet, under the Triton that comes first on the path.

python -m bench.compile_report --models     what this finds, as a table (`bench.dryrun.compile_table`)
python -m bench.dryrun.compiles FILE SM     of a file that `launches.dumps` wrote: `CompiledLaunches` as JSON
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from bench.compiled import SHARED
from bench.dryrun.launches import loads
from bench.intercept import KernelLaunch
from bench.machine_code import spills_in_a_loop

ROOT = Path(__file__).parents[2]
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
        made = launch.compiled(sm)
    except Exception as error:  # of any kind: the compiler's own, and those of the tools that it calls
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or ["no message"])[-1]
        return CodeSize(error=f"{type(error).__name__}: {reason}")
    return CodeSize(
        made.registers, made.spills, made.shared, looped=bool(made.spills) and spills_in_a_loop(made.machine)
    )


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


@dataclass(frozen=True)
class KernelSizes:
    """What launches of a kernel take: how many there are, and the most of each over them."""

    launches: int
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class CompiledLaunches:
    """What a version of Triton makes of the launches for an architecture: by kernel, and what is wrong."""

    triton: str
    sm: int
    kernels: dict[str, KernelSizes]
    wrong: tuple[str, ...]

    def text(self) -> str:
        """As JSON, in a line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> CompiledLaunches:
        """What `text` wrote."""
        stored = json.loads(text)
        kernels = {name: KernelSizes(**sizes) for name, sizes in stored["kernels"].items()}
        return cls(stored["triton"], stored["sm"], kernels, tuple(stored["wrong"]))

    def rows(self) -> Iterator[str]:
        """A row for each kernel; then the launches that are not as they should be."""
        for kernel, of in sorted(self.kernels.items()):
            sizes = f"{of.launches:>9} {of.registers:>5} {of.spills:>6} {of.shared:>7} {SHARED[self.sm]:>7}"
            yield f"{self.triton:6} {self.sm:>3} {kernel:24} {sizes}"
        yield from (f"{self.triton:6} {self.sm:>3} ! {problem}" for problem in self.wrong)


HEAD = "Triton  sm kernel                    launches  regs  spill  shared   limit"


def summary(found: list[KernelLaunch], sm: int) -> CompiledLaunches:
    """Compile launches for sm_`sm` with this process's Triton."""
    sizes = compile_all(found, sm)
    by_kernel: defaultdict[str, list[CodeSize]] = defaultdict(list)
    for launch, size in zip(found, sizes):
        by_kernel[launch.kernel.fn.__name__.strip("_").removesuffix("_kernel")].append(size)
    kernels = {}
    for kernel, made in by_kernel.items():
        most = (max(getattr(size, name) for size in made) for name in ("registers", "spills", "shared"))
        kernels[kernel] = KernelSizes(len(made), *most)
    problems = (wrong(launch, size, sm) for launch, size in zip(found, sizes))
    return CompiledLaunches(triton.__version__, sm, kernels, tuple(filter(None, problems)))


def by_version(folder: Path | None, file: Path, sm: int) -> CompiledLaunches:
    """Compile the launches of a file (`bench.dryrun.launches.dumps`) in a process of its own.

    Args:
        folder: where another version of Triton is (`pip install --target`); None: the installed one.
    """
    path = [*([] if folder is None else [str(folder)]), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.dryrun.compiles", str(file), str(sm)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return CompiledLaunches.read(done.stdout.splitlines()[-1])


def main(file: str, sm: str) -> None:
    print(summary(loads(Path(file).read_bytes()), int(sm)).text())


if __name__ == "__main__":
    main(*sys.argv[1:])
