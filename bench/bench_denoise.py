"""A step as a pipeline does it: the row's conditioning, guidance, UNet, the sampler's update, replayed from a graph."""

from __future__ import annotations

from typing import Any

import torch

from bench import models
from bench.bench_images import GUIDANCE, PROMPT
from bench.bench_parts import UNET_DEPTH
from bench.families import family_of
from bench.measure import Candidate
from bench.roofline import step_work
from bench.session import Session
from fastsd.generate.batch import Batch
from fastsd.generate.request import Pass, plan
from fastsd.kernels import dispatch
from fastsd.pipeline import Pipeline

STEPS = 1000  # of a run: more than a benchmark takes of it
ENOUGH = 100  # rows that must be left when a sample begins


class PipelineSteps:
    """The steps of a run, one after the other; it begins anew before its last ones."""

    def __init__(self, pipe: Pipeline, batch: int, size: int, backend: str | None = None):
        """backend: forced for every step; None: the pipeline's choice."""
        self.pipe, self.backend = pipe, backend
        arguments: dict[str, Any] = {
            "prompt": PROMPT, "seed": 7, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE,
            "num_images_per_prompt": batch, "batch_size": batch, "width": size, "height": size,
        }  # fmt: skip
        self._request = plan(pipe.components, pipe.defaults, arguments)
        self._stage: Pass = self._request.passes[0]
        self._batch: Batch | None = None

    def prepare(self) -> None:
        """What is not timed: text, noise, the table, where the run has not begun or is near its end."""
        if self._batch is None or self._batch.inputs.state.index + ENOUGH > len(self._stage.table):
            timings = {"text": 0.0, "encode": 0.0}
            self._batch = self.pipe._prepare(self._stage, self._request.batches[0], None, timings)

    def __call__(self, i: int) -> torch.Tensor:
        """The next step, as `Pipeline._run` does it; the UNet's output for the first image, `[1, h, w, C]`."""
        assert self._batch is not None
        if self.backend is None:
            return self._step(self._batch)
        with dispatch.forced(self.backend):
            return self._step(self._batch)

    def _step(self, batch: Batch) -> torch.Tensor:
        with self.pipe._turn(self._stage):
            estimate, _ = batch.denoise(), batch.latents
        return estimate.out


def bench_denoise(bench: Session, publish: Any, model: str, batch: int, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    size = bench.size(model, components)
    pipes = {captured: models.pipeline_of(components, device, dtype, captured) for captured in (True, False)}
    captures = device.type == "cuda"

    def candidate(name: str, captured: bool, backend: str | None = None) -> Candidate:
        steps = PipelineSteps(pipes[captured], batch, size, backend)
        return Candidate(name, steps, steps.prepare)

    candidates = [candidate("fastsd", captures)]
    if captures:
        candidates.append(candidate("fastsd, no graph", False))
    if "pytorch" in bench.options.peers:  # captured too, so that only the ops differ
        candidates.append(candidate("pytorch", captures, "torch"))

    def reference() -> torch.Tensor:
        steps = PipelineSteps(pipes[False], batch, size, "reference")
        steps.prepare()
        return steps(0)

    outcomes = bench.run_benchmark(
        "denoise", reference, candidates, dtype, UNET_DEPTH, step_work(family_of(components), batch, size),
        model=model, size=size, batch=batch,
    )  # fmt: skip
    publish(outcomes)
