"""Launches compiled beforehand are found in Triton's cache; one that does not compile is told, and stops no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

import triton
import triton.language as tl
from triton.runtime import driver

from bench import model_calls, warm
from bench.intercept import KernelLaunch, intercepted_launches
from fastsd import config
from fastsd.kernels import dispatch
from fastsd.kernels.launch import architecture
from fastsd.kernels.triton import layernorm as layernorm_triton

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(dispatch.interpreted(), reason="interpreted kernels are not compiled"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", None)  # restored afterwards
    return tmp_path


def of_layernorm(x: torch.Tensor) -> KernelLaunch:
    """The launch of a layer norm of `x`."""
    found: list[KernelLaunch] = []

    def tell(kernel: Any, arguments: dict[str, Any]) -> None:
        found.append(KernelLaunch("layernorm", kernel, arguments))

    with intercepted_launches(90, tell):
        layernorm_triton.layernorm(x, x[0], x[0], 1e-5)
    return found[0]


def test_a_launch_finds_what_was_compiled_without_tensors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = of_layernorm(torch.empty(8, 320, dtype=torch.float16, device="meta"))
    done, failed = warm.warm_all([launch], 90, 120.0)
    assert (done, failed) == (1, 0)
    before = set(cache.iterdir())
    assert before
    run = triton.JITFunction.run

    def compiled_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(triton.JITFunction, "run", compiled_only)
    monkeypatch.setattr(architecture, "class_of", lambda device: architecture.class_of_capability(90))
    x = torch.zeros(8, 320, dtype=torch.float16)  # aligned, as a GPU's tensors are
    layernorm_triton.layernorm(x, x[0].clone(), x[0].clone(), 1e-5)
    assert set(cache.iterdir()) == before


@triton.jit
def _no_kernel(x_ptr, n, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), 1.0)  # a range of 3 does not compile


def test_a_launch_that_does_not_compile_is_told_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = KernelLaunch("the bad one", _no_kernel, {"x_ptr": torch.float16, "n": 5, "SIZE": 3})
    good = KernelLaunch("the good one", _no_kernel, {"x_ptr": torch.float16, "n": 5, "SIZE": 4})
    monkeypatch.setattr(warm, "every_launch", lambda sm: [bad, good])
    assert warm.main(["--sm", "90"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 and out[0].startswith("the bad one: CompilationError: ")
    assert out[1].startswith("1 of 2 launches compiled for sm_90, 1 failed (")


def test_what_does_not_fit_into_the_time_is_left_to_its_first_use(capsys: pytest.CaptureFixture[str]) -> None:
    good = KernelLaunch("the good one", _no_kernel, {"x_ptr": torch.float16, "n": 5, "SIZE": 8})
    assert warm.warm_all([good], 90, 0.0) == (0, 0)


def test_every_way_of_every_op_is_found_for_the_class_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and convolutions of our own too, which are used only where they are measured to be faster.

    sm_80 has no copy engine: nothing that is found for it reads boxes. Products of fp8 begin with sm_89.
    """
    monkeypatch.setattr(model_calls, "UNETS", [("SD1.5", config.SD15_UNET, ((64, 64),))])
    monkeypatch.setattr(model_calls, "ENCODERS", {})
    found = {sm: warm.every_launch(sm, fp8=sm == 90) for sm in (80, 90)}
    names = {sm: {launch.kernel.fn.__name__ for launch in some} for sm, some in found.items()}
    assert {"_flash_attn_kernel", "_groupnorm_silu_kernel", "_layernorm_kernel", "_advance_kernel"} <= names[80]
    assert {"_linear_kernel", "_conv2d_pointers_kernel"} <= names[80]
    in_fp8 = {"_quantize_rows_kernel", "_largest_of_parts_kernel", "_quantize_maps_kernel"}
    assert names[90] - names[80] == {"_conv2d_tma_kernel", *in_fp8}
    assert not any(launch.arguments.get("TMA") for launch in found[80])


def test_a_gpu_that_the_kernels_do_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler would end the process."""
    with pytest.raises(SystemExit) as ended:
        warm.main(["--sm", "42"])
    assert ended.value.code == 2 and "--sm: 42; the kernels need 75 or newer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--seconds", "0"), ("--seconds", "nan"), ("--first", "0"), ("--first", "1.5")]
)
def test_flags_that_are_no_number_above_0_are_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        warm.main(["--sm", "90", f"{flag}={value}"])
    assert ended.value.code == 2 and f"argument {flag}: '{value}'; it should be" in capsys.readouterr().err


def test_numbers_that_the_compiler_does_not_tell_apart_are_one_launch() -> None:
    def key(**arguments: Any) -> str:
        return warm.compiler_key(_no_kernel, {"x_ptr": torch.float16, "SIZE": 4} | arguments)

    assert key(n=32) == key(n=48) and len({key(n=n) for n in (32, 33, 1, 2**31, 0.5)}) == 5
    assert key(SIZE=4) != key(SIZE=8) and key(num_warps=4) != key(num_warps=8)
