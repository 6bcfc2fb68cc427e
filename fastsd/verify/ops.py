"""Every op at the model's own shapes and values, against its specification in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastsd.kernels import dispatch
from fastsd.kernels.linear import linear_ref
from fastsd.verify.rule import Clock, Row, Tensors, attempted, exactly, judged
from fastsd.verify.watch import Call, has_kernel, watched


def check_ops(run: Callable[[], Any], clock: Clock | None, level: str = "op") -> list[Row]:
    """Do `run`, and compare every op at the first call with each set of shapes.

    Args:
        run: anything that runs models.
        clock: for the times; None takes none.
        level: of the rows.

    Returns:
        A row for each set of shapes, by op.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    calls: Counter[tuple[Any, ...]] = Counter()

    def see(call: Call) -> None:
        if not calls[call.key]:
            rows[call.key] = check_op(call, clock, level)
        calls[call.key] += 1

    with watched(see):
        run()
    found = [replace(row, calls=calls[key]) for key, row in rows.items()]
    return sorted(found, key=lambda row: row.name)


def check_op(call: Call, clock: Clock | None, level: str = "op") -> Row:
    """One op by the rule: fast path and PyTorch in the same dtype against the specification in float64."""
    row = Row(level, call.op.name, call.shape, backend_of(call))

    def work() -> Row:
        found = compared(call, row)(call.run())
        if clock is None:
            return found
        seconds, torch_seconds = clock([call.run, lambda: plain(call)])
        return replace(found, seconds=seconds, torch_seconds=torch_seconds)

    return attempted(row, work)


def compared(call: Call, row: Row | None = None) -> Callable[[Tensors], Row]:
    """The judge of results of `call`: `row`, or one of its own, with the verdict. Truth is worked out once."""
    row = row or Row("op", call.op.name, call.shape)
    same_dtype, exact, slack = plain(call), truth(call), order_slack(call)
    return lambda results: judged(row, results, same_dtype, exact, slack)


def plain(call: Call) -> Tensors:
    """What PyTorch's own operations give in the same dtype."""
    with dispatch.forced("torch"):
        return call.run()


def truth(call: Call) -> Tensors:
    """The specification in float64. Attention goes head by head: all scores at once would not fit."""
    arguments = call.widened()
    with exactly():
        if call.op.name != "flash_attn":
            return call.run(arguments)
        images = []
        for b in range(len(arguments["q"])):
            parts = {name: arguments[name][b : b + 1].split(1, dim=2) for name in ("q", "k", "v")}
            heads = [arguments | dict(zip(parts, head)) for head in zip(*parts.values())]
            images.append(torch.cat([call.op.run(**head) for head in heads], dim=-1))
        return (torch.cat(images),)


def order_slack(call: Call) -> float:
    """How far apart two orders of the same fp32 sums can be expected to come out: sqrt(K) u max(|x| |w|) (Higham and
    Mary 2019, theorem 2.4, with lambda = 1), for K products a sum and u = 2^-24.

    PyTorch's order is one of many, and at times a lucky one. In 16 bit the rounding of the result hides all this.
    """
    weight = call.arguments.get("weight")
    if weight is None or weight.ndim < 2 or weight.dtype != torch.float32:
        return 0.0
    values = call.widened()
    magnitudes = {name: x.abs() if isinstance(x, torch.Tensor) else x for name, x in values.items()}
    if call.op.name == "geglu":  # the error of each factor times the other; GELU's slope is at most 1.13
        value, gate = linear_ref(values["x"], values["weight"], values["bias"]).abs().chunk(2, dim=-1)
        sums, gate_sums = linear_ref(magnitudes["x"], magnitudes["weight"], magnitudes["bias"]).chunk(2, dim=-1)
        sums = sums * gate + 1.13 * value * gate_sums
    else:
        plain = {"activation": "none"} if "activation" in magnitudes else {}
        with exactly():
            (sums,) = call.run(magnitudes | plain)
    return math.prod(weight.shape[1:]) ** 0.5 * 2.0**-24 * sums.abs().max().item()


def backend_of(call: Call) -> str:
    """The name of the backend that runs the call."""
    tensors = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
    name = dispatch.backend(*tensors)
    return "torch" if name == "triton" and not has_kernel(call.op.name) else name
