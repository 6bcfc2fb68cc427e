"""`flash_attn` on the GPU: which kernel takes a call, and the kernel for long sequences.

A head size that is not a power of two is split into two that are (80 = 64 + 16), each with its own products. A part
that exceeds the head reads zeros there (40 as one part of 64). Scores, weights and sums are fp32; the weights are
rounded to the dtype of the values for their product, as in PyTorch's kernels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastsd.kernels import dispatch
from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.flash_attn import UNUSED, FewKeys, Tile, Wide, choose
from fastsd.kernels.triton.flash_attn_few_keys import few_keys
from fastsd.kernels.triton.flash_attn_tiles import load_tile, scores_of, store_tile, strides_in_units, times
from fastsd.kernels.triton.flash_attn_wide import wide

# Triton's interpreter multiplies the bits of bf16 values as integers.
DTYPES = (torch.float16, torch.float32, *(() if dispatch.interpreted() else (torch.bfloat16,)))


@triton.jit
def _attend(
    acc1,  # [BLOCK_M, D1] weights times values, relative to `top`
    acc2,  # [BLOCK_M, D2]; if D2 is 0 any tensor, returned unchanged
    total,  # [BLOCK_M] sums of the weights
    top,  # [BLOCK_M] largest scores so far, times log2(e)
    q1,
    q2,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    row,
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
    PRECISION: tl.constexpr,
):
    """Accumulate the keys from `first` to `end` (Dao et al. 2022, algorithm 1, lines 8 to 12, without the division)."""
    n = tl.arange(0, BLOCK_N)
    k_ptr += first.to(tl.int64) * stride_kt
    v_ptr += first.to(tl.int64) * stride_vt
    STAGES: tl.constexpr = 1 if MASKED else None  # one or two blocks: pipelining them would only cost registers
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        live = start + n < T
        k1 = load_tile(k_ptr, n, live, stride_kt, D, 0, D1, MASKED)
        k2 = None
        if D2 > 0:
            k2 = load_tile(k_ptr, n, live, stride_kt, D, D1, D2, MASKED)
        scores = scores_of(q1, q2, k1, k2, PRECISION)
        if MASKED:
            keep = live[None, :]
            if CAUSAL:
                keep = keep & (start + n[None, :] <= row[:, None])
            scores = tl.where(keep, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        top = new_top
        total = total * shrink + tl.sum(weights, 1)
        v1 = load_tile(v_ptr, n, live, stride_vt, D, 0, D1, MASKED)
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_tile(v_ptr, n, live, stride_vt, D, D1, D2, MASKED)
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt
    return acc1, acc2, total, top


# Kernels are not specialised by lengths and strides, so that a new resolution compiles nothing.
UNSPECIALISED = [
    *("S", "T", "stride_qb", "stride_qs", "stride_qh"),
    *("stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh"),
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def _flash_attn_kernel(
    q_ptr,  # [B, S, heads, D]
    k_ptr,  # [B, T, heads, D]
    v_ptr,  # [B, T, heads, D]
    out_ptr,  # [B, S, heads, D] contiguous
    lse_ptr,  # [B, heads, S] fp32: log2 of the sums of exponentials; or None
    S,
    T,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides T
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    stride_qs, stride_kt, stride_vt = times(stride_qs, UNIT), times(stride_kt, UNIT), times(stride_vt, UNIT)
    q_ptr += b * times(stride_qb, UNIT) + h * times(stride_qh, UNIT)
    k_ptr += b * times(stride_kb, UNIT) + h * times(stride_kh, UNIT)
    v_ptr += b * times(stride_vb, UNIT) + h * times(stride_vh, UNIT)
    q1 = load_tile(q_ptr, row, row < S, stride_qs, D, 0, D1, True)
    q2 = None
    if D2 > 0:
        q2 = load_tile(q_ptr, row, row < S, stride_qs, D, D1, D2, True)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = total  # a placeholder: Triton 3.6 does not compile a function that returns None
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)

    # Blocks that every row sees completely come first and need no mask.
    end = T
    if CAUSAL:
        end = tl.minimum(start + BLOCK_M, T)
        whole = tl.minimum(start, T) // BLOCK_N * BLOCK_N
    else:
        whole = T // BLOCK_N * BLOCK_N
    # fmt: off
    acc1, acc2, total, top = _attend(
        acc1, acc2, total, top, q1, q2, k_ptr, v_ptr, stride_kt, stride_vt, row, tl.full([], 0, tl.int32), whole, T,
        scale, D, D1, D2, BLOCK_N, False, False, PRECISION,
    )
    if CAUSAL or not EVEN:
        acc1, acc2, total, top = _attend(
            acc1, acc2, total, top, q1, q2, k_ptr, v_ptr, stride_kt, stride_vt, row, whole, end, T,
            scale, D, D1, D2, BLOCK_N, True, CAUSAL, PRECISION,
        )
    # fmt: on
    if lse_ptr is not None:
        tl.store(lse_ptr + (b * heads + h) * S + row, top + tl.log2(total), mask=row < S)
    out_ptr += b * S * heads * D + h * D
    store_tile(out_ptr, acc1 / total[:, None], row, row < S, heads * D, D, 0, D1)
    if D2 > 0:
        store_tile(out_ptr, acc2 / total[:, None], row, row < S, heads * D, D, D1, D2)


def flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    launch: Tile | FewKeys | Wide | None = None,
) -> torch.Tensor:
    """`softmax(q k^T / sqrt(D)) v`; see `fastsd.kernels.flash_attn` for the specification.

    Args:
        q: `[B, S, heads, D]` fp16, bf16 or fp32; any strides with a contiguous last dimension. 16-byte loads need
            strides that are multiples of 16 bytes.
        k, v: `[B, T, heads, D]` likewise.
        causal: position i attends to positions <= i only.
        launch: overrides the launch table.

    Returns:
        `[B, S, heads * D]` contiguous, in the dtype of `q`. An image's result does not depend on the others in its
        batch. fp32 products are exact fp32 unless `torch.backends.cuda.matmul.allow_tf32`.

    Raises:
        ValueError: the reason of `refusal`; or gradients, which this launcher lacks.
    """
    reason = refusal(q, k, v)
    if dispatch.records(q, k, v):
        reason = "this launcher has no gradients, see flash_attn_gradients"
    if reason is not None:
        raise ValueError(f"flash_attn: {reason}")
    batch, queries, heads, size = q.shape
    out = torch.empty(batch, queries, heads * size, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    launch = launch or choose(architecture.class_of(q.device), queries, k.shape[1], heads, size, q.element_size())
    with torch.cuda.device_of(q):
        if isinstance(launch, Wide):
            wide(q, k, v, out, causal, launch)
        elif isinstance(launch, FewKeys):
            few_keys(q, k, v, out, causal, launch)
        else:
            long(q, k, v, out, causal, launch)
    return out


def long(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    causal: bool,
    launch: Tile,
    lse: torch.Tensor | None = None,
) -> None:
    """Write the attention of `q` to `k` and `v` to `out` `[B, S, heads * D]`, and to `lse` `[B, heads, S]` fp32 what
    its gradients need; the caller has checked them."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    unit, strides = strides_in_units(q, k, v)
    registers = {} if launch.registers is None else {"maxnreg": launch.registers}
    _flash_attn_kernel[(-(-queries // launch.rows), heads, batch)](
        *(q, k, v, out, lse, queries, keys, size**-0.5 * math.log2(math.e), *strides),
        UNIT=unit,
        D=size,
        D1=launch.parts[0],
        D2=launch.parts[1],
        BLOCK_M=launch.rows,
        BLOCK_N=launch.keys,
        EVEN=keys % launch.keys == 0,
        CAUSAL=causal,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        num_warps=launch.warps,
        num_stages=launch.stages,
        **registers,
        **OPTIONS,
    )


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the kernels do not take this call, and what they take; None if they take it."""
    unused = UNUSED.get(architecture.class_of(q.device))
    if unused is not None:
        return unused
    tensors = {"q": q, "k": k, "v": v}
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        dtypes = ", ".join(f"{name} {list(x.shape)} is {str(x.dtype)[6:]}" for name, x in tensors.items())
        return f"{dtypes}; the kernel takes one of {', '.join(str(dtype)[6:] for dtype in DTYPES)} for all three"
    for name, x in tensors.items():
        if x.shape[3] > 1 and x.stride(3) != 1:
            return f"{name} {list(x.shape)} has strides {list(x.stride())}; the kernel needs 1 in the last dimension"
    if q.shape[3] == 0 or k.shape[1] == 0:
        return f"k is {list(k.shape)}; the kernel needs at least one key and a head size of 1"
    return None
