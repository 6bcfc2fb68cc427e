"""GEGLU: the gated feed-forward of the transformer blocks (Shazeer 2020, equation 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def geglu_ref(x: torch.Tensor) -> torch.Tensor:
    """The specification of `geglu`, with the exact (erf) GELU in fp32."""
    value, gate = dispatch.widen(x).chunk(2, dim=-1)
    return (value * 0.5 * gate * (1 + torch.erf(gate * 0.5**0.5))).to(x.dtype)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """`value * gelu(gate)` for `x` `[..., 2 * C]` = (value, gate). Returns `[..., C]` in the dtype of `x`."""
    if dispatch.backend(x) == "reference":
        return geglu_ref(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
