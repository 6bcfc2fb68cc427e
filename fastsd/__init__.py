"""fastsd: images from text with Stable Diffusion.

>>> import fastsd
>>> pipe = fastsd.Pipeline.from_pretrained("folder with a model")  # no argument: the bundled digits model
>>> pipe("a handwritten eight", seed=7).images[0].save("eight.png")

Importing this module is light: torch and the models are imported when `Pipeline`, or another name in `__all__`, is
first used.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError

if TYPE_CHECKING:
    from fastsd.diffusers.accelerate import accelerate, restore
    from fastsd.generate.control import Control
    from fastsd.generate.image_prompts import ImagePrompt
    from fastsd.generate.progress import Step
    from fastsd.generate.result import Result
    from fastsd.pipeline import Pipeline
    from fastsd.upscale.upscaler import Upscaler
    from fastsd.weights.adapters.apply import Adapter

# Large CPU tensors in huge pages, where Linux gives them on request: PyTorch reads this before its first tensor. The
# autoencoder writes maps of 67 MB, which cost 24 ms each to page in by 4 kB and 4 ms by 2 MB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads that wait for others sleep instead of spinning: OpenMP reads this when torch is imported. Beside other busy
# processes a thread may wait for one that is not running, and spin for milliseconds at every op.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# Memory that was freed stays with the process for the next map, up to 256 MB, instead of going back to Linux and being
# paged in again (glibc's mallopt; by default it goes back from 64 MB on). A step of SD1.5 was 5% of that on one thread.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
if sys.platform == "linux" and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
    _mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if _mallopt is not None:
        _mallopt(M_TRIM_THRESHOLD, 256 << 20)
        _mallopt(
            M_MMAP_THRESHOLD, 32 << 20
        )  # the largest that it takes; without it, each map of 1 MB would be mapped anew

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Control",
    "FastsdError",
    "ImagePrompt",
    "Pipeline",
    "Result",
    "Step",
    "Upscaler",
    "__version__",
    "accelerate",
    "restore",
]
# Imported when they are first used.
_LAZY = {
    "Adapter": "fastsd.weights.adapters.apply",
    "Control": "fastsd.generate.control",
    "ImagePrompt": "fastsd.generate.image_prompts",
    "Pipeline": "fastsd.pipeline",
    "Result": "fastsd.generate.result",
    "Step": "fastsd.generate.progress",
    "Upscaler": "fastsd.upscale.upscaler",
    "accelerate": "fastsd.diffusers.accelerate",
    "restore": "fastsd.diffusers.accelerate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastsd' has no attribute {name!r}")
    found = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = found  # found directly the next time
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
