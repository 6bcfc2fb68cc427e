"""Attention: softmax(q k^T / sqrt(D)) v, never holding the whole score matrix (Dao et al. 2022, algorithm 1)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.cpu import choices, onednn
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.flash_attn import FewKeys, Tile, Wide
from fastsd.kernels.launch.flash_attn_gradients import AttentionGradients

HALF = (torch.float16, torch.bfloat16)  # in these our kernels compute gradients

# The oneDNN path.
CHUNK = 2**21  # scores computed at a time: small enough for a cache of a few MB
MARGIN = 7.0  # sigmoid(x) / exp(x) is about 1 - exp(x); exp(-7) is half a rounding of bf16
REACH = 67.0  # the largest weight of a row is at least exp(-67); bf16 still represents exp(-17) times that


def flash_attn_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """The specification of `flash_attn`: scores, softmax and sums in fp32."""
    dtype = q.dtype
    q, k, v = (dispatch.widen(x).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
    return (_weights(q, k, causal) @ v).transpose(1, 2).flatten(2).to(dtype)


def flash_attn_gradients_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of both passes: the result of `flash_attn`, and the gradients of q, k and v in fp32.

    They are those of `(out * q).sum()` with this q as a constant: any tensor of its shape shows, as the gradient of the
    result, whether a backward pass is right and how long it takes.
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v = (dispatch.widen(x).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
    weights = _weights(q, k, causal)
    out = weights @ v
    ds = weights * (q @ v.transpose(-1, -2) - (q * out).sum(-1, keepdim=True)) * scale  # of the scores
    found = ds @ k, ds.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ q
    dq, dk, dv = (x.transpose(1, 2).to(dtype) for x in found)
    return out.transpose(1, 2).flatten(2).to(dtype), dq, dk, dv


def _weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The softmax of the scores, `[B, heads, S, T]`, of q `[B, heads, S, D]` and k."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1)


def flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, key_length: int | None = None
) -> torch.Tensor:
    """Scaled dot-product attention. Where gradients are recorded on a GPU in 16 bits, both passes are by our kernels or
    both by PyTorch's, whichever is right and faster for the two together; elsewhere PyTorch differentiates its own op.

    Args:
        q: `[B, S, heads, D]`, any strides with a contiguous last dimension, such as views of a fused projection.
        k, v: `[B, T, heads, D]`.
        causal: position i attends to positions <= i only.
        key_length: number of keys to attend to, 1 to T; None is all. The others are not read.

    Returns:
        `[B, S, heads * D]` in the dtype of `q`.

    Raises:
        ValueError: the shapes do not fit each other, or `key_length` does not fit T.
        FastsdError: the Triton backend is forced, and its kernels do not take this call.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"flash_attn: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if key_length is not None:
        if not 1 <= key_length <= k.shape[1]:
            raise ValueError(f"flash_attn: key_length is {key_length}; it needs 1 to {k.shape[1]}, the number of keys")
        k, v = k[:, :key_length], v[:, :key_length]
    backend = dispatch.backend(q, k, v, gradients=HALF)
    if backend == "reference":
        return flash_attn_ref(q, k, v, causal)
    if backend == "triton" and dispatch.records(q, k, v):
        way = candidates.chosen(GRADIENTS, q, k, v, causal)
        if way == GRADIENTS.own:
            return _sdpa(q, k, v, causal)
        return AttentionByTriton.apply(q, k, v, causal, way.launch)
    if backend == "triton":
        return candidates.run(OP, q, k, v, causal)
    if backend == "onednn" and not causal and _by_products(q, k):
        run = _image_bf16 if q.dtype == torch.bfloat16 else _image_fp32
        # Image by image, so that an image's result does not depend on its batch.
        return torch.stack([run(q[b], k[b], v[b]) for b in range(len(q))])
    return _sdpa(q, k, v, causal)


