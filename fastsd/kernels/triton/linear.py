"""`linear` and `geglu` on the GPU: a product of rows by rows, with what follows it done before it is written.

Operands come by TMA (tensor descriptors) on sm_90 and later, by asynchronous copies before. Sums are fp32, and are
rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastsd.kernels import dispatch
from fastsd.kernels.launch import OPTIONS, architecture
from fastsd.kernels.launch.linear import EXACT, UNUSED, Gemm, choose
from fastsd.kernels.launch.rowwise import row_stride
from fastsd.kernels.triton.linear_tiles import add_products, finish, gelu, scaled, with_bias

# Triton's interpreter multiplies the bits of bf16 values as integers.
DTYPES = (torch.float16, *(() if dispatch.interpreted() else (torch.bfloat16,)))
UNIT = 8  # elements of 16 bytes: what strides and K are counted in, so that the compiler loads whole vectors
GROUP = 8  # rows of tiles whose programs are neighbours
SUM_BLOCK = 256  # elements of a program that sums the parts of a split product


@triton.jit
def place_of(program, rows, columns, GROUP: tl.constexpr):
    """The row and column of a program's tile: GROUP rows at a time, so that their operands stay in the cache."""
    per_group = GROUP * columns
    first = program // per_group * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + program % per_group % height, program % per_group // height


