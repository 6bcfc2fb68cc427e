"""What people reported of the CPU: parts slower than PyTorch's own, norms that are off, benchmarks that fail."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_cold, options
from bench.record import ROOT
from bench.session import Session
from fastsd.kernels import dispatch, upsample2x
from fastsd.kernels import groupnorm_silu as norm
from fastsd.kernels.cpu import choices
from fastsd.model import layers
from tests.support.precision import rand

HALF_ULP = 2.0**-24
MERGING = 64  # roundings of a value while partial sums are merged, and of the scale, at most


def inputs(name: str) -> torch.Tensor:
    x = rand(2, 48, 32, 24, dtype=torch.float32)
    if name == "outlier":
        x[0, 0, 0, 0] = 1e4
    if name == "ramp":
        x = x + torch.linspace(0, 100, x.numel()).view(x.shape)
    spread, mean = {"constant": (0.0, 30.1), "mean 30": (1e-3, 30.0), "mean 1e4": (1.0, 1e4)}.get(name, (1.0, 0.0))
    return x * spread + mean


@pytest.mark.parametrize("way", choices.OPS["groupnorm_silu"].ways)
@pytest.mark.parametrize("name", ["normal", "constant", "mean 30", "mean 1e4", "outlier", "ramp"])
@torch.no_grad()
def test_group_norm_is_as_accurate_as_its_sums_whatever_the_mean(name: str, way: str) -> None:
    """PyTorch's channels-last norm is off by 0.9 at mean 30 and deviation 1e-3.

    The right value is float64's. A mean of sums of t terms in fp32 is off by d <= (t + merging) u max|x|, a standard
    deviation by a share of (t + merging) u and of d^2 r^2 / 2 (Higham 2002, sections 1.9 and 4.2; r is 1 / deviation).
    The last line rounds x r, m r and their difference.
    """
    x, groups, eps = inputs(name), 4, 1e-5
    with choices.forced("groupnorm_silu", way):
        result = norm.groupnorm_silu(x, torch.ones(24), torch.zeros(24), groups, eps, silu=False)
    wide = x.double().unflatten(-1, (groups, -1))
    variance, mean = torch.var_mean(wide, (1, 2, 4), correction=0, keepdim=True)
    r, distance, largest = (variance + eps).rsqrt(), (wide - mean).abs(), wide.abs().amax((1, 2, 4), keepdim=True)
    share = (norm.TERMS + MERGING) * HALF_ULP
    off = share * largest
    allowed = r * (off + 4 * HALF_ULP * largest) + distance * r * (share + (off * r) ** 2 / 2)
    error = (result.double().unflatten(-1, (groups, -1)) - (wide - mean) * r).abs()
    assert bool((error <= allowed).all()), f"{(error / allowed).max():.2f} of what is allowed"


@pytest.mark.parametrize(("pixels", "channels"), [((8, 8), 16), ((32, 32), 16), ((32, 32), 4), ((8, 8), 80)])
@torch.no_grad()
def test_group_norm_takes_pytorchs_channels_last_norm_only_where_the_mean_is_small(
    pixels: tuple[int, int], channels: int
) -> None:
    """Just below the mean that is allowed, and above it, the variance is within the same 192 roundings of float64's."""
    limit, groups = norm._largest_mean(pixels[0] * pixels[1], channels), 4
    for factor in (0.0, 0.95, 1.05, 30.0):
        x = rand(1, *pixels, groups * channels, dtype=torch.float32)
        wide = x.double().unflatten(-1, (groups, -1))
        variance, mean = torch.var_mean(wide, (1, 2, 4), correction=0, keepdim=True)
        x = ((wide - mean) * variance.rsqrt() + factor * limit).flatten(-2).float()
        wide = x.double().unflatten(-1, (groups, -1))
        variance, mean = torch.var_mean(wide, (1, 2, 4), correction=0, keepdim=True)
        truth = ((wide - mean) * (variance + 1e-5).rsqrt()).flatten(-2)
        with choices.forced("groupnorm_silu", "direct"):
            weight, bias = torch.ones(groups * channels), torch.zeros(groups * channels)
            result = norm.groupnorm_silu(x, weight, bias, groups, 1e-5, silu=False)
        share = (norm.TERMS + MERGING) * HALF_ULP
        allowed = share * (x.abs().max() + truth.abs()) + 4 * HALF_ULP * x.abs().max()
        assert bool(((result - truth).abs() <= allowed).all()), factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_group_norm_of_an_image_does_not_depend_on_the_mean_of_its_neighbour(dtype: torch.dtype) -> None:
    """One image has a mean that PyTorch's channels-last norm cannot take, the other has not."""
    x, w, b = rand(2, 24, 24, 64, dtype=dtype), rand(64, dtype=dtype), rand(64, dtype=dtype)
    add = torch.stack([torch.zeros(64), torch.full((64,), 30.0)]).to(dtype)
    both = norm.groupnorm_silu(x, w, b, 8, 1e-5, add=add)
    for i in range(2):
        assert torch.equal(both[i : i + 1], norm.groupnorm_silu(x[i : i + 1], w, b, 8, 1e-5, add=add[i : i + 1]))


