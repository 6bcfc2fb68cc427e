"""Which way the CPU computes an op: one table, by op, processor, dtype and size.

`python -m bench.choices` measures every way at sizes around every threshold on this machine, and names the rows that
it would change (bench/README.md). A size is that of one image, so a choice never depends on the batch. Every row was
measured in its own dtype, those of AVX2 on a newer processor that was kept to it; "other" has the rows of AVX2.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PROCESSORS = ("avx512", "avx2", "other")
WIDE_HEAD = 256  # channels of a head from which it is one of the "wide heads"


@dataclass(frozen=True)
class Ways:
    """An op that has more than one way.

    Attributes:
        size: what the thresholds count.
        ways: their names. The first is taken where the table has no row, which only a forced backend meets.
        dtypes: for each class of processor, the dtypes in which `dispatch` lets the op ask the table.
    """

    size: str
    ways: tuple[str, ...]
    dtypes: dict[str, tuple[torch.dtype, ...]]


ONEDNN: dict[str, tuple[torch.dtype, ...]] = {"avx512": (FP32, BF16), "avx2": (FP32,), "other": ()}
EVERY: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(PROCESSORS, (FP32, BF16, FP16))
OPS = {
    "flash_attn": Ways("scores of a head", ("products", "sdpa"), ONEDNN),
    "flash_attn, wide heads": Ways("scores of a head", ("products", "sdpa"), ONEDNN),
    "linear": Ways("multiplications", ("onednn", "torch"), ONEDNN),
    "geglu": Ways("multiplications", ("onednn", "torch"), ONEDNN),
    "groupnorm_silu": Ways("elements", ("moments", "contiguous", "direct"), EVERY),
    "conv2d": Ways("the least of mean channels (harmonic) and a third of the pixels", ("winograd", "direct"), ONEDNN),
    "upsample2x_conv": Ways("pixels of the small map", ("transposed", "doubling"), ONEDNN),
    "upsample2x_conv, kept weights": Ways("pixels of the small map", ("transposed", "doubling"), ONEDNN),
    "upsample2x_conv, Winograd's": Ways("pixels of the small map", ("winograd", "doubling"), ONEDNN),
}

Steps = tuple[tuple[int, str], ...]  # (least size, way), the largest size first; the last begins at 0


def _rows(op: str, first_from: dict[tuple[str, torch.dtype], float]) -> dict[tuple[str, str, torch.dtype], Steps]:
    """The rows of an op: its first way from a size on, its second below."""
    first, second = OPS[op].ways[:2]
    rows: dict[tuple[str, str, torch.dtype], Steps] = {}
    for (processor_class, dtype), size in first_from.items():
        above = () if size == NEVER else ((int(size), first),)
        rows[op, processor_class, dtype] = above if size == 0 else (*above, (0, second))
    return rows


NEVER = float("inf")
TABLE = {
    # Below the threshold, the products' Python and their sums per head cost more than they save. On AVX2 PyTorch's own
    # blocks are as fast as two products with a softmax between them, except where a head is wide.
    **_rows("flash_attn", {("avx512", FP32): 2**14, ("avx512", BF16): 2**14, ("avx2", FP32): NEVER}),
    **_rows("flash_attn, wide heads", {("avx512", FP32): 2**14, ("avx512", BF16): 2**14, ("avx2", FP32): 2**20}),
    # A call of oneDNN costs 12 µs, one of MKL 2 µs; oneDNN's fp32 products are 1.1 times as fast on AVX2, 2.1 times on
    # AVX-512. In bf16 both are oneDNN's.
    **_rows("linear", {("avx512", FP32): 2**19 + 1, ("avx512", BF16): 0, ("avx2", FP32): 2**21}),
    **_rows("geglu", {("avx512", FP32): 2**20, ("avx512", BF16): 0, ("avx2", FP32): 2**21}),
    # PyTorch's channels-last norm, where it is accurate, is the fastest; in 16 bits it is slow for few pixels. A large
    # map in it costs more passes through memory than moments do, and twice as many where its mean is too large.
    **{
        ("groupnorm_silu", p, d): ((400000, "moments"), (10000 if d == FP32 else 20000, "direct"), (0, "contiguous"))
        for p in PROCESSORS
        for d in (FP32, BF16, FP16)
    },
    # Winograd's sums of pixels, of weights and of products cost the same on both, the products half as much on AVX-512.
    **_rows("conv2d", {("avx512", FP32): 120, ("avx512", BF16): NEVER, ("avx2", FP32): 85}),
    **_rows("upsample2x_conv, Winograd's", {("avx512", FP32): 2**6, ("avx512", BF16): NEVER, ("avx2", FP32): 2**6}),
    # Summing the weights of a transposed convolution costs the same for a map of any size, and nothing where the sums
    # are kept.
    **_rows("upsample2x_conv", {("avx512", FP32): 2**10, ("avx512", BF16): 2**10, ("avx2", FP32): 2**10}),
    **_rows("upsample2x_conv, kept weights", {("avx512", FP32): 2**6, ("avx512", BF16): 2**6, ("avx2", FP32): 2**4}),
}


class _ForcedWays(threading.local):
    """The ways that are forced in this thread, by op."""

    ways: Mapping[str, str] = MappingProxyType({})


_forced = _ForcedWays()


def way(op: str, dtype: torch.dtype, size: int) -> str:
    """The way of `op` for activations of `dtype`, where one image has `size` of what `OPS[op].size` names."""
    if op in _forced.ways:
        return _forced.ways[op]
    for least, name in TABLE.get((op, processor(), dtype), ()):
        if size >= least:
            return name
    return OPS[op].ways[0]


@contextmanager
def forced(op: str, name: str) -> Iterator[None]:
    """Inside this context, `op` goes the way `name` in this thread, whatever the table says."""
    previous = _forced.ways
    _forced.ways = {**previous, op: name}
    try:
        yield
    finally:
        _forced.ways = previous


@functools.cache
def processor() -> str:
    """The class of this processor as PyTorch sees it; ATEN_CPU_CAPABILITY can lower it."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    return name if name in PROCESSORS else "other"
