"""Complete images: the fast path and PyTorch against fp32, and with CUDA graphs against without."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastsd.kernels import dispatch
from fastsd.kernels.choice.rule import CheckResult, exact_arithmetic, note_out_of_memory
from fastsd.pipeline import Pipeline

SEED = 7


@dataclass(frozen=True)
class ImageRun:
    """How the test image is generated: checkpoint, device, precision, prompt, steps."""

    model: str
    device: str
    dtype: str
    prompt: str
    steps: int

    def load(self, dtype: str | None = None, graphs: bool = False) -> Pipeline:
        """Load the pipeline. Ops inside a graph can be neither observed nor replaced, so graphs are off by default."""
        return Pipeline.from_pretrained(self.model, device=self.device, dtype=dtype or self.dtype, graphs=graphs)

    def generate(self, pipe: Pipeline, output_type: str = "np") -> Any:
        """The image, `[1, H, W, 3]` in [0, 1] ("np"), or its latents ("latent")."""
        return pipe(self.prompt, seed=SEED, num_inference_steps=self.steps, output_type=output_type).images

    def generate_timed(self, pipe: Pipeline, output_type: str = "np") -> tuple[Any, float]:
        """`generate`, and the seconds of a second call, which needs no warm-up."""
        image = self.generate(pipe, output_type)
        start = time.perf_counter()
        self.generate(pipe, output_type)
        return image, time.perf_counter() - start


def check_image(image_run: ImageRun, pipe: Pipeline) -> CheckResult:
    """Check the final image against the specification in fp32, in grey levels of 255.

    The rule holds for root mean squares, since the largest difference of a pixel at an edge says little, and one grey
    level is the ulp: rms(fast - truth) <= 2 rms(torch - truth) + 1.
    """
    unjudged = CheckResult("image", f"{image_run.steps} steps", backend=_backend(pipe))

    def check() -> CheckResult:
        exact = image_run.load("fp32")
        with exact_arithmetic():
            truth = image_run.generate(exact)
        del exact
        fast, seconds = image_run.generate_timed(pipe)
        with dispatch.forced("torch"):
            plain, torch_seconds = image_run.generate_timed(pipe)
        return compare_images(unjudged, fast, plain, truth, seconds, torch_seconds)

    return note_out_of_memory(unjudged, check)


def compare_images(
    unjudged: CheckResult, fast: np.ndarray, plain: np.ndarray, truth: np.ndarray, seconds: float, torch_seconds: float
) -> CheckResult:
    """Judge images `[N, H, W, 3]` in [0, 1]."""
    error, torch_error = (float(np.sqrt(np.mean(np.square(255 * (x - truth))))) for x in (fast, plain))
    allowed = 2 * torch_error + 1
    return replace(
        unjudged,
        shape="x".join(map(str, truth.shape)),
        error=error,
        torch_error=torch_error,
        allowed=allowed,
        seconds=seconds,
        torch_seconds=torch_seconds,
        passed=error <= allowed,
        note=f"PSNR {psnr(error):.1f} dB, PyTorch's {psnr(torch_error):.1f} dB",
    )


def psnr(rms: float) -> float:
    """The peak signal-to-noise ratio in dB of a root mean square error in grey levels of 255; infinite for 0."""
    return float(20 * np.log10(255 / rms)) if rms else float("inf")


def check_graphs(image_run: ImageRun, device: torch.device) -> CheckResult:
    """Check that latents with and without CUDA graphs are bit-identical."""
    unjudged = CheckResult("graphs", "on and off", "latent")
    if device.type != "cuda":
        return replace(unjudged, note="CUDA graphs need a CUDA device")

    def check() -> CheckResult:
        return compare_graphs(unjudged, lambda on: image_run.generate_timed(image_run.load(graphs=on), "latent"))

    return note_out_of_memory(unjudged, check)


def compare_graphs(unjudged: CheckResult, generate: Callable[[bool], tuple[torch.Tensor, float]]) -> CheckResult:
    """Judge the latents that `generate` returns with graphs (True) and without (False)."""
    eager, eager_seconds = generate(False)
    replayed, seconds = generate(True)
    same = torch.equal(eager, replayed)
    verdict = "bit-identical" if same else "latents with and without graphs differ"
    return replace(
        unjudged,
        error=(eager - replayed).abs().max().item(),
        allowed=0.0,
        seconds=seconds,
        torch_seconds=eager_seconds,
        passed=same,
        note=f"{verdict}; the second time is without graphs",
    )


def _backend(pipe: Pipeline) -> str:
    return dispatch.backend(torch.empty(1, dtype=pipe.dtype, device=pipe.device))
