"""What people reported of the pages: every example runs, or is at least read by the real parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastsd
from fastsd.cli import COMMANDS, command_module, flags
from fastsd.cli.parser import Parser
from fastsd.weights import save_folder
from tests.support import original, tiny
from tests.support.adapter_writers import small_lora
from tests.support.ip_adapters import write_adapter
from tests.support.pipelines import MASK, PHOTO, tiny_components
from tests.support.project import ROOT
from tests.support.upscalers import write_upscaler

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # tests/docs has the book
BUNDLED = 'python -m fastsd --prompt "a thick eight slanted right" --count 4 --seed 7'
AGAIN = "python -m fastsd --from-image outputs/00000-7-a-thick-eight-slanted-right.png"
PROGRAM = re.compile(r"^(?:python -m )?fastsd (?!<)")


def blocks(page: Path, languages: tuple[str, ...]) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands() -> list[tuple[str, str]]:
    """Every command line of fastsd in a block of any page, without its comment, by page; continued lines are one."""
    lines = [
        (page.name, line.strip())
        for page in PAGES
        for block in blocks(page, ("", "sh", "bash", "console"))
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [(name, line.removeprefix("$ ")) for name, line in lines if PROGRAM.match(line.removeprefix("$ "))]


def read(line: str) -> None:
    """What the program does with a line before it loads anything: the flags exist, and the values are valid."""
    words = shlex.split(re.sub(r"[\[\]](?=--|$)|\](?= )", "", line) if "[--" in line else line, comments=True)
    words = words[words.index("fastsd") + 1 :]
    if words[0].startswith("-"):
        flags.parse(flags.make_parser(COMMANDS), words)
        return
    command = command_module(words[0])
    parser = Parser(prog=words[0])
    command.add_arguments(parser)
    parser.parse(words[1:])


def test_every_command_on_the_pages_is_read() -> None:
    found = commands()
    assert len(found) > 30 and {name for name, _ in found} >= {"README.md", "prompts.md", "checkpoints.md"}
    for name, line in found:
        try:
            read(line)
        except Exception as error:
            raise AssertionError(f"{name}: {line}") from error


def test_every_flag_that_a_page_names_exists() -> None:
    """In the pages on using fastsd; the others name flags of other programs too."""
    known = {flag for row in flags.known() for flag in row.flags} | {"--help", "--help-all"}
    for command in COMMANDS:
        module = command_module(command)
        parser = Parser(prog=command)
        module.add_arguments(parser)
        known |= {flag for action in parser._actions for flag in action.option_strings}
    for page in ("prompts", "checkpoints", "control", "editing", "samplers", "verify", "server"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for flag in re.findall(r"`(--[a-z][a-z0-9-]*)", text):
            assert flag in known, f"{page}.md: {flag}"


@pytest.mark.heavy
def test_the_examples_of_the_bundled_model_run(cli: Callable[..., Any]) -> None:
    """With fewer steps; the second line repeats an image of the first."""
    lines = [line for _, line in commands()]
    assert BUNDLED in lines and any(line.startswith(AGAIN) for line in lines)
    words = shlex.split(BUNDLED)[3:]
    made = cli(*words, "--steps", "1")
    assert len(made.paths) == 4 and str(made.paths[0]) == AGAIN.split()[-1]
    assert cli(*shlex.split(AGAIN)[3:], "--output", "again.png").code == 0


def write_models() -> None:
    """Tiny models under the names that the pages use, and the files beside them."""
    models = {
        "path/to/stable-diffusion-v1-5": tiny_components(steps=2),
        "sdxl": original.components("sdxl"),
        "sdxl-refiner": original.components("refiner"),
        "timbrooks/instruct-pix2pix": tiny_components(in_channels=8),
        "stabilityai/stable-diffusion-2-depth": tiny_components(in_channels=5),
    }
    for name, components in models.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save_folder(components, name, torch.float32)
    save_file(tiny.controlnet(tiny.UNET), "canny.safetensors")
    save_file(small_lora(), "ink.safetensors")
    write_upscaler(Path("realesr-general-x4v3.safetensors"))
    folder = Path("models")
    folder.mkdir()
    write_adapter(folder, models["path/to/stable-diffusion-v1-5"].unet).rename(
        folder / "ip-adapter-plus_sd15.safetensors"
    )


@pytest.mark.heavy
def test_every_python_example_on_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with tiny models in the folders that it names; a page's blocks run one after another."""
    monkeypatch.chdir(tmp_path)
    write_models()
    count = 0
    for page in PAGES:
        pipe = fastsd.Pipeline.from_pretrained("path/to/stable-diffusion-v1-5", device="cpu", dtype="fp32")
        photos = dict.fromkeys(("edges", "house", "depths", "image", "crowd", "beach", "photo", "left", "right"), PHOTO)
        names = {
            "fastsd": fastsd,
            "pipe": pipe,
            "door": MASK,
            "face": MASK,
            "mask_left": MASK,
            "mask_right": MASK,
        } | photos
        for block in blocks(page, ("python", "py")):
            try:
                exec(compile(block, str(page), "exec"), names)
            except Exception as error:
                raise AssertionError(f"{page.name}:\n{block}") from error
            count += 1
    assert count >= 4
