"""Whole pipelines on a GPU that is not there, at full size, in every way of using them; every kernel they launch
compiles."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from packaging.version import Version

pytest.importorskip("triton", reason="no Triton for this platform")

import torch

from bench.dryrun import docs, launches
from bench.dryrun.device import why_not
from bench.dryrun.record import DryRun, DryRunFault, dry_run
from bench.dryrun.ways import WAYS, generate
from bench.families import FAMILIES
from fastsd.generate import batch as batches
from fastsd.generate.noise import Noise
from fastsd.kernels import dispatch
from tests.support.project import OLDEST_TRITON, ROOT, TRITON_FOLDER

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(dispatch.interpreted(), reason="interpreted kernels are not compiled"),
]
needs_dry_run = pytest.mark.skipif(why_not() is not None, reason=f"no dry run here: {why_not()}")

SM = 90
CASES = [*(("sd15", way) for way in WAYS), ("sd21", "text"), ("sdxl", "text"), ("sdxl", "refiner")]


def run_of(name: str, way: str, **given: Any) -> tuple[DryRun, Any]:
    with dry_run(docs.GPU) as run:
        return run, generate(run, FAMILIES[name], way, **given)


@functools.cache
def once(name: str, way: str) -> tuple[DryRun, Any]:
    return run_of(name, way)


@needs_dry_run
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: value)
def test_nothing_waits_for_the_host_and_nothing_is_copied(name: str, way: str) -> None:
    run, result = once(name, way)
    size = FAMILIES[name].size * (3 if way == "hires" else 2) // 2
    assert [image.size for image in result.images] == [(size, size)] and not result.notes
    steps = [section for section in run.sections if section.name == "step"]
    assert len(steps) == (2 if way in ("refiner", "hires") else 1)
    assert sum(section.replays for section in steps) == (3 if way == "hires" else 2)
    for section in run.sections[1:]:
        assert not section.hidden, section.name
    assert run.memory.live < run.memory.peak <= run.memory.reserved


@needs_dry_run
def test_a_batch_takes_no_more_launches() -> None:
    one, four = (run_of("tiny", "text", batch=count)[0].of("step") for count in (1, 4))
    assert len(one.launches) == len(four.launches)


@needs_dry_run
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


@needs_dry_run
def test_the_page_shows_what_is_counted() -> None:
    page = docs.PAGE.read_text(encoding="utf-8")
    new = docs.block(once("sd15", "text")[0], once("sdxl", "text")[0])
    assert docs.written(page, new) == page, "run make dryrun, and review the diff"


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every launch that the runs above met, of the sampler's updates, and of the compile report."""
    found = launches.of_report(SM)
    if why_not() is None:
        for name, way in CASES:
            found += launches.met(once(name, way)[0], f"{name} {way}")
        odd, _ = run_of("sd15", "text", size=520)  # blocks of keys do not divide 65 x 65
        found += [*launches.met(odd, "sd15 65x65"), *launches.of_steps(SM)]
    file = tmp_path_factory.mktemp("launches") / "launches"
    file.write_bytes(launches.dumps(launches.distinct(found)))
    return file


@pytest.mark.parametrize("which", ["oldest", "installed"])
def test_every_launch_compiles_and_fits(which: str, met: Path, tmp_path: Path) -> None:
    """Without spills, under the oldest Triton allowed and under the one installed here."""
    if which == "oldest" and not TRITON_FOLDER.is_dir():
        install = f"pip install --no-deps --target {TRITON_FOLDER} triton=={OLDEST_TRITON}"
        pytest.skip(f"Triton {OLDEST_TRITON} is not in {TRITON_FOLDER}: `make test` puts it there, so does {install}")
    path = [*([str(TRITON_FOLDER)] if which == "oldest" else []), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.dryrun.compiles", str(met), str(SM)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert Version(told["triton"]) == Version(OLDEST_TRITON if which == "oldest" else version("triton"))
    assert not told["wrong"], "\n".join(told["wrong"])
    assert told["compiled"] > 100
