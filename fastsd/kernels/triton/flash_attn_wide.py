"""Attention by two PyTorch products with a softmax in between, for wide heads: the autoencoder's has 512 columns.

A fused kernel would compute the scores twice, because 512 columns of sums do not fit beside them on chip. Scores are
fp32, a bounded number at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.flash_attn import Wide


@triton.jit(do_not_specialize=["T", "first"])
def _softmax_kernel(
    scores_ptr,  # [heads, rows, T] fp32
    weights_ptr,  # [heads, rows, T]
    total_ptr,  # [heads, rows] fp32
    T,
    first,  # index of the first row among the queries
    scale,  # of the scores, times log2(e)
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights of a row, 1 for the largest, and the sum of the rounded weights."""
    row, head, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    end = T
    if CAUSAL:
        end = tl.minimum(first + row + 1, T)
    head_row = head.to(tl.int64) * rows + row
    scores_ptr += head_row * T
    weights_ptr += head_row * T
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(scores_ptr + key, mask=key < end, other=-float("inf")))
    top = tl.max(top, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        key = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + key, mask=key < end, other=-float("inf"))
        weight = tl.exp2((score - top) * scale).to(weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + key, weight, mask=key < T)
        total += tl.where(key < end, weight.to(tl.float32), 0.0)
    tl.store(total_ptr + head_row, tl.sum(total, 0))


def wide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, causal: bool, launch: Wide) -> None:
    """Write the attention of `q` to `k` and `v` to `out` `[B, S, heads * D]`; `flash_attn` has checked them."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    rows = min(max(launch.scores // (keys * heads), 1), queries)
    q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out.view(q.shape)))  # [B, heads, S or T, D]
    for b in range(batch):
        for first in range(0, queries, rows):
            chunk = slice(first, min(first + rows, queries))
            scores = _products(q[b, :, chunk], k[b].transpose(1, 2))
            weights = torch.empty(scores.shape, dtype=q.dtype, device=q.device)
            total = torch.empty(*scores.shape[:2], 1, dtype=torch.float32, device=q.device)
            _softmax_kernel[(scores.shape[1], heads)](
                *(scores, weights, total, keys, first, size**-0.5 * math.log2(math.e)),
                CAUSAL=causal,
                BLOCK=launch.block,
                num_warps=launch.warps,
                **OPTIONS,
            )
            torch.div(_products(weights, v[b]), total, out=out[b, :, chunk])


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y per head, in fp32: scores in 16 bits would be too coarse, and unscaled sums may exceed fp16."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.bmm(x, y, out_dtype=torch.float32)
    return torch.bmm(x.float(), y.float())
