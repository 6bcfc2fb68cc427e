"""Whole pipelines on a GPU that is not there, in every way of using them, at full size."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import torch

from bench.dryrun.device import why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.record import DryRun, DryRunFault, dry_run
from bench.dryrun.ways import WAYS, generate
from bench.families import FAMILIES
from fastsd.generate import batch as batches
from fastsd.generate.noise import Noise

if why_not() is not None:
    pytest.skip(f"no dry run here: {why_not()}", allow_module_level=True)

pytestmark = pytest.mark.heavy

CASES = [*(("sd15", way) for way in WAYS), ("sd21", "text"), ("sdxl", "text"), ("sdxl", "refiner")]


def run_of(name: str, way: str, **given: Any) -> tuple[DryRun, Any]:
    with dry_run(GPUS["h100"]) as run:
        return run, generate(run, FAMILIES[name], way, **given)


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: value)
def test_nothing_waits_for_the_host_and_nothing_is_copied(name: str, way: str) -> None:
    run, result = run_of(name, way)
    size = FAMILIES[name].size * (3 if way == "hires" else 2) // 2
    assert [image.size for image in result.images] == [(size, size)] and not result.notes
    steps = [section for section in run.sections if section.name == "step"]
    assert len(steps) == (2 if way in ("refiner", "hires") else 1)
    assert sum(section.replays for section in steps) == (3 if way == "hires" else 2)
    for section in run.sections[1:]:
        assert {launch.name for launch in section.hidden} <= {"addmm: layout"}, section.name
    assert run.memory.live < run.memory.peak <= run.memory.reserved


def test_a_batch_takes_no_more_launches() -> None:
    one, four = (run_of("tiny", "text", batch=count)[0].of("step") for count in (1, 4))
    assert len(one.launches) == len(four.launches)


def test_a_look_between_two_replays_fails() -> None:
    """A row of the loop reads nothing from the device, outside of the graph either, and copies only pinned memory."""
    plain = batches.advance.timestep
    with patch.object(batches.advance, "timestep", lambda state: plain(state) + float(state.x.sum())):
        with pytest.raises(DryRunFault, match="between two replays"):
            run_of("tiny", "text")
    sample = Noise.sample
    with patch.object(Noise, "sample", lambda self: torch.zeros(sample(self).shape)):
        with pytest.raises(DryRunFault, match="between two replays"):
            run_of("tiny", "text", sampler="euler_a")
    run_of("tiny", "text", sampler="euler_a")
