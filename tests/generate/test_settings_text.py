"""Settings of a call as a text."""

from __future__ import annotations

import pytest

from fastsd.errors import FastsdError
from fastsd.generate.settings_text import parse_settings


def test_names_of_python_and_of_flags() -> None:
    assert parse_settings("steps=4 guidance=2 sampler=euler", "--a") == {
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "sampler": "euler",
    }
    assert parse_settings("guidance_scale=3 negative-prompt='a b'", "--a") == {
        "guidance_scale": 3.0,
        "negative_prompt": "a b",
    }
    assert parse_settings("", "--a") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps", "pairs"),
        ("stepps=4", "did you mean steps"),
        ("steps=0", "1 to 1000"),
        ("steps=many", "whole number"),
        ("seed=4", "no setting"),
        ("prompt='a", "no end"),
    ],
)
def test_what_is_no_setting(text: str, said: str) -> None:
    with pytest.raises(FastsdError, match=said) as error:
        parse_settings(text, "--a")
    assert "--a" in str(error.value)
