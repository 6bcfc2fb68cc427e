"""Attention: softmax(q k^T / sqrt(D)) v, never holding the whole score matrix (Dao et al. 2022, algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def flash_attn_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The specification of `flash_attn`: scores, softmax and sums in fp32."""
    dtype = q.dtype
    q, k, v = (dispatch.widen(x).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(dtype)


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Scaled dot-product attention.

    Args:
        q: `[B, S, heads, D]`, any strides with a contiguous last dimension (views of a fused projection are meant).
        k, v: `[B, T, heads, D]`.
        causal: position i attends to positions <= i only.

    Returns:
        `[B, S, heads * D]` in the dtype of `q`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"flash_attn: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if dispatch.backend(q) == "reference":
        return flash_attn_ref(q, k, v, causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
