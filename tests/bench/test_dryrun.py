"""What a guided step launches on a GPU, counted without one."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

from bench.dryrun.device import why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.record import RecordedLaunch, dry_run
from bench.dryrun.steps import guided_step
from bench.families import FAMILIES

if why_not() is not None:
    pytest.skip(f"no dry run here: {why_not()}", allow_module_level=True)

# The most launches of a guided step of one image: UNet, guidance and update. Lower them with every launch that goes.
BUDGETS = {"sd15": 507, "sdxl": 1175}


@pytest.fixture(scope="module", params=BUDGETS)
def step(request: pytest.FixtureRequest) -> tuple[str, list[RecordedLaunch]]:
    with dry_run(GPUS["h100"]) as run:
        guided_step(run, FAMILIES[request.param])
    return request.param, run.of("step")


def test_a_step_keeps_its_budget(step: tuple[str, list[RecordedLaunch]]) -> None:
    name, launches = step
    assert len(launches) <= BUDGETS[name], Counter(launch.kind for launch in launches)


def test_a_step_has_the_layers_of_its_unet(step: tuple[str, list[RecordedLaunch]]) -> None:
    name, launches = step
    layers = {launch.layer for launch in launches if launch.kind == "convolution"}
    convolutions = {"sd15": 52, "sdxl": 40}
    assert len(layers) == convolutions[name]
