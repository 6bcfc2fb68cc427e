"""A CUDA device that is not there: tensors on it have shapes, strides and a device, but no memory.

PyTorch's FakeTensorMode makes such tensors. A build of PyTorch without CUDA lacks one thing for them, a device guard,
which `guard.cpp` registers; it is compiled by this machine's C++ compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.dryrun.gpus import Gpu
from fastsd.kernels import candidates, dispatch

GUARD = Path(__file__).parent / "guard.cpp"
DEVICE = torch.device("cuda", 0)


def why_not() -> str | None:
    """Why this machine cannot do a dry run; None if it can."""
    if dispatch.interpreted():
        return "TRITON_INTERPRET=1 is set: kernels are interpreted, not launched"
    reason = dispatch.why_no_triton(torch.device("meta"))
    if reason is not None:
        return reason
    if torch.cuda.is_available():
        return "this machine has a GPU, which would answer; CUDA_VISIBLE_DEVICES= hides it"
    if not torch.backends.cuda.is_built() and compiler() is None:
        return "no C++ compiler was found (c++, g++ or clang++ on the path, or $CXX)"
    return None


def compiler() -> list[str] | None:
    """The command of this machine's C++ compiler."""
    words = shlex.split(os.environ.get("CXX", ""))
    if words:
        return words if shutil.which(words[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


@functools.cache
def load_guard() -> None:
    """Let this process make fake CUDA tensors.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its message was printed.
    """
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    command = compiler()
    assert command is not None
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        options = [
            "-O1",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}",
        ]
        paths = [f"-I{torch_folder / 'include'}", str(GUARD), f"-L{torch_folder / 'lib'}", "-lc10", "-o", str(library)]
        subprocess.run([*command, *options, *paths], check=True)
        ctypes.CDLL(str(library))  # it stays loaded without its file


@contextmanager
def fake_cuda(gpu: Gpu, wait: Callable[[], None]) -> Iterator[FakeTensorMode]:
    """Inside this context torch.cuda answers as a machine with one `gpu`, and the mode makes tensors on it.

    wait: is called where the host would wait for the device.
    """
    load_guard()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(patch.dict(os.environ, FASTSD_CACHE=folder))  # nobody's choices
        for name, answer in _answers(gpu, wait).items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        for forget in (dispatch._can_run_triton.cache_clear, candidates.forget):
            forget()
            stack.callback(forget)
        yield FakeTensorMode(allow_non_fake_inputs=True)


def _answers(gpu: Gpu, wait: Callable[[], None]) -> dict[str, Any]:
    """What torch.cuda's functions say."""
    total = gpu.memory * 2**30
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        total_memory=total,
        warp_size=32,
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=wait)

    def nothing(*args: Any, **named: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (total, total),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "current_stream": lambda device=None: stream,
        "synchronize": lambda device=None: wait(),
        "empty_cache": lambda: None,
        "device": nothing,
        "device_of": nothing,
        "stream": nothing,
    }
