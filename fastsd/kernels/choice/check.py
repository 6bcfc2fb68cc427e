"""Whether a way computes what it should, here: its results for a call against the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsd.kernels.choice.call import Call, Op
from fastsd.kernels.choice.op import GpuOp, Way, decoded, encoded
from fastsd.kernels.choice.rule import CheckResult, judge, wider
from fastsd.kernels.choice.truth import order_slack, truth


class Unjudged(Exception):
    """The results of this call cannot be compared: not even PyTorch's are finite."""


class Checker:
    """The comparisons of one call's results with the specification, by the rule of `fastsd verify`."""

    def __init__(self, op: GpuOp, args: Sequence[Any]):
        """Computes PyTorch's results and the true ones. Where those tell nothing (all are zero, which a fault could
        compute too, or beyond the range of the dtype), the arguments are replaced by random numbers.

        Raises:
            torch.OutOfMemoryError: there is no memory for them.
        """
        self.op = op
        self._compute(args)
        if not any(_tells(x, torch.finfo(plain.dtype).max) for x, plain in zip(self.truth, self.same_dtype)):
            self._compute(decoded(encoded(args), args[0].device))

    def _compute(self, args: Sequence[Any]) -> None:
        self.args = args
        self.same_dtype = self.op.outputs(self.op.own, args)
        call = Call.bind(Op(self.op.name, self.op.reference), *args)
        self.truth, self.slack = truth(call, wider(args[0].dtype)), order_slack(call)

    def fault(self, way: Way) -> str | None:
        """What is wrong with the way's results; None if nothing is.

        Raises:
            Unjudged: PyTorch's results are not finite, and neither are the way's.
        """
        result = judge(
            CheckResult("op", self.op.name),
            self.op.outputs(way, self.args),
            self.same_dtype,
            self.truth,
            self.slack,
        )
        if result.passed is None:
            raise Unjudged
        if result.passed:
            return None
        if result.error is None:
            return result.note
        return f"largest error {result.error:.3g}, allowed {result.allowed:.3g}"


def _tells(x: torch.Tensor, limit: float) -> bool:
    return bool(((x != 0) & (x.abs() <= limit)).any())
