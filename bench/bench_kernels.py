"""Single ops at Stable Diffusion's shapes: time, share of the limit, and PyTorch's op for the same work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.measure import Candidate, rotation
from bench.roofline import Work, attention_gradients_work, attention_work, conv_work, linear_work, norm_work
from bench.session import Session
from fastsd.cuda.capture import CudaRecorder, Recorder
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.kernels import dispatch
from fastsd.kernels.conv2d import conv2d
from fastsd.kernels.flash_attn import flash_attn
from fastsd.kernels.geglu import geglu
from fastsd.kernels.groupnorm_silu import groupnorm_silu
from fastsd.kernels.layernorm import layernorm
from fastsd.kernels.linear import linear
from fastsd.kernels.upsample2x import upsample2x_conv

DEPTH = 4  # consecutive roundings in an op and what it fuses
ROTATION_BYTES = 2**27  # least size of all sets of inputs: twice the largest L2 cache
MAX_SETS = 32
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape: the shapes of its inputs, the op, PyTorch's ops for the same work, and that work.

    read: the tensor to compare, of what an op returns.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Any]
    plain: dict[str, Callable[..., Any]]
    work: Work
    read: Callable[[Any], torch.Tensor] = lambda output: output


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa_by(backend: str) -> Callable[..., torch.Tensor]:
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, BACKENDS[backend])):
            return sdpa(*tensors)

    return run


def attention(batch: int, queries: int, keys: int, heads: int, size: int) -> Case:
    shapes = ((batch, queries, heads, size), (batch, keys, heads, size), (batch, keys, heads, size))
    plain = {"SDPA": sdpa}
    if torch.cuda.is_available():
        plain |= {f"SDPA, {name}": sdpa_by(name) for name in BACKENDS}
    work = attention_work(batch, queries, keys, heads * size, heads)
    return Case(f"flash_attn-{batch}x{queries}x{keys}x{heads}x{size}", shapes, flash_attn, plain, work)


def attention_gradients(batch: int, queries: int, keys: int, heads: int, size: int) -> Case:
    """Both passes of attention in training; the gradient of the result is q."""

    def both_passes(attend: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
        def run(*tensors: torch.Tensor) -> Tensors:
            with torch.inference_mode(False), torch.enable_grad():
                given = [x.detach().requires_grad_() for x in tensors]
                return torch.autograd.grad(attend(*given), given, tensors[0].flatten(2))

        return run

    case = attention(batch, queries, keys, heads, size)
    plain = {f"{name}, both passes": both_passes(attend) for name, attend in case.plain.items()}
    work = attention_gradients_work(batch, queries, keys, heads * size, heads)
    name = case.name.replace("flash_attn", "flash_attn_gradients")
    return Case(
        name, case.shapes, both_passes(flash_attn), plain, work, lambda found: torch.cat([x.flatten() for x in found])
    )


def group_norm(batch: int, side: int, channels: int, silu: bool) -> Case:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return groupnorm_silu(x, weight, bias, 32, 1e-5, silu)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = F.group_norm(x.permute(0, 3, 1, 2), 32, weight, bias, 1e-5)
        return (F.silu(y) if silu else y).permute(0, 2, 3, 1)

    shapes = ((batch, side, side, channels), (channels,), (channels,))
    name = f"groupnorm{'_silu' if silu else ''}-{batch}x{side}x{side}x{channels}"
    return Case(name, shapes, run, {"F.group_norm": plain}, norm_work(batch * side * side * channels, silu))


def layer_norm(rows: int, channels: int) -> Case:
    plain = lambda x, w, b: F.layer_norm(x, (channels,), w, b, 1e-5)  # noqa: E731
    shapes = ((rows, channels), (channels,), (channels,))
    run = lambda x, w, b: layernorm(x, w, b, 1e-5)  # noqa: E731
    return Case(f"layernorm-{rows}x{channels}", shapes, run, {"F.layer_norm": plain}, norm_work(rows * channels, False))


def product(rows: int, k: int, n: int) -> Case:
    shapes = ((rows, k), (n, k), (n,), (rows, n))
    run = lambda x, w, b, r: linear(x, w, b, residual=r)  # noqa: E731
    plain = lambda x, w, b, r: F.linear(x, w, b) + r  # noqa: E731
    return Case(f"linear-{rows}x{k}x{n}", shapes, run, {"F.linear": plain}, linear_work(rows, k, n, residual=True))


def gated(rows: int, k: int, n: int) -> Case:
    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return value * F.gelu(gate)

    work = Work("linear", 4.0 * rows * k * n, rows * k + 2 * k * n + rows * n, rows * n)
    return Case(f"geglu-{rows}x{k}x{n}", ((rows, k), (2 * n, k), (2 * n,)), geglu, {"F.linear, F.gelu": plain}, work)


def convolution(batch: int, side: int, inputs: int, outputs: int, doubling: bool = False) -> Case:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return upsample2x_conv(x, weight, bias) if doubling else conv2d(x, weight, bias, 1, (1, 1, 1, 1))

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        y = x.permute(0, 3, 1, 2)
        y = F.interpolate(y, scale_factor=2.0, mode="nearest") if doubling else y
        return F.conv2d(y, weight, bias, padding=1).permute(0, 2, 3, 1)

    shapes = ((batch, side, side, inputs), (outputs, inputs, 3, 3), (outputs,))
    pixels = batch * side * side * (4 if doubling else 1)
    work = conv_work(batch * side * side * inputs, pixels * outputs, torch.Size(shapes[1]))
    name = f"{'upsample2x_conv' if doubling else 'conv2d'}-{batch}x{side}x{side}x{inputs}-{outputs}"
    return Case(name, shapes, run, {"F.conv2d": plain}, work)


CASES = [
    attention(2, 4096, 4096, 8, 40),  # SD1.5, first level: most of its attention
    attention(2, 1024, 1024, 20, 64),  # SDXL, the level that holds most of its blocks
    attention(2, 4096, 4096, 10, 64),  # SDXL, first level with attention
    attention(2, 4096, 77, 8, 40),  # SD1.5, to the text
    attention(1, 4096, 4096, 1, 512),  # VAE
    attention_gradients(1, 4096, 4096, 8, 40),  # training of SD1.5, first level
    attention_gradients(1, 4096, 77, 8, 40),  # to the text
    attention_gradients(1, 1024, 1024, 20, 64),  # of SDXL
    attention_gradients(1, 256, 256, 8, 160),
    group_norm(2, 64, 320, True),  # SD1.5, first level
    group_norm(2, 16, 1280, True),  # SD1.5, launch bound
    group_norm(2, 64, 320, False),  # before a transformer
    group_norm(1, 512, 128, True),  # VAE, last level
    layer_norm(8192, 320),
    layer_norm(2048, 1280),
    product(8192, 320, 320),
    product(2048, 1280, 1280),
    product(2048, 5120, 1280),
    gated(8192, 320, 1280),
    gated(2048, 1280, 5120),
    convolution(2, 64, 320, 320),
    convolution(2, 32, 640, 640),
    convolution(2, 16, 1280, 1280),
    convolution(1, 512, 128, 128),  # VAE, last level
    convolution(2, 32, 640, 640, doubling=True),
]


class Replayed:
    """Work that is captured in a CUDA graph after the correctness check, and replayed for the samples.

    The time then excludes the launches from Python, which take longer than most kernels. Work that cannot be captured
    runs eagerly.
    """

    def __init__(self, work: Callable[[], Any], recorder: Recorder):
        self.work, self.recorder = work, recorder
        self._checked, self._replay = False, work

    def prepare(self) -> None:
        """Called before the correctness check and before each sample; captures the work at the second call."""
        if self._checked and self._replay is self.work:
            try:
                self._replay = self.recorder.record(self.work)
            except RuntimeError:
                self._replay = lambda: self.work()
        self._checked = True

    def __call__(self, i: int) -> Any:
        return self._replay()


def small(case: Case) -> bool:
    """Whether a check without --benchmark includes the shape."""
    return case.work.flops < 2e9 and case.work.elements < 1e7


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_kernel(bench: Session, publish: Any, case: Case, dtype: torch.dtype) -> None:
    if not bench.options.measuring and not small(case):
        pytest.skip("too large for a check; --benchmark measures it")
    device = bench.options.device
    generator = torch.Generator(device).manual_seed(0)

    def make(i: int) -> Tensors:
        tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in case.shapes]
        return tuple(t.contiguous(memory_format=torch.channels_last) if "conv" in case.name and t.ndim == 4 and j else t
                     for j, t in enumerate(tensors))  # fmt: skip

    size = sum(torch.Size(shape).numel() for shape in case.shapes) * dtype.itemsize
    sets = min(MAX_SETS, 1 + ROTATION_BYTES // size) if bench.options.measuring else 1
    inputs = rotation(sets, make)

    def reference() -> torch.Tensor:
        with torch.inference_mode(), dispatch.reference_only():
            return case.read(case.run(*inputs(0)))

    def candidate(name: str, run: Callable[..., Any]) -> Candidate:
        def once(i: int) -> Any:
            with torch.inference_mode(), fixed_convolutions(device) if name == "fastsd" else nullcontext():
                return run(*inputs(i))

        if device.type != "cuda" or not bench.options.measuring:
            return Candidate(name, once, read=case.read)
        replayed = Replayed(lambda: [once(i) for i in range(sets)], CudaRecorder(device))
        return Candidate(name, once, replayed.prepare, case.read, timed=replayed, repeats=sets)

    candidates = [candidate("fastsd", case.run)] + [candidate(name, run) for name, run in case.plain.items()]
    outcomes = bench.run_benchmark("kernel", reference, candidates, dtype, DEPTH, [case.work], model=case.name)
    publish(outcomes)
