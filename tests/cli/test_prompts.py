"""Prompt syntax and embeddings from the command line, and in an image's metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from fastsd.image import files as images
from fastsd.image import metadata

pytestmark = pytest.mark.heavy

PROMPT = r"a (red:1.3) [cat|dog], \(x\) BREAK [[y]:0.5], 12:30"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("own", [True, False])
def test_the_prompt_is_kept_as_it_was_written(cli: Callable, model: Path, plain: bool, own: bool) -> None:
    flags = ("--plain-prompt",) if plain else ()
    first = cli("-p", PROMPT, "-n", "[fog:(mist:1.2):1]", "-m", model, "--seed", 3, *flags)
    assert (first.code, first.err) == (0, "")
    with Image.open(first.paths[0]) as image:
        text = str(image.info["parameters"])
        assert text.startswith(f"{PROMPT}\nNegative prompt: [fog:(mist:1.2):1]\nSteps: 2")
        if not own:  # A1111's text alone, as another program hands it on
            info = PngInfo()
            info.add_text("parameters", text)
            image.save(first.paths[0], pnginfo=info)
    found = metadata.read_texts(images.read_text(first.paths[0]))[0]
    assert found["prompt"] == PROMPT and found.get("prompt_syntax") == ("plain" if plain else None)
    again = cli("--from-image", first.paths[0], "-m", model)
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    other = cli(
        "-p", PROMPT, "-n", "[fog:(mist:1.2):1]", "-m", model, "--seed", 3, *(() if plain else ("--plain-prompt",))
    )
    assert (pixels(other.paths[0]) != pixels(first.paths[0])).any()


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    (tmp_path / "inks").mkdir()
    path = tmp_path / "inks" / "ink.safetensors"
    save_file({"emb_params": torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, path)
    (tmp_path / "inks" / "notes.txt").write_text("x")
    (tmp_path / "inks" / "broken.safetensors").write_bytes(b"broken")  # harmless while no prompt names it
    torch.save({"string_to_param": {"*": torch.randn(1, 32)}}, tmp_path / "inks" / "old.pt")
    return path


def test_embeddings(cli: Callable, model: Path, ink: Path) -> None:
    base = ("-m", model, "--seed", 3)
    without = cli("-p", "a cat, ink", *base)
    given = cli("-p", "a cat, ink", *base, "--embedding", ink)
    assert given.code == 0 and given.err == "" and (pixels(given.paths[0]) != pixels(without.paths[0])).any()
    for same in (
        ("-p", "a cat, <i>", "--embedding", f"{ink}:<i>"),
        ("-p", "a cat, Ink", "--embedding-dir", ink.parent),
        ("--from-image", given.paths[0], "--embedding", ink),
        ("--from-image", given.paths[0], "--embedding-dir", ink.parent),
    ):
        ran = cli(*same, *base)
        assert ran.code == 0 and ran.err == ""
        np.testing.assert_array_equal(pixels(ran.paths[0]), pixels(given.paths[0]))
    unused = cli("-p", "a cat", *base, "--embedding", ink)
    assert unused.err == "note: the prompt does not name the embedding 'ink.safetensors'\n"
    old = cli("-p", "old ink", *base, "--embedding-dir", ink.parent, "--allow-pickle")
    assert old.code == 0


def test_a_repeated_image_asks_for_its_embedding(cli: Callable, model: Path, ink: Path, tmp_path: Path) -> None:
    first = cli("-p", "a cat, ink", "-m", model, "--seed", 3, "--embedding", ink).paths[0]
    ran = cli("--from-image", first)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "--embedding 'ink.safetensors'" in ran.err
    save_file({"x": torch.ones(1, 32)}, ink)
    ran = cli("--from-image", first, "--embedding", ink)
    assert ran.code == 0 and "another file" in ran.err
    assert cli("--from-image", first, "-p", "a dog").code == 0  # which does not name it


BAD = [
    (("-p", "ink", "--embedding", "{}/none.safetensors"), "no such file"),
    (("-p", "ink", "--embedding", "{}/old.pt"), "--allow-pickle"),
    (("-p", "broken", "--embedding-dir", "{}"), "broken.safetensors: not a complete"),
    (("-p", "old", "--embedding-dir", "{}"), "--allow-pickle"),
    (("-p", "ink", "--embedding-dir", "{}/none"), "no such folder"),
    (("-p", "ink", "--embedding", "{}/notes.txt"), "ends in"),
    (("-p", "(a:200)"), "--prompt: the weight"),
    (("-p", "a", "-n", "(a:200)"), "--negative-prompt: the weight"),
    (("-p", "<lora:>"), "--prompt: '<lora:>'"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_mistakes_get_one_line(cli: Callable, model: Path, ink: Path, words: tuple[str, ...], said: str) -> None:
    ran = cli(*(word.replace("{}", str(ink.parent)) for word in words), "-m", model)
    assert (ran.code, ran.out) == (2, "") and ran.err.count("\n") == 1
    assert said in ran.err and not Path("outputs").exists()