def _by_products(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the CPU computes this attention by two of oneDNN's products rather than by PyTorch's attention."""
    op = "flash_attn, wide heads" if q.shape[3] >= choices.WIDE_HEAD else "flash_attn"
    return choices.way(op, q.dtype, q.shape[1] * k.shape[1]) == "products"


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def _by_triton(*args: Any, launch: Tile | FewKeys | Wide | None = None) -> torch.Tensor:
    from fastsd.kernels.triton import flash_attn as flash_attn_triton

    return functools.partial(flash_attn_triton.flash_attn, launch=launch)(*args)


def _refused_by_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> str | None:
    from fastsd.kernels.triton import flash_attn as flash_attn_triton

    return flash_attn_triton.refusal(q, k, v)


def _launches(thorough: bool, q: torch.Tensor, k: torch.Tensor, *_: Any) -> list[Any]:
    queries, heads, size = q.shape[1:]
    return variants.attention(
        thorough, architecture.class_of(q.device), queries, k.shape[1], heads, size, q.element_size()
    )


def _sdpa_backend(name: str, *options: Any) -> OpCandidate:
    """A backend of PyTorch's attention, called by itself: the switches that choose one apply to the whole process.

    Args:
        options: its arguments before `is_causal`.
    """

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        attention = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: torch.Tensor = attention(q, k, v, *options, causal)[0]
        return out.transpose(1, 2).flatten(2)

    def refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> str | None:
        size = q.shape[3]
        if size % 8 or any(x.stride(3) != 1 for x in (q, k, v)):
            return f"heads of {size}; it takes multiples of 8, whose elements are adjacent"
        if name != "efficient" and (q.element_size() != 2 or architecture.class_of(q.device) < 80 or size > 256):
            return "it takes 16 bits and heads of up to 256, on sm_80 or newer"
        return None

    return OpCandidate(f"sdpa {name}", run, refuses, measured=True)


OP = GpuOp(
    "flash_attn",
    flash_attn_ref,
    (
        OpCandidate("triton", _by_triton, _refused_by_triton, launches=_launches, launch_types=(Tile, FewKeys, Wide)),
        _sdpa_backend("cudnn", None, False, 0.0),
        _sdpa_backend("flash", 0.0),
        _sdpa_backend("efficient", None, False, 0.0),
        OpCandidate("torch", _sdpa),
    ),
)


class AttentionByTriton(torch.autograd.Function):
    """`flash_attn` by our kernels in both passes; `launch` is of the backward one, None the committed."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, launch: AttentionGradients | None
    ) -> torch.Tensor:
        from fastsd.kernels.triton import flash_attn_gradients as gradients_triton

        out, lse = gradients_triton.forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal, ctx.launch = causal, launch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from fastsd.kernels.triton import flash_attn_gradients as gradients_triton

        q, k, v, out, lse = ctx.saved_tensors
        return *gradients_triton.backward(gradient, q, k, v, out, lse, ctx.causal, ctx.launch), None, None


def _gradients_by_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, launch: AttentionGradients | None = None
) -> tuple[torch.Tensor, ...]:
    from fastsd.kernels.triton import flash_attn_gradients as gradients_triton

    out, lse = gradients_triton.forward(q, k, v, causal)
    return out, *gradients_triton.backward(q.flatten(2), q, k, v, out, lse, causal, launch)


def _gradients_launches(thorough: bool, q: torch.Tensor, k: torch.Tensor, *_: Any) -> list[AttentionGradients]:
    queries, heads, size = q.shape[1:]
    return variants.attention_gradients(thorough, architecture.class_of(q.device), queries, k.shape[1], heads, size)


def _gradients_refused_by_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> str | None:
    from fastsd.kernels.triton import flash_attn_gradients as gradients_triton

    return gradients_triton.refusal(q, k, v)


def _gradients_by_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = ((x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in (q, k, v))
        out = _sdpa(q, k, v, causal)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), q.detach().flatten(2))


GRADIENTS = GpuOp(
    "flash_attn_gradients",
    flash_attn_gradients_ref,
    (
        OpCandidate(
            "triton",
            _gradients_by_triton,
            _gradients_refused_by_triton,
            launches=_gradients_launches,
            launch_types=(AttentionGradients,),
        ),
        OpCandidate("torch", _gradients_by_pytorch),
    ),
)


