"""The gradients of `flash_attn` on the GPU (Dao 2023, algorithm 2): weights are computed again, never stored.

With p the weights, g the gradient of the result o, and u_i = g_i . o_i for the query i:

    dv_j = sum_i p_ij g_i        ds_ij = p_ij (g_i . v_j - u_i)
    dq_i = sum_j ds_ij k_j / sqrt(D)        dk_j = sum_i ds_ij q_i / sqrt(D)

One launch computes u and the gradients of the queries, a second those of keys and values. No program adds to another's
sums, so results do not depend on the order in which programs run. Sums are fp32; p and ds are rounded to the dtype of
the tensors for their products, as in PyTorch's kernels. Heads are split into two parts, as in the forward kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fastsd.kernels import dispatch
from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.flash_attn import WIDEST, Tile, tile_of
from fastsd.kernels.launch.flash_attn_gradients import AttentionGradients, choose
from fastsd.kernels.triton.flash_attn import long
from fastsd.kernels.triton.flash_attn import refusal as refusal_of_forward
from fastsd.kernels.triton.flash_attn_tiles import load_tile, scores_of, store_tile, strides_in_units, times

# Triton's interpreter multiplies the bits of bf16 values as integers.
DTYPES = (torch.float16, *(() if dispatch.interpreted() else (torch.bfloat16,)))


@triton.jit
def _over_keys(
    dq1,  # [BLOCK_M, D1]
    dq2,  # [BLOCK_M, D2]; if D2 is 0 any tensor, returned unchanged
    q1,
    q2,
    g1,
    g2,
    lse,
    u,
    row,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    first,
    end,
    T,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Accumulate the sums over the keys from `first` to `end`."""
    STAGES: tl.constexpr = 1 if MASKED else None  # one or two blocks: pipelining them would only cost registers
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        live = key < T
        k1 = load_tile(k_ptr, key, live, stride_kt, D, 0, D1, MASKED)
        v1 = load_tile(v_ptr, key, live, stride_vt, D, 0, D1, MASKED)
        k2, v2 = None, None
        if D2 > 0:
            k2 = load_tile(k_ptr, key, live, stride_kt, D, D1, D2, MASKED)
            v2 = load_tile(v_ptr, key, live, stride_vt, D, D1, D2, MASKED)
        weights = tl.exp2(scores_of(q1, q2, k1, k2, "ieee") * scale - lse[:, None])
        if MASKED:
            keep = live[None, :]
            if CAUSAL:
                keep = keep & (key[None, :] <= row[:, None])
            weights = tl.where(keep, weights, 0.0)
        ds = (weights * (scores_of(g1, g2, v1, v2, "ieee") - u[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2)
    return dq1, dq2


# Kernels are not specialised by lengths and strides, so that a new resolution compiles nothing.
UNSPECIALISED = [
    *("S", "T", "stride_qb", "stride_qs", "stride_qh"),
    *("stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh"),
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def _attn_query_gradients_kernel(
    q_ptr,  # [B, S, heads, D]
    k_ptr,  # [B, T, heads, D]
    v_ptr,  # [B, T, heads, D]
    out_ptr,  # [B, S, heads, D] contiguous
    g_ptr,  # [B, S, heads, D] contiguous: the gradient of `out`
    lse_ptr,  # [B, heads, S] fp32: log2 of the sums of exponentials
    u_ptr,  # [B, heads, S] fp32, written
    dq_ptr,  # [B, S, heads, D] contiguous, written
    S,
    T,
    scale,  # of the scores, times log2(e)
    factor,  # of the sums
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides T
    CAUSAL: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    live = row < S
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    stride_qs, stride_kt, stride_vt = times(stride_qs, UNIT), times(stride_kt, UNIT), times(stride_vt, UNIT)
    q_ptr += b * times(stride_qb, UNIT) + h * times(stride_qh, UNIT)
    k_ptr += b * times(stride_kb, UNIT) + h * times(stride_kh, UNIT)
    v_ptr += b * times(stride_vb, UNIT) + h * times(stride_vh, UNIT)
    head = b * S * heads * D + h * D
    statistics = (b * heads + h) * S + row
    g1 = load_tile(g_ptr + head, row, live, heads * D, D, 0, D1, True)
    u = tl.sum(g1.to(tl.float32) * load_tile(out_ptr + head, row, live, heads * D, D, 0, D1, True).to(tl.float32), 1)
    q1 = load_tile(q_ptr, row, live, stride_qs, D, 0, D1, True)
    q2, g2 = None, None
    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = u  # a placeholder: Triton 3.6 does not compile a function that returns None
    if D2 > 0:
        g2 = load_tile(g_ptr + head, row, live, heads * D, D, D1, D2, True)
        out2 = load_tile(out_ptr + head, row, live, heads * D, D, D1, D2, True)
        u += tl.sum(g2.to(tl.float32) * out2.to(tl.float32), 1)
        q2 = load_tile(q_ptr, row, live, stride_qs, D, D1, D2, True)
        dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
    tl.store(u_ptr + statistics, u, mask=live)
    lse = tl.load(lse_ptr + statistics, mask=live, other=0.0)

    # Blocks that every row sees completely come first and need no mask.
    end = T
    if CAUSAL:
        end = tl.minimum(start + BLOCK_M, T)
        whole = tl.minimum(start, T) // BLOCK_N * BLOCK_N
    else:
        whole = T // BLOCK_N * BLOCK_N
    # fmt: off
    dq1, dq2 = _over_keys(
        dq1, dq2, q1, q2, g1, g2, lse, u, row, k_ptr, v_ptr, stride_kt, stride_vt, tl.full([], 0, tl.int32), whole, T,
        scale, D, D1, D2, BLOCK_N, False, False,
    )
    if CAUSAL or not EVEN:
        dq1, dq2 = _over_keys(
            dq1, dq2, q1, q2, g1, g2, lse, u, row, k_ptr, v_ptr, stride_kt, stride_vt, whole, end, T,
            scale, D, D1, D2, BLOCK_N, True, CAUSAL,
        )
    # fmt: on
    store_tile(dq_ptr + head, dq1 * factor, row, live, heads * D, D, 0, D1)
    if D2 > 0:
        store_tile(dq_ptr + head, dq2 * factor, row, live, heads * D, D, D1, D2)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "run"])
def _attn_key_gradients_kernel(
    q_ptr,  # [B, S, heads, D]
    k_ptr,  # [B, T, heads, D]
    v_ptr,  # [B, T, heads, D]
    g_ptr,  # [B, S, heads, D] contiguous: the gradient of the result
    lse_ptr,  # [B, heads, S] fp32: log2 of the sums of exponentials
    u_ptr,  # [B, heads, S] fp32
    dk_ptr,  # [parts, B, T, heads, D] contiguous, written
    dv_ptr,  # [parts, B, T, heads, D] contiguous, written
    S,
    T,
    run,  # queries of a part, a multiple of BLOCK_M
    scale,  # of the scores, times log2(e)
    factor,  # of the sums of dk
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    blocks, heads, batch = tl.cdiv(T, BLOCK_N), tl.num_programs(1), tl.num_programs(2)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = key < T
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    stride_qs, stride_kt, stride_vt = times(stride_qs, UNIT), times(stride_kt, UNIT), times(stride_vt, UNIT)
    q_ptr += b * times(stride_qb, UNIT) + h * times(stride_qh, UNIT)
    k_ptr += b * times(stride_kb, UNIT) + h * times(stride_kh, UNIT)
    v_ptr += b * times(stride_vb, UNIT) + h * times(stride_vh, UNIT)
    g_ptr += b * S * heads * D + h * D
    lse_ptr += (b * heads + h) * S
    u_ptr += (b * heads + h) * S
    k1 = load_tile(k_ptr, key, live, stride_kt, D, 0, D1, True)
    v1 = load_tile(v_ptr, key, live, stride_vt, D, 0, D1, True)
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    k2, v2 = None, None
    if D2 > 0:
        k2 = load_tile(k_ptr, key, live, stride_kt, D, D1, D2, True)
        v2 = load_tile(v_ptr, key, live, stride_vt, D, D1, D2, True)
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
        dv2 = tl.zeros([BLOCK_N, D2], tl.float32)

    first = part * run
    end = tl.minimum(first + run, S)
    if CAUSAL:  # earlier queries see none of these keys
        first = tl.maximum(first, block * BLOCK_N // BLOCK_M * BLOCK_M)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        seen = row < S
        q1 = load_tile(q_ptr, row, seen, stride_qs, D, 0, D1, True)
        g1 = load_tile(g_ptr, row, seen, heads * D, D, 0, D1, True)
        q2, g2 = None, None
        if D2 > 0:
            q2 = load_tile(q_ptr, row, seen, stride_qs, D, D1, D2, True)
            g2 = load_tile(g_ptr, row, seen, heads * D, D, D1, D2, True)
        lse = tl.load(lse_ptr + row, mask=seen, other=0.0)  # queries beyond the last are 0, as are their gradients
        u = tl.load(u_ptr + row, mask=seen, other=0.0)
        weights = tl.exp2(scores_of(k1, k2, q1, q2, "ieee") * scale - lse[None, :])
        if CAUSAL:
            weights = tl.where(key[:, None] <= row[None, :], weights, 0.0)
        rounded = weights.to(g1.dtype)
        dv1 = tl.dot(rounded, g1, dv1)
        if D2 > 0:
            dv2 = tl.dot(rounded, g2, dv2)
        ds = (weights * (scores_of(v1, v2, g1, g2, "ieee") - u[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2)
    head = (part * batch + b) * T * heads * D + h * D
    store_tile(dk_ptr + head, dk1 * factor, key, live, heads * D, D, 0, D1)
    store_tile(dv_ptr + head, dv1, key, live, heads * D, D, 0, D1)
    if D2 > 0:
        store_tile(dk_ptr + head, dk2 * factor, key, live, heads * D, D, D1, D2)
        store_tile(dv_ptr + head, dv2, key, live, heads * D, D, D1, D2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `flash_attn`, and what `backward` needs of it besides.

    Args:
        q: `[B, S, heads, D]` fp16 or bf16; any strides with a contiguous last dimension.
        k, v: `[B, T, heads, D]` likewise.
        causal: position i attends to positions <= i only.

    Returns:
        `[B, S, heads * D]` contiguous, in the dtype of `q`; and `[B, heads, S]` fp32: log2 of the sums of exponentials.

    Raises:
        ValueError: the reason of `refusal`.
    """
    reason = refusal(q, k, v)
    if reason is not None:
        raise ValueError(f"flash_attn_gradients: {reason}")
    batch, queries, heads, size = q.shape
    out = torch.empty(batch, queries, heads * size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel():
        tile = tile_of(architecture.class_of(q.device), queries, size, q.element_size())
        with torch.cuda.device_of(q):
            long(q, k, v, out, causal, tile, lse)
    return out, lse


def backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    launch: AttentionGradients | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `q`, `k` and `v`, contiguous, in their dtype; an image's do not depend on its batch.

    Args:
        gradient: of `out`, `[B, S, heads * D]`.
        q, k, v, causal: of `forward`.
        out, lse: what `forward` returned.
        launch: overrides the launch table.
    """
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    if q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, u = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, lse))
    launch = launch or choose(architecture.class_of(q.device), queries, keys, heads, size)
    parts = -(-queries // launch.run)
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (torch.empty(parts, *x.shape, dtype=dtype, device=q.device) for x in (k, v))
    gradient = gradient.contiguous()
    unit, strides = strides_in_units(q, k, v)
    scales = size**-0.5 * math.log2(math.e), size**-0.5
    first, second = launch.of_queries, launch.of_keys
    with torch.cuda.device_of(q):
        _attn_query_gradients_kernel[(-(-queries // first.rows), heads, batch)](
            *(q, k, v, out, gradient, lse, u, dq, queries, keys, *scales, *strides),
            EVEN=keys % first.keys == 0,
            **_options(first, unit, size, causal),
        )
        _attn_key_gradients_kernel[(-(-keys // second.keys) * parts, heads, batch)](
            *(q, k, v, gradient, lse, u, dk, dv, queries, keys, launch.run, *scales, *strides),
            **_options(second, unit, size, causal),
        )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _options(tile: Tile, unit: int, size: int, causal: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "UNIT": unit,
        "D": size,
        "D1": tile.parts[0],
        "D2": tile.parts[1],
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "CAUSAL": causal,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **OPTIONS,
    }


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels do not take this call, and what they take; None if they take it."""
    if q.dtype not in DTYPES:
        return f"q is {str(q.dtype)[6:]}; the gradients' kernels take {' and '.join(str(x)[6:] for x in DTYPES)}"
    if q.shape[3] > WIDEST:
        return f"heads of {q.shape[3]}; the gradients' kernels take up to {WIDEST}"
    return refusal_of_forward(q, k, v)
