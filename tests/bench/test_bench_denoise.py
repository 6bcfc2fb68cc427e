"""The steps of a benchmark are a pipeline's own: the same numbers, one after the other, then from the start."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from bench import bench_denoise
from bench.bench_denoise import PipelineSteps
from bench.bench_images import GUIDANCE, PROMPT
from tests.support.pipelines import graphed_pipeline, tiny_pipeline

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def test_steps_are_those_of_a_call_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_denoise, "STEPS", 5)
    monkeypatch.setattr(bench_denoise, "ENOUGH", 2)
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    steps = PipelineSteps(pipe, 2, 64)
    for i in range(8):  # four of them, and four again
        steps.prepare()
        seen[i % 4].append(steps(i))
        if i % 4 == 3:
            assert steps._batch is not None
            latents = steps._batch.latents
    for first, second in seen.values():
        assert torch.equal(first, second)
    assert recorder.recorded == 2  # the text, the step
    arguments = {"seed": 7, "num_inference_steps": 5, "guidance_scale": GUIDANCE, "num_images_per_prompt": 2}
    expected = [step.latents for step in plain.stream(PROMPT, batch_size=2, width=64, height=64, **arguments)]
    assert torch.equal(latents, expected[3])