@torch.no_grad()
def test_group_norm_is_no_worse_than_pytorchs_in_contiguous_memory() -> None:
    """Within twice PyTorch's error there, on maps of the sizes at which the table changes its way."""
    for shape in ((1, 16, 16, 64), (1, 32, 32, 32), (2, 8, 8, 1280)):
        x, w, b = rand(*shape, dtype=torch.float32), torch.ones(shape[-1]), torch.zeros(shape[-1])

        def plain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return F.silu(F.group_norm(x.permute(0, 3, 1, 2).contiguous(), 8, w, b, 1e-5)).permute(0, 2, 3, 1)

        truth = plain(x.double(), w.double(), b.double())
        ulp = torch.finfo(torch.float32).eps * truth.abs().max()
        error = (norm.groupnorm_silu(x, w, b, 8, 1e-5) - truth).abs().max()
        assert error <= 2 * (plain(x, w, b) - truth).abs().max() + ulp


def test_attention_on_avx2_is_pytorchs_unless_a_head_is_wide() -> None:
    """Measured on AVX2: two products and a softmax take 1.1 to 1.8 times as long as PyTorch's attention."""
    rows = {op: steps for (op, processor, _), steps in choices.TABLE.items() if processor == "avx2"}
    assert rows["flash_attn"] == ((0, "sdpa"),)
    assert {name for _, name in rows["flash_attn, wide heads"]} == {"products", "sdpa"}


def test_a_cold_process_that_the_budget_stops_is_skipped_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(options.parse(benchmark=True, models="digits", budget="30", results=str(tmp_path / "r.json")))

    def too_slow(*arguments: object) -> object:
        raise subprocess.TimeoutExpired("bench.cold", 4.3)

    monkeypatch.setattr(bench_cold, "run_process", too_slow)
    with pytest.raises(pytest.skip.Exception, match="stopped after 4 s: the budget is spent"):
        bench_cold.bench_cold_process(session, "digits", torch.float32, tmp_path, tmp_path)
    assert "cold process" in session.not_run[0]
    assert "stopped after 4 s: the budget is spent" in session.tables[0]


def test_a_cold_process_that_never_ends_is_still_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(options.parse(benchmark=True, models="digits", results=str(tmp_path / "r.json")))

    def hangs(*arguments: object) -> object:
        raise subprocess.TimeoutExpired("bench.cold", bench_cold.TIMEOUT)

    monkeypatch.setattr(bench_cold, "run_process", hangs)
    with pytest.raises(AssertionError, match="no image within 900 s"):
        bench_cold.bench_cold_process(session, "digits", torch.float32, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("given", "policy"), [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "9"}, ""), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given: dict[str, str], policy: str) -> None:
    """Three busy processes beside: an image took 14 to 42 s of processor time instead of 1.9, all of it spinning.

    OpenMP 5.2, section 21.9 (OMP_WAIT_POLICY); libgomp's manual has GOMP_SPINCOUNT.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))} | given
    code = "import fastsd, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('OMP_WAIT_POLICY', ''))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == policy


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc"
)
@pytest.mark.parametrize(("given", "few"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_memory_of_maps_is_not_paged_in_again(given: dict[str, str], few: bool) -> None:
    """A step of SD1.5 had 10000 page faults and spent 5% of its time on them.

    Five maps of 20 MB, live at once and freed, twenty times over; 4096 bytes a page. Without the setting each round
    pages in what the one before gave back (glibc's malloc.c, `systrim`).
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | given
    code = """if True:
        import fastsd, ctypes, resource
        malloc, free, fill = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free, ctypes.memset
        malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        def rounds(n):
            for _ in range(n):
                maps = [malloc(20 << 20) for _ in range(5)]
                for p in maps: fill(p, 1, 20 << 20)
                for p in maps: free(p)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(-rounds(1) + rounds(20))"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 5 * (20 << 20) // 4096) == few, done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("budget", [1])
def test_the_benchmarks_pass_within_any_budget(budget: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench", "--benchmark", "--models", "digits"]
    command += ["--budget", str(budget), "--results", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "the budget" in done.stdout


@torch.no_grad()
def test_upsampling_keeps_its_summed_kernels_no_longer_than_its_weight() -> None:
    """A decoder of the bundled model summed them in every call: 0.3 ms of the 0.6 that the layer took."""
    layer, x = layers.Upsample(16).eval().requires_grad_(False), rand(1, 16, 16, 16, dtype=torch.float32)
    first = layer(x)
    if not layer.conv.weight.is_mkldnn:
        pytest.skip("oneDNN does not run here")
    assert upsample2x._kept[layer.conv.weight][0] == (x.shape[1:], torch.get_num_threads())
    kept = len(upsample2x._kept)
    assert torch.equal(layer(x), first)
    layer.conv.unpack()
    assert len(upsample2x._kept) == kept - 1
    layer.conv.weight.mul_(2)
    doubled = layer(x)
    bias = layer.conv.bias
    assert bias is not None
    assert torch.allclose(doubled - bias, 2 * (first - bias), rtol=0, atol=float(first.abs().max()) * 144 * HALF_ULP)
    assert layer(rand(2, 9, 8, 16, dtype=torch.float32)).shape == (2, 18, 16, 16)


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_transformer_of_a_small_batch_takes_no_more_calls_than_one_of_an_image() -> None:
    """The bundled model's step was no faster than diffusers': each of its small products was a loop over the images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    block = layers.TransformerBlock(64, 32, 2).eval().requires_grad_(False)
    counts = []
    for batch in (1, 2):
        x, text = rand(batch, 64, 64, dtype=torch.float32), rand(batch, 16, 2, 2, 32, dtype=torch.float32)
        with dispatch.forced("onednn"), choices.forced("linear", "torch"), choices.forced("geglu", "torch"):
            with choices.forced("flash_attn", "sdpa"), Calls() as calls:
                block(x, text)
        counts.append(calls.count)
    torch.set_num_threads(threads)
    assert counts[0] == counts[1]
