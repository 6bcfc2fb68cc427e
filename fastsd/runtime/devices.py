"""The device and the precision of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastsd.errors import FastsdError
from fastsd.kernels import dispatch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP8 = ("fp8", "fp8-emulated")
_computed_in: int | None = None  # the process that last did
OLDEST_FP8 = (8, 9)  # compute capability of the first GPUs that multiply e4m3


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of this machine that "auto" or a device's name stands for; one of CUDA's with its number, since "cuda"
    means another one after `torch.cuda.set_device`.

    Raises:
        FastsdError: this machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise FastsdError("it should be auto, cpu, cuda or cuda:N", argument="device", value=device) from error
    if resolved.type not in ("cpu", "cuda"):
        raise FastsdError("fastsd runs on cpu and cuda", argument="device", value=str(resolved))
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise FastsdError(
            f"this machine has {torch.cuda.device_count()} CUDA devices", argument="device", value=str(resolved)
        )
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that "auto", "fp32", "fp16" or "bf16" stands for; see `Pipeline.from_pretrained`.

    Raises:
        FastsdError: another name or dtype, or one that the device cannot compute in.
    """
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise FastsdError("it should be float32, float16 or bfloat16", argument="dtype", value=dtype)
        resolved = dtype
    elif dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    elif dtype not in DTYPES:
        names = ", ".join(("auto", *DTYPES, *FP8))
        raise FastsdError(f"it should be one of {names}", argument="dtype", value=dtype)
    else:
        resolved = DTYPES[dtype]
    if resolved == torch.bfloat16 and device.type == "cuda" and not gpu_has_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise FastsdError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bf16: use fp16 or fp32",
            argument="dtype",
            value="bf16",
        )
    return resolved


def resolve_precision(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, bool]:
    """The dtype of all that is not fp8, and whether layers of the UNets compute in fp8 (docs/fp8.md).

    Raises:
        FastsdError: as `resolve_dtype`; "fp8" where nothing multiplies it.
    """
    if dtype not in (*FP8, torch.float8_e4m3fn):
        return resolve_dtype(dtype, device), False
    reason = None if dtype == "fp8-emulated" else why_no_fp8(device)
    if reason is not None:
        raise FastsdError(
            f"{reason}: use auto, or fp8-emulated, which computes the same numbers slowly",
            argument="dtype",
            value="fp8",
        )
    return resolve_dtype("auto", device), True


def why_no_fp8(device: torch.device) -> str | None:
    """Why nothing multiplies fp8 on `device`; None if it does."""
    if device.type != "cuda":
        return "a CPU does not multiply fp8"
    if torch.version.hip is not None:
        return "fastsd multiplies fp8 on NVIDIA's GPUs only"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_FP8:
        name = torch.cuda.get_device_name(device)
        return f"{name} (compute capability {major}.{minor}) does not multiply fp8, which needs 8.9 or newer"
    return dispatch.why_no_triton(device)


def autoencoder_dtype(dtype: torch.dtype, device: torch.device, overflows: bool) -> torch.dtype:
    """The dtype of an autoencoder beside a network in `dtype`.

    One that overflows fp16 (SDXL's) runs in bf16, which has the range of fp32, in half of its memory; without bf16 on
    this GPU, and on the CPU, in fp32.

    Args:
        overflows: `force_upcast` of its config.
    """
    if dtype != torch.float16 or not overflows:
        return dtype
    return torch.bfloat16 if device.type == "cuda" and gpu_has_bf16(device) else torch.float32


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether a CUDA device multiplies bf16 in hardware."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without the caller's autocast and inference mode, which would change the precision of our arithmetic, and make
    weights that no adapter can change later.

    Raises:
        FastsdError: this is a fork of a process that has computed, with several threads: OpenMP would wait without end
            for those of the parent.
    """
    global _computed_in
    if sys.platform == "linux" and _computed_in not in (None, os.getpid()) and torch.get_num_threads() > 1:
        raise FastsdError(
            "this process was forked from one that had computed, whose threads it lacks: start processes by spawn, or "
            "call torch.set_num_threads(1) here"
        )
    _computed_in = os.getpid()
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        yield


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware (avx512_bf16 or amx_bf16), and PyTorch is not kept from it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype, as `resolve_dtype` takes it."""
    return next(name for name, named in DTYPES.items() if named == dtype)
