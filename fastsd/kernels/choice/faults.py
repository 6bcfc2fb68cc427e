"""What an error of a launch means: its cause in one line, and whether the GPU survives it."""

from __future__ import annotations

import subprocess

# Errors of a launch after which the same process can go on; any other "CUDA error" loses the context.
HARMLESS = ("invalid argument", "invalid configuration", "too many resources requested", "no kernel image")
# What Triton says of what it needs beside itself: a compiler for the stubs of its launches, the driver, the assembler.
MISSING = ("failed to find c compiler", "libcuda.so cannot", "cannot find ptxas")


def reason_of(error: BaseException) -> str:
    """An error in one line: its type and its root cause's last line."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line for line in str(cause).splitlines() if line.strip()]
    text = lines[0] if lines and is_cuda(cause) else "".join(lines[-1:])  # CUDA's errors are followed by advice
    return f"{type(error).__name__}: {text.strip()[:200]}" if text else type(error).__name__


def is_cuda(error: BaseException) -> bool:
    """Whether it is an error of the GPU's runtime."""
    return any(word in str(error) for word in ("CUDA error", "HIP error", "illegal memory access"))


def device_is_lost(error: BaseException) -> bool:
    """Whether the GPU's context is lost, for example by an illegal access; no later call of this process succeeds."""
    return is_cuda(error) and not any(harmless in str(error) for harmless in HARMLESS)


def installation_is_incomplete(error: BaseException) -> bool:
    """Whether nothing was launched for want of something beside Triton: a C compiler, Python's headers, space on disk.

    It is no fault of the kernel, which may be right and fast once that is installed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | subprocess.CalledProcessError):
            return True
        if any(missing in str(cause).lower() for missing in MISSING):
            return True
        cause = cause.__cause__
    return False
