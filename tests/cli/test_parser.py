"""Mistakes that the parser finds before any value is read."""

from __future__ import annotations

import pytest

from fastsd.cli import main

EMPTY = {
    "--model": ["--prompt", "a", "--model", ""],
    "--vae": ["--prompt", "a", "--vae", "a.safetensors", ""],
    "--image": ["--prompt", "a", "--image="],
    "--output": ["--prompt", "a", "-o", ""],
    "--lora": ["--prompt", "a", "--lora", ""],
    "--embedding-dir": ["--prompt", "a", "--embedding-dir", ""],
    "--from-image": ["--from-image", ""],
    "IN": ["convert", "", "out"],
    "OUT": ["convert", "digits", ""],
    "--upscaler": ["upscale", "--upscaler", "", "a.png"],
    "--out": ["show", "attention", "--out", ""],
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_path_is_not_the_current_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(EMPTY[name]) == 2
    assert f"error: {name}: the path is empty; a variable of the shell may be unset" in capsys.readouterr().err
