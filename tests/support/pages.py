"""The pages that users read: their blocks, and the commands of fastsd in them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.project import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "sh", "bash", "console")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_PROGRAM = re.compile(r"^(?:\w+=\S+ )*(?:fastsd|(?:\S+ )*?(?:python|torchrun)\b.*? -m fastsd) ")


def page_name(page: Path) -> str:
    """As it is named in messages and in the ids of tests."""
    return page.relative_to(ROOT).as_posix().removeprefix("docs/")


def blocks(page: Path, languages: tuple[str, ...]) -> list[str]:
    """The blocks of a page in these languages, from top to bottom."""
    return [text for language, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> list[str]:
    """Every command line of fastsd in a block of a page; continued lines are one."""
    text = "\n".join(blocks(page, SHELL)).replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if is_command(line)]


def is_command(line: str) -> bool:
    """Whether a line runs fastsd."""
    return _PROGRAM.match(line) is not None
