from __future__ import annotations

import pickle
from typing import Any

import pytest

from fastsd.errors import FastsdError
from tests.support.server import order


def test_orders_that_differ_only_in_what_images_have_for_themselves_share_a_batch() -> None:
    other = order("a dog", 9, negative_prompt="fog", num_images_per_prompt=3, width=None)
    assert other.key == order().key is not None
    assert other.count == 3


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 16},
        {"num_inference_steps": 5},
        {"guidance_scale": 5.0},
        {"model": "two"},
        {"api": "other"},
        {"noise": "gpu"},
        {"like": "a1111"},
        {"subseed": 3, "subseed_strength": 0.5},
        {"image": object()},
    ],
)
def test_orders_that_differ_elsewhere_do_not(arguments: dict[str, Any]) -> None:
    assert order(**arguments).key != order().key


@pytest.mark.parametrize("arguments", [{"image": 1}, {"noise": "gpu"}, {"like": "comfy"}, {"subseed": 3}])
def test_what_cannot_be_drawn_image_by_image_runs_alone(arguments: dict[str, Any]) -> None:
    assert order(**arguments).key is None


def test_an_error_keeps_what_it_is_about_in_the_pipe() -> None:
    error = pickle.loads(pickle.dumps(FastsdError("it should be less", argument="width", value=3, path="x")))
    assert (error.message, error.argument, error.value, error.path) == ("it should be less", "width", 3, "x")
