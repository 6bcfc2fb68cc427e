"""The command line of the benchmarks, validated."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.families import choose
from fastsd.errors import FastsdError
from fastsd.runtime.devices import dtype_name, resolve_device, resolve_dtype

COMPILED = "diffusers-compiled"
PEERS = ("pytorch", "diffusers", "diffusers-channels-last", COMPILED)
MIN_BUDGET = 1.0  # seconds; what does not fit is listed as not run, whatever the budget is
HELP = {
    "models": "families to measure: sd15, sd21, sdxl, digits (default: sd15,sdxl,sd21,digits; on a CPU sd15,digits)",
    "batch": "images per batch (default 1,4,8; on a CPU 1)",
    "size": "side of the images in pixels (default: the training size of the model)",
    "steps": "denoising steps of an image (default 20,30,50; on a CPU 4)",
    "dtype": "fp32, fp16, bf16 (default: the default of fastsd on this device)",
    "peers": "pytorch, diffusers, diffusers-channels-last, none; diffusers-compiled, on a GPU alone",
    "budget": "seconds; the most important benchmarks run first, and those that do not fit are listed as not run",
    "model": "a folder with real weights, used instead of random ones",
    "results": "the result file (default bench/results/<gpu or cpu>/<date>-<commit>.json)",
}
SWITCHES = {
    "benchmark": "measure; without it every benchmark runs once at a tiny size, as a check",
    "profile": "also write a profile of a step of each network",
}


def above_zero(text: str) -> float:
    """A flag's number of seconds, minutes and the like, for argparse."""
    return float(_above_zero(text, float))


def count(text: str) -> int:
    """A flag's count of things, for argparse: 1 or more."""
    return int(_above_zero(text, int))


def _above_zero(text: str, kind: type[float] | type[int]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; it should be a {'whole ' if kind is int else ''}number above 0")
    return value


@dataclass(frozen=True)
class Options:
    """The validated options."""

    measuring: bool
    models: tuple[str, ...]
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    peers: tuple[str, ...]
    size: int | None
    budget: float | None
    model: Path | None
    profile: bool
    results: Path | None
    device: torch.device

    @property
    def compiled_alone(self) -> bool:
        """Whether this process measures diffusers under torch.compile, and nothing of fastsd's."""
        return self.device.type == "cuda" and self.peers == (COMPILED,)

    def flags(self) -> dict[str, Any]:
        """The options in the form of a result file."""
        return {
            "models": list(self.models),
            "batch": list(self.batches),
            "steps": list(self.steps),
            "dtype": [dtype_name(dtype) for dtype in self.dtypes],
            "peers": list(self.peers),
            "size": self.size,
            "budget": self.budget,
            "model": str(self.model) if self.model else None,
        }


def parse(**given: Any) -> Options:
    """Validate options: texts by the names of `HELP`, booleans by those of `SWITCHES`. None, or a missing one, is the
    default.

    Raises:
        FastsdError: one line that names the option.
    """
    values = dict.fromkeys((*HELP, *SWITCHES)) | given
    device = resolve_device("auto")
    cuda, measuring = device.type == "cuda", bool(values["benchmark"])
    models = choose(values["models"] or ("sd15,sdxl,sd21,digits" if cuda else "sd15,digits"))
    dtypes = values["dtype"] or dtype_name(resolve_dtype("auto", device))
    peers = _names(values["peers"] or ("pytorch,diffusers" if cuda else ",".join(PEERS[1:3])))
    for peer in peers:
        if peer not in (*PEERS, "none"):
            raise FastsdError(f"--peers: there is no {peer!r}; there are {', '.join(PEERS)}, none")
    if cuda and COMPILED in peers and len(peers) > 1:
        raise FastsdError(
            f"--peers: {COMPILED} is measured on a GPU in a process of its own: torch.compile gives away workspaces "
            "of cuBLAS that other graphs use; leave the others out"
        )
    budget = _number("--budget", values["budget"], MIN_BUDGET) if values["budget"] else None
    size = int(_number("--size", values["size"], 64)) if values["size"] else None
    if size is not None and size % 64:
        raise FastsdError(f"--size is {size}; it should be a multiple of 64")
    folder = Path(values["model"]) if values["model"] else None
    if folder is not None and not (folder / "model_index.json").is_file():
        raise FastsdError(f"--model: {folder} is not a model folder; it has no model_index.json")
    return Options(
        measuring=measuring,
        models=tuple(models) if measuring else ("tiny",),
        batches=_counts("--batch", values["batch"] or ("1,4,8" if cuda else "1")) if measuring else (2,),
        steps=_counts("--steps", values["steps"] or ("20,30,50" if cuda else "4")) if measuring else (2,),
        dtypes=tuple(resolve_dtype(name, device) for name in _names(dtypes)) if measuring else (torch.float32,),
        peers=tuple(peer for peer in peers if peer != "none"),
        size=size,
        budget=budget,
        model=folder,
        profile=bool(values["profile"]),
        results=Path(values["results"]) if values["results"] else None,
        device=device,
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _counts(option: str, text: str) -> tuple[int, ...]:
    return tuple(int(_number(option, part, 1)) for part in _names(text))


def _number(option: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value >= least:
        raise FastsdError(f"{option} is {text!r}; it should be a number of at least {least:g}")
    return value
