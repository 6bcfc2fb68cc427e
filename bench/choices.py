"""Measure again what `fastsd/kernels/cpu/choices.py` states: every way of every row, at sizes around its threshold.

`python -m bench.choices [OP ...]` prints a line for each shape: the time of each way, the table's choice, and "slower"
if another way took less than 90% of the chosen one's time. Ways take turns, and the least of the rounds counts, so a
busy machine needs more rounds (`--rounds`), not another threshold. One thread unless OMP_NUM_THREADS says otherwise.
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` measures the rows of avx2 on a newer processor.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastsd.kernels.conv2d import conv2d
from fastsd.kernels.cpu import choices, onednn
from fastsd.kernels.flash_attn import flash_attn
from fastsd.kernels.geglu import geglu
from fastsd.kernels.groupnorm_silu import groupnorm_silu
from fastsd.kernels.linear import linear
from fastsd.kernels.upsample2x import KEPT, SAME, upsample2x_conv

SLOWER = 0.9  # the other way's share of the time from which a choice counts as wrong
ROUNDS = 7
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class TwoWays:
    """An op at a shape: its size as the table counts it, and the call, without arguments."""

    op: str
    name: str
    size: int
    run: Callable[[], torch.Tensor]


def attention(dtype: torch.dtype, queries: int, keys: int, heads: int, width: int) -> TwoWays:
    q = torch.randn(2, queries, heads, width).to(dtype)
    k, v = torch.randn(2, keys, 2, heads, width).to(dtype).unbind(2)
    op = "flash_attn, wide heads" if width >= choices.WIDE_HEAD else "flash_attn"
    name = f"2x{queries}x{keys}x{heads}x{width}"
    return TwoWays(op, name, queries * keys, functools.partial(flash_attn, q, k, v))


def product(dtype: torch.dtype, rows: int, k: int, n: int) -> TwoWays:
    x, weight, bias = torch.randn(2, rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    return TwoWays("linear", f"2x{rows}x{k}x{n}", rows * k * n, functools.partial(linear, x, weight, bias))


def gated(dtype: torch.dtype, rows: int, k: int, n: int) -> TwoWays:
    x, weight, bias = torch.randn(2, rows, k).to(dtype), torch.randn(2 * n, k).to(dtype), torch.randn(2 * n).to(dtype)
    return TwoWays("geglu", f"2x{rows}x{k}x{n}", rows * k * 2 * n, functools.partial(geglu, x, weight, bias))


def norm(dtype: torch.dtype, batch: int, side: int, channels: int, groups: int) -> TwoWays:
    x = torch.randn(batch, side, side, channels).to(dtype)
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    run = functools.partial(groupnorm_silu, x, weight, bias, groups, 1e-5)
    return TwoWays("groupnorm_silu", f"{batch}x{side}x{side}x{channels}", side * side * channels, run)


def convolution(dtype: torch.dtype, batch: int, side: int, inputs: int, outputs: int) -> TwoWays:
    """Each way by the weight that a layer would give it."""
    x, weight = torch.randn(batch, side, side, inputs).to(dtype), torch.randn(outputs, inputs, 3, 3).to(dtype)
    packed, bias = onednn.pack(weight, x.shape, 1, SAME), torch.randn(outputs).to(dtype)
    plain = weight.contiguous(memory_format=torch.channels_last)
    size = min(2 * inputs * outputs // (inputs + outputs), side * side // 3)

    def run() -> torch.Tensor:
        return conv2d(x, plain if choices.way("conv2d", dtype, size) == "winograd" else packed, bias, 1, SAME)

    return TwoWays("conv2d", f"{batch}x{side}x{side}x{inputs}x{outputs}", size, run)


def doubled_by_winograd(dtype: torch.dtype, side: int, channels: int) -> TwoWays:
    x, weight = torch.randn(1, side, side, channels).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
    plain = weight.contiguous(memory_format=torch.channels_last)
    run = functools.partial(upsample2x_conv, x, plain, torch.randn(channels).to(dtype))
    return TwoWays("upsample2x_conv, Winograd's", f"1x{side}x{side}x{channels}", side * side, run)


def doubled(dtype: torch.dtype, side: int, channels: int) -> TwoWays:
    x, weight = torch.randn(1, side, side, channels).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
    packed = onednn.pack(weight, torch.Size((1, 2 * side, 2 * side, channels)), 1, SAME)
    run = functools.partial(upsample2x_conv, x, packed, torch.randn(channels).to(dtype))
    op = "upsample2x_conv, kept weights" if weight.numel() <= KEPT else "upsample2x_conv"
    return TwoWays(op, f"1x{side}x{side}x{channels}", side * side, run)


def cases(dtype: torch.dtype) -> Iterator[Callable[[], TwoWays]]:
    """Shapes of the bundled model and of SD1.5, made one at a time."""
    for queries, keys, heads, width in (
        (64, 64, 2, 32), (64, 77, 8, 160), (256, 77, 8, 160), (256, 256, 8, 160), (1024, 77, 8, 80),
        (1024, 1024, 8, 80), (4096, 77, 8, 40), (64, 64, 1, 512), (1024, 1024, 1, 512), (2048, 2048, 1, 512),
    ):  # fmt: skip
        yield functools.partial(attention, dtype, queries, keys, heads, width)
    for rows, k, n in (
        (16, 96, 96), (64, 64, 64), (16, 96, 288), (64, 64, 192), (64, 256, 64), (77, 160, 160), (77, 768, 768),
        (256, 1280, 1280), (1024, 640, 640), (4096, 320, 320),
    ):  # fmt: skip
        yield functools.partial(product, dtype, rows, k, n)
    for rows, k, n in ((16, 64, 256), (16, 96, 384), (64, 64, 256), (64, 320, 1280), (1024, 640, 2560)):
        yield functools.partial(gated, dtype, rows, k, n)
    for batch, side, channels, groups in (
        (2, 4, 96, 16), (2, 8, 64, 16), (2, 8, 160, 16), (1, 16, 64, 8), (1, 32, 32, 8), (1, 64, 32, 8),
        (2, 8, 1280, 32), (2, 16, 1280, 32), (2, 32, 640, 32), (2, 64, 320, 32),
    ):  # fmt: skip
        yield functools.partial(norm, dtype, batch, side, channels, groups)
    if dtype == choices.FP32:  # the only dtype that Winograd's way takes
        for batch, side, inputs, outputs in (
            (1, 32, 64, 64), (1, 64, 64, 64), (1, 64, 96, 96), (1, 64, 128, 128), (1, 512, 128, 128), (2, 16, 320, 320),
            (2, 16, 1280, 1280), (1, 24, 1280, 1280), (2, 32, 640, 640), (2, 64, 320, 320), (2, 64, 640, 320),
        ):  # fmt: skip
            yield functools.partial(convolution, dtype, batch, side, inputs, outputs)
        for side, channels in ((4, 1280), (8, 1280), (8, 256), (16, 1280), (32, 640), (128, 512)):
            yield functools.partial(doubled_by_winograd, dtype, side, channels)
    for side, channels in ((8, 64), (16, 64), (16, 640), (32, 48), (32, 640), (64, 256)):
        yield functools.partial(doubled, dtype, side, channels)


def measure(case: TwoWays, rounds: int) -> dict[str, float]:
    """Seconds of each way: the least of `rounds` samples, taken in turns."""
    ways, best = choices.OPS[case.op].ways, {}
    counts = {}
    for name in ways:
        with choices.forced(case.op, name):
            case.run()
            begin = time.perf_counter()
            case.run()
            counts[name] = max(1, int(SAMPLE_SECONDS / max(time.perf_counter() - begin, 1e-7)))
    for _ in range(rounds):
        for name in ways:
            with choices.forced(case.op, name):
                begin = time.perf_counter()
                for _ in range(counts[name]):
                    case.run()
                seconds = (time.perf_counter() - begin) / counts[name]
            best[name] = min(best.get(name, seconds), seconds)
    return best


def line(case: TwoWays, dtype: torch.dtype, best: dict[str, float]) -> str:
    chosen = choices.way(case.op, dtype, case.size)
    verdict = "slower" if min(best.values()) < SLOWER * best[chosen] else ""
    times = "  ".join(f"{name} {1e6 * seconds:9.0f} µs" for name, seconds in best.items())
    label = f"{case.op} {str(dtype).removeprefix('torch.')} {case.name}"
    return f"{label:52} {times}  {chosen:10} {verdict}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choices", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", choices=[[], *choices.OPS], help="the ops to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each way (default {ROUNDS})")
    arguments = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{choices.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}{load}")
    for dtype in (choices.FP32, choices.BF16, choices.FP16):
        for make in cases(dtype):
            if (case := make()).op in (arguments.ops or choices.OPS):
                if dtype in choices.OPS[case.op].dtypes[choices.processor()]:
                    with torch.inference_mode():
                        print(line(case, dtype, measure(case, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
