"""`upsample2x_conv` on the GPU: four 2 x 2 convolutions of the small map, one for each parity of row and column.

A 3 x 3 kernel on the doubled map reads two rows of the small one: (i - 1, i, i) for even rows of the result,
(i, i, i + 1) for odd ones. The weights that read the same row are summed, which leaves 4 products of 9. They are summed
again in each call, since weights change in place under captured graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastsd.kernels.launch import OPTIONS
from fastsd.kernels.launch.conv2d import ConvBoxes, ConvPointers
from fastsd.kernels.triton.conv2d import Convolution, refusal

BLOCK = 512  # input channels of a program


@triton.jit
def _sum_phases_kernel(
    w_ptr,  # [N, 3, 3, C]
    phases_ptr,  # [4, N, 2, 2, C]
    N,
    C,
    BLOCK_C: tl.constexpr,
):
    n = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w_ptr += n.to(tl.int64) * 9 * C
    for odd_row in tl.static_range(2):
        for odd_column in tl.static_range(2):
            phase_ptr = phases_ptr + ((odd_row * 2 + odd_column) * N + n).to(tl.int64) * 4 * C
            for row in tl.static_range(2):
                for column in tl.static_range(2):
                    total = tl.zeros([BLOCK_C], tl.float32)
                    for dy in tl.static_range(3):
                        for dx in tl.static_range(3):
                            # Taps in order: 0 | 1 2 for even results, 0 1 | 2 for odd ones.
                            if (dy + 1 - odd_row) // 2 == row and (dx + 1 - odd_column) // 2 == column:
                                total += tl.load(w_ptr + (dy * 3 + dx) * C + c, mask=c < C, other=0.0).to(tl.float32)
                    pointers = phase_ptr + (row * 2 + column) * C + c
                    tl.store(pointers, total.to(phases_ptr.dtype.element_ty), mask=c < C)


def sum_phases(weight: torch.Tensor) -> torch.Tensor:
    """The kernels of even and odd rows and columns, `[4, N, 2, 2, C]`, from `[N, C, 3, 3]` in channels-last memory;
    summed in fp32, rounded once."""
    outputs, inputs = weight.shape[:2]
    phases = torch.empty(4, outputs, 2, 2, inputs, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        _sum_phases_kernel[(outputs, -(-inputs // BLOCK))](
            *(weight, phases, outputs, inputs), BLOCK_C=BLOCK, num_warps=4, **OPTIONS
        )
    return phases


def upsample2x_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    launch: ConvBoxes | ConvPointers | None = None,
) -> torch.Tensor:
    """`conv(upsample2x(x), weight) + bias`; see `fastsd.kernels.upsample2x` for the specification.

    Args:
        x: `[B, H, W, C]` contiguous, fp16 or bf16.
        weight: `[N, C, 3, 3]` in channels-last memory; finite. Sums of its taps are rounded to its dtype.
        bias: `[N]`.
        launch: overrides the launch table.

    Returns:
        `[B, 2H, 2W, N]` contiguous, in the dtype of `x`.

    Raises:
        ValueError: the reason of `refusal`.
    """
    reason = refusal(x, weight, bias, 1, (1, 1, 1, 1))
    if reason is None and weight.shape[2:] != (3, 3):
        reason = f"weight is {list(weight.shape)}; it needs [N, C, 3, 3]"
    if reason is not None:
        raise ValueError(f"upsample2x_conv: {reason}")
    size = (x.shape[1], x.shape[2])
    return Convolution(x, sum_phases(weight), bias, None, "none", size, 1, (1, 1), x.dtype).run(launch)
