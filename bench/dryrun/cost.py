"""The cost of a launch: its kind, bytes and operations, and the copies that a GPU's library adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.dryrun.accesses import Access, accesses, multiplies

KINDS = (
    *("convolution", "linear", "attention", "group norm", "layer norm", "geglu", "bias", "residual"),
    *("upsample", "copy", "update", "elementwise"),
)
# Copies that ops ask for when an operand's layout does not suit them.
HIDDEN = ("clone", "_to_copy", "contiguous", "copy_")
# Operations that write to an operand without reading it.
OVERWRITES = ("copy_", "fill_", "zero_", "div", "mul", "mm", "bmm")
BIAS = "add: bias"
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "linear")
BY_OP = {"flash_attn": "attention", "groupnorm_silu": "group norm", "layernorm": "layer norm", "advance": "update"}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of products, and exponentials."""

    flops: float = 0.0
    exps: float = 0.0


NOTHING = Operations()


def place(x: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Equal for two tensors that are the same memory."""
    return x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)


def size(x: torch.Tensor) -> int:
    """The bytes of a tensor's elements; a repeated element counts once."""
    return prod(n for n, stride in zip(x.shape, x.stride()) if stride) * x.element_size()


def kind_of(name: str, op: str, hidden: bool, inputs: list[torch.Tensor]) -> str:
    """The kind of a launch of PyTorch's, of `KINDS`.

    op: the file of fastsd/kernels that launches it.
    """
    if hidden or name in ("copy_", "clone", "_to_copy", "cat", "constant_pad_nd"):
        return "copy"
    if name == BIAS:
        return "bias"
    if op in BY_OP:
        return BY_OP[op]
    if name == "convolution" or name.startswith("cudnn_convolution"):
        return "convolution"
    if name in PRODUCTS:
        return "linear"
    if name.startswith("upsample"):
        return "upsample"
    if name in ("add", "add_"):
        if inputs[0].dtype == torch.int64:
            return "update"  # of the row's number
        maps = len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0].ndim > 2
        return "residual" if maps else "elementwise"
    return "elementwise"


def kind_of_kernel(kernel: Any, op: str, values: dict[str, Any]) -> str:
    """The kind of a launch of one of our kernels."""
    if op in BY_OP:
        return BY_OP[op]
    if kernel.fn.__module__.endswith("_fp8"):  # what quantises an activation
        return "elementwise"
    if multiplies(kernel) or op == "linear":
        return "convolution" if op in ("conv2d", "conv2d_fp8", "upsample2x") else "linear"
    if op == "geglu":
        return "geglu"
    return "residual" if isinstance(values.get("residual_ptr"), torch.Tensor) else "bias"


def aten_operations(name: str, args: Any, results: list[torch.Tensor]) -> Operations:
    """The products of one of PyTorch's operations."""
    if name == "convolution":
        return Operations(2.0 * results[0].numel() * prod(args[1].shape[1:]))
    if name == "scaled_dot_product_attention":
        q, k = args[:2]
        scores = q.numel() // q.shape[-1] * k.shape[-2]
        return Operations(4.0 * scores * q.shape[-1], scores)
    if name in PRODUCTS:
        left = args[1] if name.startswith(("addmm", "baddbmm")) else args[0]
        return Operations(2.0 * left.numel() * results[0].shape[-1])
    return NOTHING


def rearranged(name: str, args: Any) -> Iterator[torch.Tensor]:
    """The operands that a library copies to another layout before it starts.

    cuDNN wants both operands of a convolution in the layout of either; a matrix of cuBLAS needs rows or columns without
    gaps; `addmm` of a matrix that is not its result copies it there (at::native: ConvShared.cpp, cuda/Blas.cpp).
    """
    if name == "convolution":
        wanted = layout_of_cudnn(*args[:2])
        yield from (t for t in args[:2] if not t.is_contiguous(memory_format=wanted))
    elif name in PRODUCTS:
        added = name.startswith(("addmm", "baddbmm"))
        yield from (t for t in args[added : added + 2] if not _is_matrix(t))
        if added and not name.endswith("_") and (args[0].ndim > 1 or not args[0].is_contiguous()):
            yield args[0]


def layout_of_cudnn(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The layout of a convolution's operands and of its result (at::native::cudnn_conv_suggest_memory_format)."""
    last = any(suggest_memory_format(t) == torch.channels_last for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _is_matrix(x: torch.Tensor) -> bool:
    rows, columns = x.shape[-2:]
    down, across = x.stride()[-2:]
    return (across == 1 and down >= max(columns, 1)) or (down == 1 and across >= max(rows, 1))


def tensor_of(x: Any) -> torch.Tensor | None:
    """The tensor of a launch's argument: itself, or the one that a descriptor describes."""
    x = x.base if isinstance(x, TensorDescriptor) else x
    return x if isinstance(x, torch.Tensor) else None


def pointers(kernel: Any, values: dict[str, Any]) -> dict[str, Access]:
    """How the kernel uses each of its tensors.

    Raises:
        ValueError: its source does not say.
    """
    known = accesses(kernel)
    used = {key: known.get(key, frozenset()) for key, x in values.items() if tensor_of(x) is not None}
    unclear = [key for key, access in used.items() if not access]
    if unclear:
        raise ValueError(f"{kernel.fn.__name__}: what is read or written through {', '.join(unclear)} is not clear")
    return used


def _attention(values: dict[str, Any]) -> Operations:
    batch, queries, heads, width = values["q_ptr"].shape
    scores = batch * queries * heads * values["k_ptr"].shape[1] * (0.5 if values.get("CAUSAL") else 1.0)
    return Operations(4.0 * scores * width, scores)


def _convolution(values: dict[str, Any]) -> Operations:
    results = values["out_ptr"].numel() // values["SPLITS"]
    return Operations(2.0 * results * values["C"] * values["KH"] * values["KW"])


def _one_each(key: str) -> Callable[[dict[str, Any]], Operations]:
    return lambda values: Operations(0.0, float(values[key].numel()))


def _linear(values: dict[str, Any]) -> Operations:
    results, products = values["M"] * values["N"], values["UNIT"] * (values["K1"] + values["K2"])
    gated = bool(values["GATED"])
    return Operations(2.0 * results * products * (1 + gated), float(results * gated))


# The products and exponentials of our kernels, from their arguments. A kernel that multiplies matrices has to be here.
OPERATIONS: dict[str, Callable[[dict[str, Any]], Operations]] = {
    "_flash_attn_kernel": _attention,
    "_few_keys_kernel": _attention,
    "_softmax_kernel": _one_each("scores_ptr"),
    "_geglu_kernel": _one_each("out_ptr"),
    "_groupnorm_silu_kernel": _one_each("out_ptr"),
    "_groupnorm_apply_kernel": _one_each("out_ptr"),
    "_linear_kernel": _linear,
    "_conv2d_tma_kernel": _convolution,
    "_conv2d_pointers_kernel": _convolution,
}


def kernel_operations(kernel: Any, values: dict[str, Any]) -> Operations:
    """The products and exponentials of a launch of one of our kernels.

    Raises:
        ValueError: the kernel multiplies matrices, and `OPERATIONS` does not say how many.
    """
    name = kernel.fn.__name__
    if name not in OPERATIONS and multiplies(kernel):
        raise ValueError(f"{name}: say in bench/dryrun/cost.py, OPERATIONS, how much it multiplies")
    return OPERATIONS[name](values) if name in OPERATIONS else NOTHING
