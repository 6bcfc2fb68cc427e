"""Every op, on the arguments that the model calls it with, against its specification in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.choice.call import Call
from fastsd.kernels.choice.faults import device_is_lost, reason_of
from fastsd.kernels.choice.op import GPU_OPS, Way
from fastsd.kernels.choice.rule import CheckResult, Clock, Tensors, judge, note_out_of_memory
from fastsd.kernels.choice.truth import order_slack, truth
from fastsd.verify.watch import has_kernel, observed


def check_ops(run: Callable[[], Any], clock: Clock | None, level: str = "op") -> list[CheckResult]:
    """Execute `run`, and check every op at its first call with each set of shapes.

    Args:
        run: any function that runs models.
        clock: takes the times; None takes none.
        level: of the results.

    Returns:
        A result for each set of shapes, and on a GPU one for each candidate beside it, sorted by op.
    """
    results: dict[tuple[Any, ...], list[CheckResult]] = {}
    counts: Counter[tuple[Any, ...]] = Counter()

    def on_call(call: Call) -> None:
        if not counts[call.key]:
            results[call.key] = [check_op(call, clock, level), *check_candidates(call, clock, level)]
        counts[call.key] += 1

    with observed(on_call):
        run()
    counted = [replace(result, calls=counts[key]) for key, several in results.items() for result in several]
    return sorted(counted, key=lambda result: result.name)


def check_op(call: Call, clock: Clock | None, level: str = "op") -> CheckResult:
    """Check one op: fast path and PyTorch in the same dtype, both against the specification in float64."""
    unjudged = CheckResult(level, call.op.name, call.shape, backend_of(call))

    def check() -> CheckResult:
        result = judge_of(call, unjudged)(call.run())
        if clock is None:
            return result
        seconds, torch_seconds = clock([call.run, lambda: run_on_torch(call)])
        return replace(result, seconds=seconds, torch_seconds=torch_seconds)

    return note_out_of_memory(unjudged, check)


def check_candidates(call: Call, clock: Clock | None, level: str = "op") -> list[CheckResult]:
    """Check each candidate of an op on a GPU, where there are several, whichever was chosen. One that does not take the
    call is left out; a library's refusal is not judged."""
    op = GPU_OPS.get(call.op.name)
    if op is None or len(op.candidates) < 2 or backend_of(call) != "triton":
        return []
    results = []
    for candidate in op.candidates:
        name = f"{op.name} [{candidate.name}]"
        try:
            with candidates.only(op.name, Way(candidate)):
                results.append(replace(check_op(call, clock, level), name=name))
        except FastsdError:
            continue
        except Exception as error:
            if device_is_lost(error):
                raise
            passed = None if candidate.measured else False
            unjudged = CheckResult(level, name, call.shape, backend_of(call))
            results.append(replace(unjudged, passed=passed, note=reason_of(error)))
    return results


def judge_of(call: Call, unjudged: CheckResult | None = None) -> Callable[[Tensors], CheckResult]:
    """A function that judges outputs of `call` by the rule. The truth is computed once, here."""
    unjudged = unjudged or CheckResult("op", call.op.name, call.shape)
    same_dtype, exact, slack = run_on_torch(call), truth(call), order_slack(call)
    return lambda outputs: judge(unjudged, outputs, same_dtype, exact, slack)


def run_on_torch(call: Call) -> Tensors:
    """The outputs of PyTorch's own operations in the same dtype."""
    with dispatch.forced("torch"):
        return call.run()


def backend_of(call: Call) -> str:
    """The name of the backend that runs `call`."""
    tensors = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
    name = dispatch.backend(*tensors, op=call.op.name)
    return "torch" if name == "triton" and not has_kernel(call.op.name) else name
