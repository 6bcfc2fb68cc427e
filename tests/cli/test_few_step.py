"""--few-step, and an image that remembers it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def test_the_command_line_and_from_image(cli: Callable, model: Path) -> None:
    """The flag, one note, and an image that is repeated with its own settings; a new kind brings its own."""
    flags = ("-m", model, "-p", "a cat", "--seed", "1")
    first = cli(*flags, "--few-step", "turbo", "--count", "3", "-b", "1")
    assert first.code == 0 and first.err.count("few-step model (turbo, as asked for)") == 1
    stored = json.loads(Image.open(first.paths[0]).text["fastsd"])
    assert (stored["few_step"], stored["num_inference_steps"], stored["guidance_scale"]) == ("turbo", 1, 1.0)
    again = cli("--from-image", first.paths[0])
    assert Image.open(again.paths[0]).tobytes() == Image.open(first.paths[0]).tobytes()
    other = json.loads(Image.open(cli("--from-image", first.paths[0], "--few-step", "lcm").paths[0]).text["fastsd"])
    assert (other["few_step"], other["sampler"], other["num_inference_steps"]) == ("lcm", "lcm", 4)
    plain = cli(*flags, "--few-step", "none")
    assert "few-step" not in plain.err
    refused = cli(*flags, "--few-step", "fast")
    assert refused.code == 2 and "--few-step is 'fast'; it should be one of lcm, turbo" in refused.err
