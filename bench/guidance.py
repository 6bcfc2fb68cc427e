"""A step of SD1.5's real size on the CPU under each option of guidance, beside the plain guided step, in turns.

    python -m bench.guidance --rounds 3

Random weights in fp32, one thread, processor time. Each round runs all ways one after another, two steps each, of
which the second is measured: the first prepares the call, and gives DeepCache the features of a whole step. The rows
are those of docs/guidance.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.families import FAMILIES
from bench.models import pipeline_of, random_components
from fastsd.pipeline import Pipeline

PLAIN = "plain"
# The arguments of a call whose second step is what is measured.
WAYS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "outside of the guidance's interval": {"guidance_end": 0.5},
    "`pag_scale=3`": {"pag_scale": 3.0},
    "`freeu=(1.5, 1.6, 0.9, 0.2)`": {"freeu": (1.5, 1.6, 0.9, 0.2)},
    "`deepcache`, a short step": {"deepcache": 2},
    "`deepcache`, `deepcache_branch=2`, a short step": {"deepcache": 2, "deepcache_branch": 2},
}


def step_seconds(pipe: Pipeline, size: int, way: dict[str, Any]) -> float:
    """Processor seconds of the second step of a call; `size` of the image in pixels."""
    settings = {"num_inference_steps": 2, "guidance_scale": 7.5, "sampler": "ddim", "output_type": "latent"}
    steps: Iterator[Any] = pipe.stream("a castle", seed=1, width=size, height=size, **settings, **way)
    next(steps)
    started = time.process_time()
    next(steps)
    return time.process_time() - started


def measure(pipe: Pipeline, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, by round. A first round is not measured: it packs the weights."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    step_seconds(pipe, size, WAYS[PLAIN])
    for _ in range(rounds):
        for name, way in WAYS.items():
            seconds[name].append(step_seconds(pipe, size, way))
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """The shortest of each way, and relative to the plain step's."""
    plain = min(seconds[PLAIN])
    rows = [f"| {name} | {min(found):.2f} s | {min(found) / plain:.2f} |" for name, found in seconds.items()]
    return "\n".join(["| a step | time | relative |", "|---|---|---|", *rows])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guidance", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(FAMILIES), default="sd15")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    family, device = FAMILIES[options.model], torch.device("cpu")
    pipe = pipeline_of(random_components(family, torch.float32, device), device, torch.float32)
    print(table(measure(pipe, family.size, options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
