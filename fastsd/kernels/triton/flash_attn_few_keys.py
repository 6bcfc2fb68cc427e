"""Attention to few keys (a text has 77): all keys and values stay on chip while a program loops over queries.

All scores of a row are computed before its first weight, so its largest is known and nothing is rescaled. Keys are
split into two powers of two (77 into 64 + 16), like heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.flash_attn import FewKeys
from fastsd.kernels.triton.flash_attn_tiles import load_tile, scores_of, store_tile, strides_in_units, times


@triton.jit
def _masked(scores, scale, key, row, T, CAUSAL: tl.constexpr):
    """Scaled scores, times log2(e); -inf where `row` does not see `key`."""
    keep = (key < T)[None, :]
    if CAUSAL:
        keep = keep & (key[None, :] <= row[:, None])
    return tl.where(keep, scores * scale, -float("inf"))


@triton.jit
def _sum_of_values(weights1, weights2, v1, v2, PRECISION: tl.constexpr):
    """The weights times the values, summed over the parts of the keys."""
    acc = tl.dot(weights1, v1, input_precision=PRECISION)
    if v2 is not None:
        acc = tl.dot(weights2, v2, acc, input_precision=PRECISION)
    return acc


UNSPECIALISED = [
    *("S", "T", "blocks", "stride_qb", "stride_qs", "stride_qh"),
    *("stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh"),
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def _few_keys_kernel(
    q_ptr,  # [B, S, heads, D]
    k_ptr,  # [B, T, heads, D]
    v_ptr,  # [B, T, heads, D]
    out_ptr,  # [B, S, heads, D] contiguous
    S,
    T,
    blocks,  # of queries, per program
    scale,  # of the scores, times log2(e)
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    UNIT: tl.constexpr,  # of the strides, see `strides_in_units`
    D: tl.constexpr,
    D1: tl.constexpr,  # D in two parts; the second may be 0
    D2: tl.constexpr,
    T1: tl.constexpr,  # T in two parts; the second may be 0
    T2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    stride_qs, stride_kt, stride_vt = times(stride_qs, UNIT), times(stride_kt, UNIT), times(stride_vt, UNIT)
    q_ptr += b * times(stride_qb, UNIT) + h * times(stride_qh, UNIT)
    k_ptr += b * times(stride_kb, UNIT) + h * times(stride_kh, UNIT)
    v_ptr += b * times(stride_vb, UNIT) + h * times(stride_vh, UNIT)
    out_ptr += b * S * heads * D + h * D

    key1 = tl.arange(0, T1)
    k11 = load_tile(k_ptr, key1, key1 < T, stride_kt, D, 0, D1, True)
    v11 = load_tile(v_ptr, key1, key1 < T, stride_vt, D, 0, D1, True)
    k12, k22, v12, v21, v22 = None, None, None, None, None
    if D2 > 0:
        k12 = load_tile(k_ptr, key1, key1 < T, stride_kt, D, D1, D2, True)
        v12 = load_tile(v_ptr, key1, key1 < T, stride_vt, D, D1, D2, True)
    if T2 > 0:
        key2 = T1 + tl.arange(0, T2)
        k21 = load_tile(k_ptr, key2, key2 < T, stride_kt, D, 0, D1, True)
        v21 = load_tile(v_ptr, key2, key2 < T, stride_vt, D, 0, D1, True)
        if D2 > 0:
            k22 = load_tile(k_ptr, key2, key2 < T, stride_kt, D, D1, D2, True)
            v22 = load_tile(v_ptr, key2, key2 < T, stride_vt, D, D1, D2, True)

    first = tl.program_id(0) * blocks * BLOCK_M
    for start in range(first, tl.minimum(first + blocks * BLOCK_M, S), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q1 = load_tile(q_ptr, row, row < S, stride_qs, D, 0, D1, True)
        q2 = None
        if D2 > 0:
            q2 = load_tile(q_ptr, row, row < S, stride_qs, D, D1, D2, True)
        scores1 = _masked(scores_of(q1, q2, k11, k12, PRECISION), scale, key1, row, T, CAUSAL)
        top = tl.max(scores1, 1)
        if T2 > 0:
            scores2 = _masked(scores_of(q1, q2, k21, k22, PRECISION), scale, key2, row, T, CAUSAL)
            top = tl.maximum(top, tl.max(scores2, 1))
        weights1 = tl.exp2(scores1 - top[:, None])
        total = tl.sum(weights1, 1)
        weights1 = weights1.to(v11.dtype)
        weights2 = None
        if T2 > 0:
            weights2 = tl.exp2(scores2 - top[:, None])
            total += tl.sum(weights2, 1)
            weights2 = weights2.to(v11.dtype)
        y = _sum_of_values(weights1, weights2, v11, v21, PRECISION) / total[:, None]
        store_tile(out_ptr, y, row, row < S, heads * D, D, 0, D1)
        if D2 > 0:
            y = _sum_of_values(weights1, weights2, v12, v22, PRECISION) / total[:, None]
            store_tile(out_ptr, y, row, row < S, heads * D, D, D1, D2)


def few_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, causal: bool, launch: FewKeys
) -> None:
    """Write the attention of `q` to `k` and `v` to `out` `[B, S, heads * D]`; `flash_attn` has checked them."""
    batch, queries, heads, size = q.shape
    unit, strides = strides_in_units(q, k, v)
    _few_keys_kernel[(-(-queries // (launch.rows * launch.blocks)), heads, batch)](
        *(q, k, v, out, queries, k.shape[1], launch.blocks, size**-0.5 * math.log2(math.e), *strides),
        UNIT=unit,
        D=size,
        D1=launch.parts[0],
        D2=launch.parts[1],
        T1=launch.keys[0],
        T2=launch.keys[1],
        BLOCK_M=launch.rows,
        CAUSAL=causal,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=launch.warps,
        num_stages=launch.stages,
        **OPTIONS,
    )
