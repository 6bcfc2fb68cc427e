"""What an op should compute: its specification in a higher precision, and how far another order of sums may be off."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastsd.kernels.choice.call import Call
from fastsd.kernels.choice.rule import Tensors, exact_arithmetic

ROWS = 1024  # of a head's scores that are in memory at a time
SCORES = 2**26  # of a head, in memory at a time, where its queries can be computed apart


def truth(call: Call, dtype: torch.dtype = torch.float64) -> Tensors:
    """The outputs of the specification in `dtype`, fp32 or float64. Attention runs in parts, which fit into memory."""
    arguments = call.widened(dtype)
    with exact_arithmetic():
        if call.op.name not in ("flash_attn", "flash_attn_gradients"):
            return call.run(arguments)
        # A mask says which row a query is, and the gradients of keys are sums over all queries.
        whole = arguments["causal"] or call.op.name == "flash_attn_gradients"
        queries = arguments["q"].shape[1] if whole else max(SCORES // arguments["k"].shape[1], 1)
        samples = []
        for b in range(len(arguments["q"])):
            parts = {name: arguments[name][b : b + 1].split(1, dim=2) for name in ("q", "k", "v")}
            heads = []
            for q, k, v in zip(*parts.values()):
                rows = [call.run(arguments | {"q": part, "k": k, "v": v}) for part in q.split(queries, dim=1)]
                heads.append([torch.cat(outputs, dim=1) for outputs in zip(*rows)])
            # Heads are in the last dimension of a result, in the third one of a gradient.
            samples.append([torch.cat(outputs, dim=2) for outputs in zip(*heads)])
        return tuple(torch.cat(outputs) for outputs in zip(*samples))


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
        value, gate = _product(values).abs().chunk(2, dim=-1)
        sums, gate_sums = _product(magnitudes).chunk(2, dim=-1)
        sums = sums * gate + 1.13 * value * gate_sums
    else:
        linear_only = {"activation": "none"} if "activation" in magnitudes else {}
        with exact_arithmetic():
            (sums,) = call.run(magnitudes | linear_only)
    return math.prod(weight.shape[1:]) ** 0.5 * 2.0**-24 * sums.abs().max().item()


def _product(values: dict[str, Any]) -> torch.Tensor:
    return values["x"] @ values["weight"].T + values["bias"]


def _attention_slack(call: Call) -> float:
    """`order_slack` of attention, for T products a result, the sum of T weights, and the D products of each logit.

    Weights have one sign, so partial sums of p v are within the result and its spread, sqrt(sum (p v)^2). An error e of
    a logit moves the result by p (v - result) e; those of different keys are independent.
    """
    if call.arguments["q"].dtype != torch.float32:
        return 0.0
    values, unit, worst = call.widened(), 2.0**-24, 0.0
    length = values.get("key_length")
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
