"""Every op, on the arguments that the model calls it with, against its specification in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastsd.kernels import dispatch
from fastsd.kernels.choice.call import Call
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
        A result for each set of shapes, sorted by op.
    """
    results: dict[tuple[Any, ...], CheckResult] = {}
    counts: Counter[tuple[Any, ...]] = Counter()

    def on_call(call: Call) -> None:
        if not counts[call.key]:
            results[call.key] = check_op(call, clock, level)
        counts[call.key] += 1

    with observed(on_call):
        run()
    counted = [replace(result, calls=counts[key]) for key, result in results.items()]
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
