"""Whole pipelines on a GPU that is not there, at full size, in every way of using them; every kernel they launch
compiles."""

from __future__ import annotations

import functools
import os
import re
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

from bench import model_calls, warm
from bench.compiled import SHARED
from bench.dryrun import docs, launches
from bench.dryrun.compiles import CompiledLaunches
from bench.dryrun.device import why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.record import DryRun, DryRunFault, dry_run
from bench.dryrun.ways import WAYS, generate
from bench.families import FAMILIES
from bench.intercept import KernelLaunch
from fastsd.errors import FastsdError
from fastsd.generate import batch as batches
from fastsd.generate.noise import Noise
from fastsd.kernels import dispatch
from fastsd.model.fp8 import layers_in_fp8
from fastsd.model.layers import Conv2d
from fastsd.model.unet import UNet
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
def test_convolutions_of_wide_maps_are_fp8_on_a_gpu_that_has_it() -> None:
    run, _ = once("sd15", "fp8")
    with torch.device("meta"):
        chosen = layers_in_fp8(UNet(FAMILIES["sd15"].unet)).items()
    found = [launch for launch in run.of("step").launches if launch.op == "conv2d_fp8"]
    convolved = [launch.layer for launch in found if launch.kind == "convolution" and launch.flops]
    assert sorted(convolved) == sorted(f"unet.{name}" for name, layer in chosen if isinstance(layer, Conv2d))
    assert len([launch for launch in found if launch.kind == "elementwise"]) == 2 * len(convolved)
    with dry_run(GPUS["a100"]) as old, pytest.raises(FastsdError, match="does not multiply fp8"):
        generate(old, FAMILIES["tiny"], "fp8")


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
    """A file of every launch that the runs above met, of the sampler's updates, and of the compile report; of the
    gradients of attention those of one shape."""
    found = [
        launch
        for launch in launches.of_report(SM)
        if "gradients" not in launch.case or "gradients 4096x4096x40" in launch.case
    ]
    if why_not() is None:
        for name, way in CASES:
            found += launches.met(once(name, way)[0], f"{name} {way}")
        odd, _ = run_of("sd15", "text", size=520)  # blocks of keys do not divide 65 x 65
        found += [*launches.met(odd, "sd15 65x65"), *launches.of_steps(SM)]
    file = tmp_path_factory.mktemp("launches") / "launches"
    file.write_bytes(launches.dumps(launches.distinct(found)))
    return file


# On sm_100 two launches read a number of 4 or 8 bytes from local memory in each turn of their loop: docs/kernels.md.
KEPT_IN_MEMORY = r"_groupnorm_(silu|apply)_kernel: 8 bytes spilled"
# What makes a launch of a product or a convolution another one than those of other sizes.
TILE = ("ROWS", "COLUMNS", "COLUMNS1", "COLUMNS2", "DEPTH", "GATED", "BM", "BN", "N1", "N2", "SWAPPED", "UP")


def other_candidates(known: Path) -> list[KernelLaunch]:
    """Launches of SD1.5's UNet, in 16 bits and fp8, and of the autoencoder by the ways that are not the first: one for
    each tile of a kernel."""
    keys = {warm.compiler_key(launch.kernel, launch.arguments) for launch in launches.loads(known.read_bytes())}
    found = {}
    with patch.object(model_calls, "UNETS", model_calls.UNETS[:1]), patch.object(model_calls, "ENCODERS", {}):
        for launch in warm.every_launch(SM, fp8=True):
            name, arguments = launch.kernel.fn.__name__, launch.arguments
            tile = tuple(arguments.get(key) for key in TILE)
            if warm.compiler_key(launch.kernel, arguments) not in keys and ("linear" in name or "conv2d" in name):
                found.setdefault((name, tile), launch)
    return list(found.values())


@pytest.mark.parametrize("which", ["oldest", "installed"])
def test_every_launch_compiles_and_fits(which: str, met: Path, tmp_path: Path) -> None:
    """Without spills, under the oldest Triton allowed and under the one installed here."""
    compiled = compiled_by(which, met, tmp_path)
    assert sum(kernel.launches for kernel in compiled.kernels.values()) > 100


@pytest.mark.parametrize("which", ["oldest", "installed"])
def test_the_other_candidates_compile_and_fit(which: str, met: Path, tmp_path: Path) -> None:
    """Products and convolutions by the ways that are used only where they are measured to be faster: a few of them."""
    file = tmp_path / "others"
    file.write_bytes(launches.dumps(other_candidates(met)))
    compiled = compiled_by(which, file, tmp_path)
    assert {"linear", "conv2d_tma"} <= set(compiled.kernels), compiled


@pytest.mark.slow
@needs_dry_run
@pytest.mark.parametrize("which", ["oldest", "installed"])
@pytest.mark.parametrize("sm", sorted(SHARED))
def test_every_way_compiles_and_fits_everywhere(which: str, sm: int, tmp_path: Path) -> None:
    file = tmp_path / "launches"
    file.write_bytes(launches.dumps(launches.launches(sm)))
    assert len(compiled_by(which, file, tmp_path, sm).kernels) > 5


def compiled_by(which: str, file: Path, cache: Path, sm: int = SM) -> CompiledLaunches:
    """What a version of Triton makes of the launches in a file; nothing is wrong."""
    if which == "oldest" and not TRITON_FOLDER.is_dir():
        install = f"pip install --no-deps --target {TRITON_FOLDER} triton=={OLDEST_TRITON}"
        pytest.skip(f"Triton {OLDEST_TRITON} is not in {TRITON_FOLDER}: `make test` puts it there, so does {install}")
    path = [*([str(TRITON_FOLDER)] if which == "oldest" else []), str(ROOT)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.dryrun.compiles", str(file), str(sm)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    told = CompiledLaunches.read(done.stdout.splitlines()[-1])
    assert Version(told.triton) == Version(OLDEST_TRITON if which == "oldest" else version("triton"))
    wrong = [problem for problem in told.wrong if sm != 100 or not re.search(KEPT_IN_MEMORY, problem)]
    assert not wrong, "\n".join(wrong)
    return told
