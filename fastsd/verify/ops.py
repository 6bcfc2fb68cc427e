"""Every op, on the arguments that the model calls it with, against its specification in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastsd.kernels import dispatch
from fastsd.kernels.linear import linear_ref
from fastsd.verify.rule import CheckResult, Clock, Tensors, exact_arithmetic, judge, note_out_of_memory
from fastsd.verify.watch import Call, has_kernel, observed

ROWS = 1024  # of a head's scores that are in memory at a time


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


def truth(call: Call) -> Tensors:
    """The outputs of the specification in float64. Attention runs head by head, since all scores would not fit."""
    arguments = call.widened()
    with exact_arithmetic():
        if call.op.name != "flash_attn":
            return call.run(arguments)
        samples = []
        for b in range(len(arguments["q"])):
            parts = {name: arguments[name][b : b + 1].split(1, dim=2) for name in ("q", "k", "v")}
            heads = [arguments | dict(zip(parts, head)) for head in zip(*parts.values())]
            samples.append(torch.cat([call.op.run(**head) for head in heads], dim=-1))
        return (torch.cat(samples),)


def order_slack(call: Call) -> float:
    """The expected difference between two orders of the same fp32 sums: sqrt(K) u max(|x| |w|), for sums of K products
    and u = 2^-24 (Higham and Mary 2019, theorem 2.4, with lambda = 1).

    PyTorch's order is one of many, and sometimes an exceptionally accurate one. In 16 bits, the rounding of the output
    exceeds this difference.
    """
    if call.op.name == "flash_attn":
        return _attention_slack(call)
    weight = call.arguments.get("weight")
    if weight is None or weight.ndim < 2 or weight.dtype != torch.float32:
        return 0.0
    values = call.widened()
    magnitudes = {name: x.abs() if isinstance(x, torch.Tensor) else x for name, x in values.items()}
    if call.op.name == "geglu":  # the error of each factor times the other factor; GELU's slope is at most 1.13
        value, gate = linear_ref(values["x"], values["weight"], values["bias"]).abs().chunk(2, dim=-1)
        sums, gate_sums = linear_ref(magnitudes["x"], magnitudes["weight"], magnitudes["bias"]).chunk(2, dim=-1)
        sums = sums * gate + 1.13 * value * gate_sums
    else:
        linear_only = {"activation": "none"} if "activation" in magnitudes else {}
        with exact_arithmetic():
            (sums,) = call.run(magnitudes | linear_only)
    return math.prod(weight.shape[1:]) ** 0.5 * 2.0**-24 * sums.abs().max().item()


def _attention_slack(call: Call) -> float:
    """`order_slack` of attention, for T products a result, the sum of T weights, and the D products of each logit.

    Weights have one sign, so partial sums of p v are within the result and its spread, sqrt(sum (p v)^2). An error e of
    a logit moves the result by p (v - result) e; those of different keys are independent.
    """
    if call.arguments["q"].dtype != torch.float32:
        return 0.0
    values, unit, worst = call.widened(), 2.0**-24, 0.0
    length = values["key_length"]
    for q, k, v in zip(*(values[name].transpose(1, 2).flatten(0, 1) for name in ("q", "k", "v"))):  # [S or T, D]
        k, v, scale = k[:length], v[:length], q.shape[-1] ** -0.5
        for start in range(0, len(q), ROWS):
            rows = q[start : start + ROWS]
            logits = rows @ k.T * scale
            if values["causal"]:
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1 + start), -torch.inf)
            weights = logits.softmax(-1)
            result, spread = weights @ v, (weights.square() @ v.square()).sqrt()
            sums = 2 * len(k) ** 0.5 * unit * (result.abs() + spread)
            variances = (weights * (rows.abs() @ k.abs().T)).square() * (q.shape[-1] ** 0.5 * scale * unit) ** 2
            moved = variances @ v.square() - 2 * result * (variances @ v)
            moved += result.square() * variances.sum(-1, keepdim=True)
            worst = max(worst, (sums + moved.clamp(min=0).sqrt()).max().item())
    return worst


def backend_of(call: Call) -> str:
    """The name of the backend that runs `call`."""
    tensors = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
    name = dispatch.backend(*tensors, op=call.op.name)
    return "torch" if name == "triton" and not has_kernel(call.op.name) else name
