"""GEGLU of fp8 operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels.geglu_fp8 import geglu_fp8
from fastsd.kernels.linear_fp8 import linear_fp8, quantize
from tests.support.precision import rand


def test_it_is_the_gate_of_the_fp8_product():
    x, w, b = rand(2, 5, 48, dtype=torch.float32), rand(32, 48, dtype=torch.float32), rand(32, dtype=torch.float32)
    weight, scale = quantize(w)
    value, gate = linear_fp8(x, weight, scale, b).double().chunk(2, -1)
    truth = value * F.gelu(gate)
    found = geglu_fp8(x, weight, scale, b)
    # Value, erf, its sum with 1 and three products round in fp32; the gate's error grows by GELU's slope, below 1.13.
    assert (found.double() - truth).abs().max() <= 8 * 2.0**-24 * (value.abs() * gate.abs().clamp(min=1)).max()
