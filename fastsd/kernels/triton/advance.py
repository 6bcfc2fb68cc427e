"""`advance` on the GPU: guidance, prediction, update of the latent, history and next input in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.rowwise import RowwiseLaunch
from fastsd.kernels.launch.rowwise import advance as choose

WIDTH = 16  # floats in a row of the table


@triton.jit
def _advance_kernel(
    x_ptr,  # [N, L] fp32, L elements per image
    x_in_ptr,  # [N, L]
    out_ptr,  # [PARTS * N, L]
    table_ptr,  # [R + 1, 16] fp32
    row_ptr,  # [1] int64
    saved_ptr,  # [N, L] fp32
    history_ptr,  # [3, N, L] fp32
    noise_ptr,  # [2, N, L] fp32
    guidance,  # a number, or [1] fp32
    rescale_ptr,  # [N] fp32 or None
    image_guidance,  # like guidance; read with three parts
    NL,
    L,
    PARTS: tl.constexpr,
    GUIDANCE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < NL
    row = tl.load(row_ptr)
    coefficients = table_ptr + row * 16
    p, q = tl.load(coefficients + 2), tl.load(coefficients + 3)
    a, s = tl.load(coefficients + 4), tl.load(coefficients + 5)
    b0, b1 = tl.load(coefficients + 6), tl.load(coefficients + 7)
    b2, b3 = tl.load(coefficients + 8), tl.load(coefficients + 9)
    n, m = tl.load(coefficients + 10), tl.load(coefficients + 11)
    # As vectors: the interpreter cannot combine a scalar condition with a mask.
    zeros = tl.zeros([BLOCK], tl.float32)
    saves, pushes = zeros + tl.load(coefficients + 12) > 0, zeros + tl.load(coefficients + 13) > 0
    c_in_next = tl.load(coefficients + 17)

    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    guided = tl.load(out_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 1:
        scale = tl.load(guidance) if GUIDANCE_ON_DEVICE else guidance
        second = tl.load(out_ptr + NL + i, mask=mask, other=0.0).to(tl.float32)
        if PARTS == 2:
            guided = guided + scale * (second - guided)
        else:
            cond = tl.load(out_ptr + 2 * NL + i, mask=mask, other=0.0).to(tl.float32)
            image_scale = tl.load(image_guidance) if GUIDANCE_ON_DEVICE else image_guidance
            guided = guided + scale * (cond - second) + image_scale * (second - guided)
        if rescale_ptr is not None:
            guided *= tl.load(rescale_ptr + i // L, mask=mask, other=0.0)
    denoised = p * x + q * guided
    saved = tl.load(saved_ptr + i, mask=mask, other=0.0)
    saved = tl.where(saves, x, saved)
    h0 = tl.load(history_ptr + i, mask=mask, other=0.0)
    h1 = tl.load(history_ptr + NL + i, mask=mask, other=0.0)
    h2 = tl.load(history_ptr + 2 * NL + i, mask=mask, other=0.0)
    noise = tl.load(noise_ptr + i, mask=mask, other=0.0)
    last = tl.load(noise_ptr + NL + i, mask=mask, other=0.0)
    x = a * x + s * saved + (b0 * denoised + b1 * h0 + b2 * h1 + b3 * h2) + (n * noise + m * last)

    tl.store(x_ptr + i, x, mask=mask)
    tl.store(x_in_ptr + i, (c_in_next * x).to(x_in_ptr.dtype.element_ty), mask=mask)
    tl.store(saved_ptr + i, saved, mask=mask & saves)
    tl.store(history_ptr + i, denoised, mask=mask & pushes)
    tl.store(history_ptr + NL + i, h0, mask=mask & pushes)
    tl.store(history_ptr + 2 * NL + i, h1, mask=mask & pushes)
    tl.store(noise_ptr + NL + i, noise, mask=mask)


def advance(
    x: torch.Tensor,
    x_in: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    row: torch.Tensor,
    saved: torch.Tensor,
    history: torch.Tensor,
    noise: torch.Tensor,
    guidance: float | torch.Tensor,
    rescale: torch.Tensor | None = None,
    image_guidance: float | torch.Tensor | None = None,
    launch: RowwiseLaunch | None = None,
) -> None:
    """Apply row `row` of `table` in place; see `fastsd.kernels.advance` for the specification and the buffers.

    All buffers are contiguous. x, saved, history, noise, table, rescale and the guidances, if tensors, are fp32; x_in
    and out are fp16, bf16 or fp32. A captured graph keeps a guidance that is a number, and reads one that is a tensor;
    both guidances are of one kind.

    Raises:
        ValueError: shapes, strides or dtypes that the kernel does not take, or gradients, which it lacks.
    """
    parts = _count_parts(x, out, guidance, image_guidance)
    if x_in.shape != x.shape or saved.shape != x.shape:
        raise ValueError("advance: x_in and saved need the shape of x")
    if history.shape != (3, *x.shape) or noise.shape != (2, *x.shape):
        raise ValueError("advance: history needs shape [3, *x] and noise [2, *x]")
    if table.ndim != 2 or table.shape[1] != WIDTH or row.shape != (1,) or row.dtype != torch.int64:
        raise ValueError(f"advance: table needs shape [R + 1, {WIDTH}] and row [1] int64")
    if rescale is not None and rescale.shape != (len(x),):
        raise ValueError(f"advance: rescale is {list(rescale.shape)}; it needs [{len(x)}]")
    wide = [x, table, saved, history, noise, *([] if rescale is None else [rescale])]
    wide += [scale for scale in (guidance, image_guidance) if isinstance(scale, torch.Tensor)]
    if any(t.dtype != torch.float32 for t in wide):
        raise ValueError("advance: x, table, saved, history, noise, rescale and guidance need to be float32")
    if not all(t.is_contiguous() for t in (*wide, x_in, out)):
        raise ValueError("advance: every buffer needs to be contiguous")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*wide, out)):
        raise ValueError("advance: the kernel has no gradients; use the torch backend for training")
    if x.numel() == 0:
        return
    launch = launch or choose(architecture.class_of(x.device))
    with torch.cuda.device_of(x):
        _advance_kernel[(-(-x.numel() // launch.block_columns),)](
            *(x, x_in, out, table, row, saved, history, noise, guidance, rescale),
            guidance if image_guidance is None else image_guidance,
            x.numel(),
            x.numel() // len(x),
            PARTS=parts,
            GUIDANCE_ON_DEVICE=isinstance(guidance, torch.Tensor),
            BLOCK=launch.block_columns,
            num_warps=launch.warps,
            **OPTIONS,
        )


def _count_parts(
    x: torch.Tensor, out: torch.Tensor, guidance: float | torch.Tensor, image_guidance: float | torch.Tensor | None
) -> int:
    """How many outputs there are of each image, 1 to 3; a ValueError where they or the guidances do not fit."""
    if out.shape[1:] != x.shape[1:] or out.shape[0] not in (len(x), 2 * len(x), 3 * len(x)):
        raise ValueError(
            f"advance: out is {list(out.shape)}; x is {list(x.shape)}: out needs once, twice or three times its batch"
        )
    parts = len(out) // max(len(x), 1)
    if (image_guidance is not None) != (parts == 3):
        raise ValueError("advance: image_guidance belongs to an out of three times the batch, and to no other")
    for name, scale in (("guidance", guidance), ("image_guidance", image_guidance)):
        if isinstance(scale, torch.Tensor) and scale.numel() != 1:
            raise ValueError(f"advance: {name} has {scale.numel()} elements; it needs 1")
    if image_guidance is not None and isinstance(guidance, torch.Tensor) != isinstance(image_guidance, torch.Tensor):
        raise ValueError("advance: guidance and image_guidance need to be both numbers or both tensors")
    return parts
