"""Steps that the caller lists: `timesteps` and `sigmas`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastsd
from fastsd.cli import repeat
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.generate.request import plan
from fastsd.sampling.build import build
from fastsd.sampling.samplers import SAMPLERS

FIVE = [999, 700, 400, 150, 10]


@pytest.fixture(scope="module")
def pipe() -> fastsd.Pipeline:
    return fastsd.Pipeline.from_pretrained("digits")


def table_of(pipe: fastsd.Pipeline, **arguments: Any) -> Any:
    request = plan(pipe.components, pipe.defaults, {"prompt": "a handwritten eight", "sampler": "euler", **arguments})
    return request.passes[-1].table


@pytest.mark.parametrize("sampler", [name for name, entry in SAMPLERS.items() if entry.takes_levels])
def test_the_network_sees_the_listed_timesteps(sampler: str) -> None:
    """Every step begins at its timestep; what lies between is the sampler's own."""
    table = build(sampler, 5, SchedulerConfig(), timesteps=FIVE)
    first_rows = np.flatnonzero(np.diff(table.step, prepend=-1))
    assert table.timesteps[first_rows].tolist() == pytest.approx(FIVE, abs=1e-9)


@pytest.mark.parametrize("value", ["999,700,400,150,10", tuple(FIVE), np.array(FIVE), torch.tensor(FIVE)])
def test_a_list_an_array_a_tensor_and_a_text_are_the_same(pipe: fastsd.Pipeline, value: Any) -> None:
    assert table_of(pipe, timesteps=value).timesteps.tolist() == FIVE


def test_sigmas_count_one_more_than_the_steps(pipe: fastsd.Pipeline) -> None:
    table = table_of(pipe, sigmas=[14.6, 3, 0.5, 0.0], sampler="euler")
    assert (len(table), table.steps) == (3, 3)
    assert table.keep[:, 1].tolist() == pytest.approx([3, 0.5, 0])


def test_an_image_starts_inside_the_list(pipe: fastsd.Pipeline) -> None:
    image = Image.new("RGB", (32, 32))
    assert table_of(pipe, timesteps=FIVE, image=image, strength=0.6).timesteps.tolist() == FIVE[2:]


def test_the_settings_hold_the_list_and_repeat_it(pipe: fastsd.Pipeline) -> None:
    made = pipe("a handwritten eight", seed=1, timesteps=FIVE, sampler="euler")
    settings = made.parameters
    assert (settings["timesteps"], settings["num_inference_steps"]) == ("999,700,400,150,10", 5)
    again = pipe("a handwritten eight", seed=1, timesteps=settings["timesteps"], sampler=settings["sampler"])
    assert np.array_equal(np.asarray(made.images[0]), np.asarray(again.images[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [10, 999]}, "timesteps is .*each below the one before"),
        ({"timesteps": [10.5]}, "timesteps is .*whole numbers"),
        ({"timesteps": []}, "timesteps is .*whole numbers"),
        ({"timesteps": [1000, 10]}, "timesteps is .*the model has the timesteps 0 to 999"),
        ({"timesteps": FIVE, "num_inference_steps": 6}, "num_inference_steps is 6; timesteps are those of 5 steps"),
        ({"timesteps": FIVE, "schedule": "karras"}, "schedule is 'karras'; timesteps say where the steps are"),
        ({"timesteps": FIVE, "spacing": "leading"}, "spacing is 'leading'; timesteps say where the steps are"),
        ({"timesteps": FIVE, "sampler": "ddim"}, "timesteps: ddim spaces its own steps; use euler"),
        ({"timesteps": [1000, 10], "sampler": "ddim"}, "timesteps is .*the model has the timesteps 0 to 999"),
        ({"sigmas": [3, 0], "sampler": "lcm"}, "sigmas: lcm spaces its own steps; use euler"),
        ({"timesteps": FIVE, "sigmas": [3, 0]}, "timesteps: given with sigmas"),
        ({"sigmas": [3]}, "sigmas is .*at least 2"),
        ({"sigmas": [3, -1]}, "sigmas is .*the last 0 or above"),
        ({"timesteps": FIVE, "hires_scale": 2, "hires_steps": 9}, "hires_steps is 9; timesteps are those of 5 steps"),
        (
            {"timesteps": FIVE, "hires_scale": 2, "hires_strength": 0.5, "like": "comfy"},
            "timesteps is .*like comfy takes the last 5 of 10 steps for this strength; leave it out",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(pipe: fastsd.Pipeline, arguments: dict, message: str) -> None:
    with pytest.raises(FastsdError, match=message):
        table_of(pipe, **arguments)


@pytest.mark.parametrize("like", ["none", "diffusers", "a1111", "comfy"])
@pytest.mark.parametrize("second", [False, True], ids=["image", "hires"])
def test_an_image_and_the_second_pass_run_the_last_of_the_list_or_are_refused(
    pipe: fastsd.Pipeline, like: str, second: bool
) -> None:
    """As many as each program runs of a strength; ComfyUI's are those of a longer schedule, which the list is not."""
    image = Image.new("RGB", (32, 32))
    given: dict[str, Any] = {"hires_scale": 2, "hires_strength": 0.5} if second else {"image": image, "strength": 0.5}
    if like == "comfy":
        with pytest.raises(FastsdError, match="timesteps is .*the last 5 of 10 steps"):
            table_of(pipe, timesteps=FIVE, like=like, **given)
        return
    run = {"none": 2, "diffusers": 2, "a1111": 3}[like]
    assert table_of(pipe, timesteps=FIVE, like=like, **given).timesteps.tolist() == FIVE[-run:]


def flags(**given: object) -> Namespace:
    return Namespace(**{name: given.get(name) for name in (*repeat.LISTS, *repeat.PLACING)})


@pytest.mark.parametrize(
    ("given", "stored", "outdated", "notes"),
    [
        ({}, {"timesteps": "999,10", "num_inference_steps": 2}, (), []),
        ({"timesteps": "900,1"}, {"timesteps": "999,10"}, (*repeat.LISTS, *repeat.PLACING), []),
        ({"sigmas": "9,0"}, {"timesteps": "999,10"}, (*repeat.LISTS, *repeat.PLACING), []),
        ({"timesteps": "900,1"}, {"spacing": "trailing"}, (*repeat.LISTS, *repeat.PLACING), []),
        ({"num_inference_steps": 2}, {"timesteps": "999,10", "num_inference_steps": 2}, (), []),
        (
            {"num_inference_steps": 8},
            {"timesteps": "999,10", "num_inference_steps": 2},
            repeat.LISTS,
            ["not repeated: --timesteps, as --steps is given"],
        ),
        ({"schedule": "karras"}, {"sigmas": "9,0"}, repeat.LISTS, ["not repeated: --sigmas, as --schedule is given"]),
        ({"schedule": "karras"}, {"num_inference_steps": 2}, repeat.LISTS, []),
    ],
)
def test_what_a_flag_says_of_the_steps_takes_the_place_of_what_the_image_says(
    given: dict[str, Any], stored: dict[str, Any], outdated: tuple[str, ...], notes: list[str]
) -> None:
    said: list[str] = []
    assert repeat._outdated(flags(**given), stored, said) == outdated and said == notes
