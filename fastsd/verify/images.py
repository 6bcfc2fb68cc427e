"""Whole pictures: fast path and PyTorch beside fp32, and with CUDA graphs beside without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsd.kernels import dispatch
from fastsd.pipeline import Pipeline
from fastsd.verify.rule import Row, attempted, exactly

SEED = 7


@dataclass(frozen=True)
class Drawing:
    """What is drawn: on which checkpoint, where, in which precision, from which words, in how many steps."""

    model: str
    device: str
    dtype: str
    prompt: str
    steps: int

    def load(self, dtype: str | None = None, graphs: bool = False) -> Pipeline:
        """Without graphs, in which ops could be neither watched nor replaced by their specification."""
        return Pipeline.from_pretrained(self.model, device=self.device, dtype=dtype or self.dtype, graphs=graphs)

    def draw(self, pipe: Pipeline, output_type: str = "np") -> Any:
        """The picture, `[1, H, W, 3]` in [0, 1] ("np"), or its latent ("latent")."""
        return pipe(self.prompt, seed=SEED, num_inference_steps=self.steps, output_type=output_type).images

    def timed(self, pipe: Pipeline, output_type: str = "np") -> tuple[Any, float]:
        """`draw` and the seconds of a second one."""
        picture = self.draw(pipe, output_type)
        start = time.perf_counter()
        self.draw(pipe, output_type)
        return picture, time.perf_counter() - start


def check_picture(drawing: Drawing, pipe: Pipeline) -> Row:
    """The final picture against the specification in fp32, in grey levels of 255.

    By the rule, with root mean squares in place of largest distances (a pixel at an edge says little) and a grey level
    as the ulp: rms(fast - truth) <= 2 rms(torch - truth) + 1.
    """
    row = Row("image", f"{drawing.steps} steps", backend=_backend(pipe))

    def work() -> Row:
        exact = drawing.load("fp32")
        with exactly():
            truth = drawing.draw(exact)
        del exact
        fast, seconds = drawing.timed(pipe)
        with dispatch.forced("torch"):
            plain, torch_seconds = drawing.timed(pipe)
        return compare_pictures(row, fast, plain, truth, seconds, torch_seconds)

    return attempted(row, work)


def compare_pictures(
    row: Row, fast: np.ndarray, plain: np.ndarray, truth: np.ndarray, seconds: float, torch_seconds: float
) -> Row:
    """`row` with the verdict on pictures `[N, H, W, 3]` in [0, 1]."""
    error, torch_error = (float(np.sqrt(np.mean(np.square(255 * (x - truth))))) for x in (fast, plain))
    allowed = 2 * torch_error + 1
    return Row(
        row.level,
        row.name,
        "x".join(map(str, truth.shape)),
        row.backend,
        error=error,
        torch_error=torch_error,
        allowed=allowed,
        seconds=seconds,
        torch_seconds=torch_seconds,
        passed=error <= allowed,
        note=f"PSNR {psnr(error):.1f} dB, PyTorch's {psnr(torch_error):.1f} dB",
    )


def psnr(rms: float) -> float:
    """Peak signal to noise in dB for a root mean square error in grey levels of 255; infinite for none."""
    return float(20 * np.log10(255 / rms)) if rms else float("inf")


def check_graphs(drawing: Drawing, device: torch.device) -> Row:
    """Latents with and without CUDA graphs: the same to the bit, twice."""
    row = Row("graphs", "on and off", "latent")
    if device.type != "cuda":
        return _with_note(row, "CUDA graphs run on CUDA alone")

    def work() -> Row:
        return compare_graphs(row, lambda on: drawing.timed(drawing.load(graphs=on), "latent"), drawing)

    return attempted(row, work)


def compare_graphs(row: Row, timed: Callable[[bool], tuple[torch.Tensor, float]], drawing: Drawing) -> Row:
    """`row` with the verdict on what `timed` draws with graphs and without; its seconds are those of both."""
    eager, torch_seconds = timed(False)
    replayed, seconds = timed(True)
    same = torch.equal(eager, replayed)
    error = (eager - replayed).abs().max().item()
    note = "bit-identical" if same else "with graphs and without differ"
    return Row(
        row.level, row.name, row.shape, error=error, allowed=0.0, seconds=seconds, torch_seconds=torch_seconds,
        passed=same, note=f"{note}; PyTorch's time here is that without graphs",
    )  # fmt: skip


def _with_note(row: Row, note: str) -> Row:
    return Row(row.level, row.name, row.shape, note=note)


def _backend(pipe: Pipeline) -> str:
    return dispatch.backend(torch.empty(1, dtype=pipe.dtype, device=pipe.device))