def _image_fp32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of `q` `[S, heads, D]` to `k`, `v` `[T, heads, D]` by oneDNN's products. Returns `[S, heads * D]`."""
    queries = (q * q.shape[-1] ** -0.5).transpose(0, 1).contiguous()
    keys, values = k.transpose(0, 1).contiguous(), v.permute(1, 2, 0).contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for h in range(q.shape[1]):
        for rows in _chunks(len(q), len(k)):
            scores = onednn.matmul(queries[h, rows], keys[h], None)
            out[rows, h] = onednn.matmul(torch.softmax(scores, -1, out=scores), values[h], None)
    return out.flatten(1)


def _image_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of `q` `[S, heads, D]` to `k`, `v` `[T, heads, D]` in bf16. Returns `[S, heads * D]`.

    oneDNN's bf16 products are fast but round their results, and logits in bf16 would be too coarse. So the first
    product takes the exponential before it rounds, in its only epilogue that contains one: sigmoid(x) is exp(x) for
    x << 0, and a softmax is invariant to a shift of the row by a constant c. That product gives the weights
    w = sigmoid(q k^T / sqrt(D) - c). The second gives w v and, from columns of ones beside v, the sums of w.

    - c_i = q_i . mean(k) + |q_i| max_j |k_j - mean(k)| + a margin is at least every logit (Cauchy-Schwarz). The largest
      logit is at least the mean one, q_i . mean(k), so c_i exceeds it by at most the other two terms. If their sum
      exceeds REACH, PyTorch's attention computes the head.
    - The first product includes the scale and c: its rows are (hi, lo, c) and its columns (k, k, -1), where
      hi + lo = q / sqrt(D) to 16 bits. c may be rounded, since it is the same for the whole row.
    - The sums are split over the product's spare columns, so that their roundings average out.
    """
    heads, size = q.shape[1:]
    scale = size**-0.5
    queries, keys = q.transpose(0, 1), k.transpose(0, 1)  # [heads, S or T, D]
    scaled, centre = queries.float() * scale, keys.float().mean(1, keepdim=True)
    radius = torch.linalg.vector_norm(keys - centre, dim=-1).amax(-1)[:, None]
    spread = torch.linalg.vector_norm(scaled, dim=-1) * radius
    bound = torch.linalg.vecdot(scaled, centre) + spread
    margin = MARGIN + bound.abs() / 128  # the second term covers the rounding of c
    safe = ((spread + margin).amax(-1) <= REACH).tolist()

    exact = math.frexp(scale)[0] == 0.5  # a power of two scales without rounding: lo = 0
    left = q.new_empty(heads, len(q), size + 1 if exact else 2 * size + 1)
    left[..., :size] = scaled
    left[..., -1] = bound + margin
    if not exact:
        left[..., size:-1] = scaled - left[..., :size].float()
    right = torch.cat([keys] * (1 if exact else 2) + [-torch.ones_like(keys[..., :1])], -1)
    parts = 16 - size % 16
    whole: dict[str, Any] = {"dtype": torch.int64, "device": k.device}
    sums = torch.arange(len(k), **whole) % parts == torch.arange(parts, **whole)[:, None]
    values = torch.cat([v.permute(1, 2, 0), sums.to(q.dtype).expand(heads, -1, -1)], 1)  # [heads, D + parts, T]

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for h in range(heads):
        if not safe[h]:
            out[:, h] = _sdpa(q[None, :, h, None], k[None, :, h, None], v[None, :, h, None])[0]
            continue
        for rows in _chunks(len(q), len(k)):
            weights = onednn.matmul(left[h, rows], right[h], None, "sigmoid")
            total = onednn.matmul(weights, values[h], None).float()
            out[rows, h] = total[:, :size] / total[:, size:].sum(-1, keepdim=True)
    return out.flatten(1)


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows with about CHUNK scores each."""
    step = max(CHUNK // columns, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]
