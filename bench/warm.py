"""Compile every launch of our kernels for a GPU, on all cores, into Triton's cache, without touching the GPU.

    python -m bench.warm --sm 90 [--seconds 60] [--first 10]

What the models launch is found on tensors that have shapes but no memory. Each launch goes through Triton's own
`warmup`, so that a process which launches it finds it compiled. Prints the launches that do not compile. Exit code 1:
there are some.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.compile_report import KernelLaunch

LAUNCHES: list[KernelLaunch] = []  # what forked processes find here: kernels cannot be sent to them


class CompilerDriver:
    """What Triton asks of a driver to compile for a GPU; it launches nothing."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


def warm(launch: KernelLaunch) -> Any:
    """Compile a launch as Triton does when it is made; the compiled kernel."""
    arguments = dict(launch.arguments)
    positional = [arguments.pop(parameter.name) for parameter in launch.kernel.params]
    return launch.kernel.warmup(*positional, grid=(1,), **arguments)


def problem_of(i: int) -> str | None:
    """Why a launch does not compile, in one line."""
    launch = LAUNCHES[i]
    try:
        warm(launch)
    except Exception as error:  # of any kind: the compiler's own, and those of the tools that it calls
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"{launch.case}: {type(error).__name__}: {(str(cause).strip().splitlines() or [''])[-1][:200]}"
    return None


def warm_all(
    launches: list[KernelLaunch], sm: int, seconds: float, say: Callable[[str], None] = print
) -> tuple[int, int]:
    """Compile launches in one process a core, within `seconds`; the counts of those done and of those that failed."""
    LAUNCHES[:] = launches
    driver.set_active(CompilerDriver(sm))  # the processes that are forked have it
    end, done, failed = time.monotonic() + seconds, 0, 0
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        answers = pool.imap_unordered(problem_of, range(len(launches)))
        while done < len(launches):
            try:
                problem = answers.next(timeout=max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            done += 1
            if problem is not None:
                failed += 1
                say(problem)
    return done, failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, required=True, help="the compute capability, as 90")
    parser.add_argument("--seconds", type=float, default=600.0, help="the rest is compiled at its first use")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N launches")
    options = parser.parse_args(arguments)
    from tests.support.launches import launches  # traces the models, which takes seconds

    began = time.monotonic()
    found = launches(options.sm)[: options.first]
    done, failed = warm_all(found, options.sm, options.seconds)
    text = f"{done - failed} of {len(found)} launches compiled for sm_{options.sm}, {failed} failed"
    print(f"{text} ({time.monotonic() - began:.0f} s, {len(os.sched_getaffinity(0))} cores)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