@triton.jit(do_not_specialize=["M", "K1", "K2", "per_split", "stride_x", "stride_skip", "stride_w"])
def _linear_kernel(
    x,  # [M, K1], a descriptor of it with TMA
    skip,  # [M, K2] or None
    w,  # [N or 2 N, K1 + K2], with TMA a descriptor with COLUMNS1 rows
    w2,  # the same, with TMA a descriptor with COLUMNS2 rows
    bias_ptr,  # [N or 2 N] or None
    residual_ptr,  # [M, N] or None
    scale_x_ptr,  # [M] fp32, of operands in fp8; otherwise None
    scale_w_ptr,  # [N or 2 N] fp32
    out_ptr,  # [M, N]; with PARTIAL [splits, M, N] fp32
    M,
    N,
    K1,  # these three in units
    K2,
    per_split,  # columns that a program sums, a multiple of DEPTH
    stride_x,  # in units, too
    stride_skip,
    stride_w,
    stride_r,
    ROWS: tl.constexpr,
    COLUMNS1: tl.constexpr,
    COLUMNS2: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    TMA: tl.constexpr,
    GATED: tl.constexpr,  # geglu: the second tile is the gate of the first
    PARTIAL: tl.constexpr,  # write sums over a part of K, which another launch adds
    EXACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    WIDTH: tl.constexpr = COLUMNS1 if GATED else COLUMNS1 + COLUMNS2  # columns of the result
    tile_row, tile_column = place_of(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, WIDTH), GROUP)
    first, column1 = tile_row * ROWS, tile_column * WIDTH
    column2 = column1 + (N if GATED else COLUMNS1)
    W = 2 * N if GATED else N
    K1, K2 = K1 * UNIT, K2 * UNIT
    acc1 = tl.zeros([ROWS, COLUMNS1], tl.float32)
    acc2 = acc1  # a placeholder: Triton 3.6 does not compile a function that returns None
    if COLUMNS2 > 0:
        acc2 = tl.zeros([ROWS, COLUMNS2], tl.float32)
    begin, end = 0, K1
    if PARTIAL:
        begin = tl.program_id(1) * (per_split * UNIT)
        end = tl.minimum(K1, begin + per_split * UNIT)
        out_ptr += tl.program_id(1).to(tl.int64) * M * N
    acc1, acc2 = add_products(
        *(acc1, acc2, x, w, w2, first, column1, column2, begin, end, 0, M, W, K1, K1 + K2, stride_x, stride_w),
        *(ROWS, COLUMNS1, COLUMNS2, DEPTH, UNIT, TMA, EXACT),
    )
    if skip is not None:
        acc1, acc2 = add_products(
            *(acc1, acc2, skip, w, w2, first, column1, column2, 0, K2, K1, M, W, K2, K1 + K2, stride_skip, stride_w),
            *(ROWS, COLUMNS1, COLUMNS2, DEPTH, UNIT, TMA, EXACT),
        )
    row, c1 = first + tl.arange(0, ROWS), column1 + tl.arange(0, COLUMNS1)
    acc1 = scaled(acc1, scale_x_ptr, scale_w_ptr, row, c1, row < M, c1 < N)
    if GATED:
        acc2 = scaled(acc2, scale_x_ptr, scale_w_ptr, row, N + c1, row < M, c1 < N)
        value = with_bias(acc1, bias_ptr, c1, c1 < N)
        gate = with_bias(acc2, bias_ptr, N + c1, c1 < N)
        finish(value * gelu(gate), None, residual_ptr, out_ptr, row, c1, M, N, stride_r, "none")
    else:
        finish(acc1, bias_ptr, residual_ptr, out_ptr, row, c1, M, N, stride_r, ACTIVATION)
        if COLUMNS2 > 0:
            c2 = column2 + tl.arange(0, COLUMNS2)
            acc2 = scaled(acc2, scale_x_ptr, scale_w_ptr, row, c2, row < M, c2 < N)
            finish(acc2, bias_ptr, residual_ptr, out_ptr, row, c2, M, N, stride_r, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def _linear_sum_kernel(
    part_ptr,  # [SPLITS, M, N] fp32
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    M,
    N,
    stride_r,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the parts of a split product in their order, then what follows a product."""
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part_ptr += row.to(tl.int64)[:, None] * N + column[None, :]
    acc = tl.zeros([1, BLOCK_N], tl.float32)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(part_ptr, mask=(column < N)[None, :], other=0.0)
        part_ptr += M.to(tl.int64) * N
    finish(acc, bias_ptr, residual_ptr, out_ptr, row, column, M, N, stride_r, ACTIVATION)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    launch: Gemm | None = None,
) -> torch.Tensor:
    """`fastsd.kernels.linear.linear`; `launch` overrides the launch table.

    Raises:
        ValueError: arguments that the kernel does not take, see `refuses`.
    """
    reason = refuses(x, weight, bias, activation, residual, skip)
    if reason is not None:
        raise ValueError(f"linear: {reason}")
    return multiply(Product(x, weight, x.dtype, bias, activation, residual, skip), launch)


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, launch: Gemm | None = None) -> torch.Tensor:
    """`fastsd.kernels.geglu.geglu` with its product in one launch; `launch` overrides the launch table.

    Raises:
        ValueError: arguments that the kernel does not take, see `refuses`.
    """
    reason = refuses(x, weight, bias, op="geglu")
    if reason is not None:
        raise ValueError(f"geglu: {reason}")
    return multiply(Product(x, weight, x.dtype, bias, gated=True), launch)


def refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    op: str = "linear",
) -> str | None:
    """Why the kernel does not take these arguments of `linear` or, with `op`, of `geglu`; None if it does."""
    unused = UNUSED.get(architecture.class_of(x.device))
    if unused is not None:
        return unused
    operands = {"x": x, "skip": skip, "weight": weight}
    others = {"bias": bias, "residual": residual}
    tensors = {name: tensor for name, tensor in (operands | others).items() if tensor is not None}
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernel takes {' and '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, x is {x.dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        return "the kernel has no gradients; use the torch backend for training"
    rows, columns = x.numel() // max(x.shape[-1], 1), len(weight) // (2 if op == "geglu" else 1)
    depth = x.shape[-1] + (0 if skip is None else skip.shape[-1])
    shapes = {"weight": (len(weight), depth), "bias": (len(weight),), "residual": (*x.shape[:-1], columns)}
    if skip is not None:
        shapes["skip"] = (*x.shape[:-1], skip.shape[-1])
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            return f"{name} has shape {list(tensors[name].shape)}; it needs {list(shape)}"
    if not rows or not columns or (op == "geglu" and len(weight) % 2):
        return f"{rows} rows, a weight of {len(weight)} rows; an empty product, or value and gate of unequal size"
    return _misplaced(tensors)


def _misplaced(tensors: dict[str, torch.Tensor]) -> str | None:
    """Why the kernel cannot read these tensors where they are in memory."""
    if "bias" in tensors and not tensors["bias"].is_contiguous():
        return "bias is not contiguous"
    for name in ("x", "skip", "weight", "residual"):
        if name not in tensors:
            continue
        tensor = tensors[name]
        try:
            stride = row_stride(name, tensor)
        except ValueError as error:
            return str(error)
        # Memory that PyTorch allocates begins at a multiple of 16 bytes.
        if name != "residual" and (tensor.shape[-1] % UNIT or stride % UNIT or tensor.storage_offset() % UNIT):
            return (
                f"{name} has {tensor.shape[-1]} columns, {stride} elements from row to row and begins at element "
                f"{tensor.storage_offset()}; the kernel needs multiples of {UNIT}"
            )
    return None


@dataclass(frozen=True)
class Product:
    """The product of rows by rows that a launch computes, and what follows it.

    Attributes:
        x: `[..., K1]`; weight: `[N or 2 N, K1 + K2]`; both as `refuses` wants them, or both fp8, in multiples of 16.
        dtype: of the result, bias and residual.
        gated: as `geglu`.
        scales: of fp8 operands, `[rows]` and `[N or 2 N]` fp32.
    """

    x: torch.Tensor
    weight: torch.Tensor
    dtype: torch.dtype
    bias: torch.Tensor | None = None
    activation: str = "none"
    residual: torch.Tensor | None = None
    skip: torch.Tensor | None = None
    gated: bool = False
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @property
    def rows(self) -> int:
        return self.x.numel() // self.x.shape[-1]

    @property
    def columns(self) -> int:
        return len(self.weight) // (2 if self.gated else 1)


def multiply(product: Product, launch: Gemm | None = None) -> torch.Tensor:
    """The result, `[..., N]`; `launch` overrides the launch table."""
    x, rows, columns = product.x, product.rows, product.columns
    if launch is None:
        key = rows, columns, product.weight.shape[1], int(product.gated), x.element_size()
        launch = choose(architecture.class_of(x.device), *key)
    steps = -(-x.shape[-1] // launch.depth)
    # A skip input has its own loop over K, and is not split. Every split has a step, also if they do not divide.
    per_split = -(-steps // launch.splits) if product.skip is None else steps
    splits = -(-steps // per_split)
    out = torch.empty(*x.shape[:-1], columns, dtype=product.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if splits == 1:
            _launch(launch, product, out)
            return out
        parts = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
        _launch(launch, replace(product, bias=None, residual=None, activation="none"), parts, per_split)
        block = min(triton.next_power_of_2(columns), SUM_BLOCK)
        _linear_sum_kernel[(rows, -(-columns // block))](
            *(parts, product.bias, product.residual, out, rows, columns, _stride(product.residual)),
            SPLITS=splits,
            BLOCK_N=block,
            ACTIVATION=product.activation,
            num_warps=2,
            **OPTIONS,
        )
    return out


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else row_stride("", x)


def _launch(launch: Gemm, product: Product, out: torch.Tensor, per_split: int = 0) -> None:
    """per_split: the iterations of a split, for `out` `[splits, rows, N]`; 0 if K is not split."""
    x, skip, weight = product.x, product.skip, product.weight
    unit, key = UNIT * 2 // x.element_size(), architecture.class_of(x.device)
    width = launch.columns if product.gated else launch.columns + launch.more
    tiles = -(-product.rows // launch.rows) * -(-product.columns // width)

    def operand(tensor: torch.Tensor | None, block: int) -> torch.Tensor | TensorDescriptor | None:
        if tensor is None or not launch.tma:
            return tensor
        stride = _stride(tensor) or tensor.shape[-1]  # of one row: any
        shape = [tensor.numel() // tensor.shape[-1], tensor.shape[-1]]
        return TensorDescriptor(tensor, shape, [stride, 1], [block, launch.depth])

    _linear_kernel[(tiles, len(out) if per_split else 1)](
        *(operand(x, launch.rows), operand(skip, launch.rows)),
        *(operand(weight, launch.columns), operand(weight, launch.more or launch.columns)),
        *(product.bias, product.residual, *product.scales, out, product.rows, product.columns),
        *(x.shape[-1] // unit, 0 if skip is None else skip.shape[-1] // unit, per_split * launch.depth // unit),
        *(*(_stride(tensor) // unit for tensor in (x, skip, weight)), _stride(product.residual)),
        ROWS=launch.rows,
        COLUMNS1=launch.columns,
        COLUMNS2=launch.more,
        DEPTH=launch.depth,
        GROUP=GROUP,
        UNIT=unit,
        TMA=launch.tma,
        GATED=product.gated,
        PARTIAL=per_split > 0,
        EXACT=min(EXACT[key], launch.depth) if x.element_size() == 1 and key in EXACT else None,
        ACTIVATION=product.activation,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **OPTIONS,
    )
