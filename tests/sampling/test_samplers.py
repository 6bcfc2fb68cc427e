"""The registry: names that resolve, and one entry that is enough for a new sampler."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.image import infotext
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES, Sampler, resolve

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Euler a", ("euler_a", "default")),
        ("k_euler_ancestral", ("euler_a", "default")),
        ("k_euler", ("euler", "default")),
        ("PLMS", ("pndm", "default")),
        ("DPM++ 2M", ("dpm++2m", "default")),
        ("dpmpp_2m", ("dpm++2m", "default")),
        ("dpmsolver++", ("dpm++2m", "default")),
        ("k_dpmpp_2m_sde", ("dpm++2m_sde", "default")),
        ("dpmpp_sde", ("dpm++sde", "default")),
        ("DPM++ 2M Karras", ("dpm++2m", "karras")),
        ("DPM++ SDE Karras", ("dpm++sde", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpm++2m_sde", "exponential")),
        ("EulerAncestralDiscreteScheduler", ("euler_a", "default")),
        ("DPMSolverMultistepScheduler", ("dpm++2m", "default")),
        ("UniPC", ("unipc", "default")),
        ("uni_pc_bh2", ("unipc", "default")),
        ("euler-maruyama", ("euler_maruyama", "default")),
        ("EM", ("euler_maruyama", "default")),
    ],
)
def test_other_programs_names_resolve(name: str, expected: tuple[str, str]) -> None:
    assert resolve(name) == expected


def test_names_resolve_to_themselves_and_the_argument_wins_over_the_suffix() -> None:
    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            assert resolve(sampler, schedule) == (sampler, schedule)
    assert resolve("dpm++2m karras", "exponential") == ("dpm++2m", "exponential")
    assert resolve("euler", "SGM Uniform") == ("euler", "sgm_uniform")


@pytest.mark.parametrize(
    ("sampler", "schedule", "message"),
    [
        ("eulr", "default", "^sampler: 'eulr' is unknown; did you mean euler"),
        ("dpm++2n", "default", "^sampler: .*did you mean .*dpm[+][+]2m or"),
        ("?", "default", "^sampler: .*docs/samplers.md lists those"),
        ("euler", "karass", "^schedule: 'karass' is unknown; .*karras"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(sampler: str, schedule: str, message: str) -> None:
    with pytest.raises(FastsdError, match=message) as caught:
        resolve(sampler, schedule)
    assert "\n" not in str(caught.value)


def test_every_spelling_belongs_to_one_sampler() -> None:
    """An alias of two samplers would silently mean the later one."""
    for name, sampler in SAMPLERS.items():
        assert sampler.name == name
        for spelling in (name, sampler.label, sampler.diffusers, *sampler.aliases):
            assert not spelling or resolve(spelling)[0] == name, spelling


MIDPOINT = Sampler("midpoint", "karras.euler", "Mid point", "MidpointScheduler", ("rk2",), takes_schedule=False)


@pytest.fixture
def midpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry that a new sampler needs."""
    monkeypatch.setitem(SAMPLERS, "midpoint", MIDPOINT)


def test_a_new_entry_resolves_and_builds(midpoint: None) -> None:
    for spelling in ("midpoint", "Mid Point", "MidpointScheduler", "k_rk2"):
        assert resolve(spelling) == ("midpoint", "default")
    table = build("rk2", 5, SchedulerConfig())
    np.testing.assert_array_equal(table.rows, build("euler", 5, SchedulerConfig()).rows)
    with pytest.raises(FastsdError, match="midpoint has no karras schedule; use default, or one of euler, "):
        build("midpoint", 5, SchedulerConfig(), schedule="karras")
    with pytest.raises(FastsdError, match="did you mean midpoint"):
        resolve("midpont")


def test_a1111s_text_holds_a_new_entry(midpoint: None) -> None:
    settings = {"prompt": "x", "num_inference_steps": 5, "sampler": "midpoint", "schedule": "default", "seed": 1}
    text = infotext.write_parameters(settings)
    assert "Sampler: Mid point" in text and "Schedule type" not in text
    assert infotext.parse_parameters(text)[0]["sampler"] == "midpoint"


def test_the_help_and_diffusers_folders_have_a_new_entry_without_numpy() -> None:
    """Both are made on import, so a new process adds the entry first."""
    code = f"""
import sys
from fastsd.sampling.samplers import SAMPLERS, Sampler
SAMPLERS["midpoint"] = {MIDPOINT!r}
from fastsd.parameters import PARAMETERS
assert not {{"numpy", "torch"}} & set(sys.modules)
from fastsd.cli import flags
from fastsd.weights.layouts.scheduler import CLASS_OF_SAMPLER
assert CLASS_OF_SAMPLER["midpoint"] == "MidpointScheduler"
print(flags.make_parser({{}}).format_help())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--sampler\b.*euler_maruyama\s+midpoint\b", done.stdout, re.S)


def test_the_page_lists_every_sampler_and_schedule() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in SAMPLERS)
    assert all(f"`{name}`" in page for name in SCHEDULES)
    for name, entry in SAMPLERS.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip().strip("`") for cell in line.split("|")[2:5]]
        assert cells[0] == entry.label and cells[2] == entry.diffusers
        assert not cells[1] or resolve(cells[1])[0] == name  # ComfyUI's name
