"""What people reported of the pages: flags that do not exist, and examples in Python that do not run.

`tests/docs/test_commands.py` runs the pages' commands.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastsd
from fastsd.cli import COMMANDS, command_module, flags
from fastsd.cli.parser import Parser
from tests.support import page_files
from tests.support.pages import PAGES, blocks, page_name
from tests.support.pipelines import MASK, PHOTO
from tests.support.project import ROOT

USE = [page for page in PAGES if page.parent.name != "book"]  # tests/docs/test_book.py has the book


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
def test_every_python_example_on_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, with tiny models in the folders that it names; a page's blocks run one after another."""
    monkeypatch.chdir(tmp_path)
    page_files.write(tmp_path)
    count = 0
    for page in USE:
        pipe = fastsd.Pipeline.from_pretrained("path/to/stable-diffusion-v1-5", device="cpu", dtype="fp32")
        photos = dict.fromkeys(("edges", "house", "depths", "image", "crowd", "beach", "photo", "left", "right"), PHOTO)
        masks = dict.fromkeys(("door", "face", "mask_left", "mask_right"), MASK)
        names = {"fastsd": fastsd, "pipe": pipe, **photos, **masks}
        for block in blocks(page, ("python", "py")):
            try:
                exec(compile(block, str(page), "exec"), names)
            except Exception as error:
                raise AssertionError(f"{page_name(page)}:\n{block}") from error
            count += 1
    assert count >= 4
