"""Compile what our kernels launch on a GPU, on all cores, into Triton's cache, without touching the GPU.

    python -m bench.warm --sm 90 [--seconds 60] [--first 10]

What the models launch, by every way that a first use would try, is found on tensors that have shapes but no memory.
Each launch goes through Triton's own `warmup`, so that a process which makes it finds it compiled. Prints the launches
that do not compile. Exit code 1: there are some.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.intercept import KernelLaunch, intercepted_launches
from bench.model_calls import ChannelsLast, encoders, steps, unets
from bench.options import above_zero, count
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.op import GpuOp, Key

OLDEST = 10 * dispatch.OLDEST_GPU[0] + dispatch.OLDEST_GPU[1]
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


def every_launch(sm: int, fp8: bool = False) -> list[KernelLaunch]:
    """Each launch of every way of each op of the models and of the sampler's step, once; `fp8`: of UNets in fp8 too."""
    found: dict[str, KernelLaunch] = {}
    tried: set[tuple[str, Key]] = set()

    def tell(of: str, kernel: Any, arguments: dict[str, Any]) -> None:
        launch = KernelLaunch(f"{of}: {kernel.fn.__name__}", kernel, arguments)
        found.setdefault(compiler_key(kernel, arguments), launch)

    def every_way(op: GpuOp, *args: Any) -> Any:
        place = op.name, op.key_of(args)
        ways = [] if place in tried else decide.ways_of(list(decide.taking(op, args)), args, thorough=False)
        tried.add(place)
        for way in ways:
            with contextlib.suppress(Exception):  # a library's op has no answer for such tensors
                way.run(op.copied(args))
        return op.own.run(args)

    with (
        patch.object(candidates, "run", every_way),
        patch.object(dispatch, "fall_back", lambda op, reason: None),  # a refusal is no error here
        dispatch.forced("triton"),
        torch.no_grad(),
        ChannelsLast(),
    ):
        for of, call in (*unets(), *(unets(fp8=True) if fp8 else ()), *encoders(), *steps()):
            with intercepted_launches(sm, functools.partial(tell, of)):
                call()
    return list(found.values())


def compiler_key(kernel: Any, arguments: dict[str, Any]) -> str:
    """Equal for launches that are the same to the compiler: numbers differ by their type, 1, and multiples of 16."""
    parameters = {parameter.name: parameter for parameter in kernel.params}
    parts = [kernel.fn.__qualname__]
    for name, value in sorted(arguments.items()):
        parameter, base = parameters.get(name), getattr(value, "base", None)
        if base is not None:  # a tensor descriptor
            value = (base.dtype, *value.block_shape)
        elif parameter is not None and not parameter.is_constexpr and type(value) in (int, float):
            number = "float" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            special = isinstance(value, int) and not parameter.do_not_specialize
            value = (number, value == 1, value % 16 == 0) if special else number
        parts.append(f"{name}={value}")
    return " ".join(parts)


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
    parser.add_argument("--seconds", type=above_zero, default=600.0, help="the rest is compiled at its first use")
    parser.add_argument("--first", type=count, metavar="N", help="only the first N launches")
    options = parser.parse_args(arguments)
    if options.sm < OLDEST:
        parser.error(f"argument --sm: {options.sm}; the kernels need {OLDEST} or newer")
    began = time.monotonic()
    found = every_launch(options.sm)[: options.first]
    done, failed = warm_all(found, options.sm, options.seconds)
    text = f"{done - failed} of {len(found)} launches compiled for sm_{options.sm}, {failed} failed"
    print(f"{text} ({time.monotonic() - began:.0f} s, {len(os.sched_getaffinity(0))} cores)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
