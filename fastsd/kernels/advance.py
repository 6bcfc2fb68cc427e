"""One step of any sampler: guidance, prediction, update of the latent, next model input.

The coefficients come from a device table by a row index on the device, so one captured graph serves every step. Row
format (`fastsd.sampling.table` explains the columns), 16 floats: t, c_in, p, q, a, s, b0, b1, b2, b3, n, m, save,
push, 0, 0. One row follows the sampler's last: its c_in scales the final latent.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp, OpCandidate
from fastsd.kernels.launch import architecture, variants
from fastsd.kernels.launch.rowwise import RowwiseLaunch

WIDTH = 16  # floats in a row: one 64-byte line


Scale = float | torch.Tensor  # a number, or a one-element tensor


def guided(
    out: torch.Tensor,
    batch: int,
    guidance: Scale,
    rescale: torch.Tensor | None,
    image_guidance: Scale | None = None,
) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6): `uncond + g * (cond - uncond)`, times `rescale`.

    With three parts, for a text and an image (Brooks et al. 2023, InstructPix2Pix, equation 3):
    `uncond + g * (cond - image) + image_guidance * (image - uncond)`. Perturbed-attention guidance is brought to this
    form by `fastsd.generate.samples`.

    out: `[2N, ...]`, unconditional first; `[3N, ...]`, then with the image alone, then with both; or `[N, ...]`, which
    is returned unguided. rescale: `[N]` or None. Returns `[N, ...]` in fp32 (float64 stays).
    """
    out = dispatch.widen(out)
    if out.shape[0] == batch:
        return out
    if image_guidance is None:
        uncond, cond = out.chunk(2)
        result = uncond + guidance * (cond - uncond)
    else:
        uncond, image, cond = out.chunk(3)
        result = uncond + guidance * (cond - image) + image_guidance * (image - uncond)
    return result if rescale is None else result * rescale.view(-1, *(1,) * (out.ndim - 1))


def guidance_rescale(
    out: torch.Tensor, guidance: Scale, phi: Scale, image_guidance: Scale | None = None
) -> torch.Tensor:
    """The factor `[N]` that reduces the guided output to the spread of the conditional one.

    phi * std(cond) / std(guided) + 1 - phi, standard deviations over all of one sample (Lin et al. 2024, equations
    14-16). out: `[2N, ...]` or `[3N, ...]` as in `guided`. Returns fp32 (float64 stays); 1 for a guided output without
    spread.
    """
    cond = dispatch.widen(out).chunk(2 if image_guidance is None else 3)[-1]
    mixed = guided(out, cond.shape[0], guidance, None, image_guidance)
    # Sample by sample: the order of a sum over a batch may depend on the size of the batch.
    factors = [
        torch.where(m.std() > 0, phi * c.std() / m.std() + (1 - phi), torch.ones_like(m.std()))
        for c, m in zip(cond, mixed)
    ]
    return torch.stack(factors).view(-1)


def advance_ref(
    x: torch.Tensor,
    x_in: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    row: torch.Tensor,
    saved: torch.Tensor,
    history: torch.Tensor,
    noise: torch.Tensor,
    guidance: Scale,
    rescale: torch.Tensor | None,
    image_guidance: Scale | None = None,
) -> None:
    """The specification of `advance`, in the dtype of `x`."""
    coefficients = table.index_select(0, row)[0].to(x.dtype)
    _, _, p, q, a, s, b0, b1, b2, b3, n, m, save, push, _, _ = coefficients.unbind()
    denoised = p * x + q * guided(out, x.shape[0], guidance, rescale, image_guidance).to(x.dtype)
    saved.copy_(torch.where(save > 0, x, saved))
    x.copy_(
        a * x
        + s * saved
        + (b0 * denoised + b1 * history[0] + b2 * history[1] + b3 * history[2])
        + (n * noise[0] + m * noise[1])
    )
    history.copy_(torch.where(push > 0, torch.stack([denoised, history[0], history[1]]), history))
    noise[1].copy_(noise[0])
    x_in.copy_(table.index_select(0, row + 1)[0, 1].to(x.dtype) * x)


def advance(
    x: torch.Tensor,
    x_in: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    row: torch.Tensor,
    saved: torch.Tensor,
    history: torch.Tensor,
    noise: torch.Tensor,
    guidance: Scale,
    rescale: torch.Tensor | None = None,
    image_guidance: Scale | None = None,
) -> None:
    """Apply row `row` of `table` in place. The caller increments the row index.

        saved = x where the row saves;  D = p x + q guided(out)
        x = a x + s saved + b0 D + b1 history[0] + b2 history[1] + b3 history[2] + n noise[0] + m noise[1]
        history = (D, history[0], history[1]) where the row pushes;  noise[1] = noise[0]
        x_in = c_in of the next row * x

    Args:
        x, saved: `[N, h, w, C]` fp32 (float64 in tests).
        x_in: `[N, h, w, C]`, any floating dtype.
        out: `[N, h, w, C]`, `[2N, h, w, C]` or `[3N, h, w, C]` as in `guided`, any floating dtype.
        table: `[R + 1, 16]` fp32.
        row: `[1]` int64, 0 to R - 1.
        history: `[3, N, h, w, C]`, zero before the first row.
        noise: `[2, N, h, w, C]`, this row's and the previous row's.
        guidance: a number or a one-element tensor; not used if `out` is `[N, h, w, C]`.
        rescale: `[N]` of `guidance_rescale`, or None.
        image_guidance: the image's, a number or a one-element tensor, where `out` is `[3N, h, w, C]`; else None.

    Raises:
        ValueError: buffers whose shapes or dtypes do not fit `x`.
    """
    if out.shape[1:] != x.shape[1:] or out.shape[0] not in (len(x), 2 * len(x), 3 * len(x)):
        raise ValueError(
            f"out is {list(out.shape)}; x is {list(x.shape)}: out needs once, twice or three times its batch"
        )
    if (image_guidance is not None) != (out.shape[0] == 3 * len(x)):
        raise ValueError("image_guidance belongs to an out of three times the batch, and to no other")
    if x_in.shape != x.shape or saved.shape != x.shape or saved.dtype != x.dtype:
        raise ValueError("x_in and saved need the shape of x, and saved its dtype")
    if history.shape != (3, *x.shape) or noise.shape != (2, *x.shape) or {history.dtype, noise.dtype} != {x.dtype}:
        raise ValueError("history needs shape [3, *x] and noise [2, *x], in the dtype of x")
    if table.ndim != 2 or table.shape[1] != WIDTH or row.shape != (1,):
        raise ValueError(f"table needs shape [R + 1, {WIDTH}] and row [1]")
    arguments = (x, x_in, out, table, row, saved, history, noise, guidance, rescale, image_guidance)
    if dispatch.backend(x, out) == "triton":
        candidates.run(OP, *arguments)
    else:
        advance_ref(*arguments)


def _by_triton(*args: Any, launch: RowwiseLaunch | None = None) -> None:
    from fastsd.kernels.triton import advance as advance_triton

    functools.partial(advance_triton.advance, launch=launch)(*args)


def _launches(thorough: bool, x: torch.Tensor, *_: Any) -> list[RowwiseLaunch]:
    return variants.rows("advance", thorough, architecture.class_of(x.device))


OP = GpuOp(
    "advance",
    advance_ref,
    (
        OpCandidate("triton", _by_triton, launches=_launches, launch_types=(RowwiseLaunch,)),
        OpCandidate("torch", advance_ref),
    ),
    in_place=(0, 1, 5, 6, 7),  # x, x_in, saved, history, noise
    unkeyed=(3,),  # the table, whose rows are the steps
)
