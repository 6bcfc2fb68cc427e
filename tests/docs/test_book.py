"""The book's promises: every block runs and prints what the page says, every name and every link leads somewhere."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastsd
from book.links import Link, line_of, links
from tests.support.project import ROOT

BOOK = sorted((ROOT / "docs" / "book").glob("[0-9]*.md"))
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def links_of(page: Path) -> list[Link]:
    return list(links(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {"#" + re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.heavy
@pytest.mark.parametrize("page", BOOK, ids=lambda page: page.stem)
def test_every_block_runs_and_prints_what_the_page_says(page: Path) -> None:
    names: dict[str, Any] = {}
    printed, count = "", 0
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            assert not printed, f"{page.name}: this is printed, and the page does not show it:\n{printed}"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, str(page), "exec"), names)
            printed, count = out.getvalue(), count + 1
        elif language == "text":
            assert printed == text, page.name
            printed = ""
    assert not printed and count >= 3


def test_every_name_on_a_page_leads_to_its_code() -> None:
    named = [(page, link) for page in PAGES for link in links_of(page) if link.symbol]
    assert len(named) > 60
    for page, link in named:
        assert line_of(str(link.symbol), (ROOT / link.path).read_text(encoding="utf-8")), (
            f"{page.name}: {link.path} has no {link.symbol}"
        )


@pytest.mark.parametrize("page", BOOK, ids=lambda page: page.stem)
def test_every_chapter_ends_with_its_code_and_its_references(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {int(page.stem[:2])}. ")
    assert "\n## In the code\n" in text and "\n## References\n" in text
    own = text.split("\n## In the code\n")[1]
    assert len([link for link in links(own, f"docs/book/{page.name}") if link.symbol]) >= 2
    use, engine = " ".join(own.split("\n## ")[0].split()).split(" Use it: ")[1].split(" In the engine: ")
    assert all(re.search(r"\]\(\.\./[\w-]+\.md", part) for part in (use, engine))


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        here = page.relative_to(ROOT).as_posix()
        for link in links_of(page):
            target = ROOT / link.path
            assert target.exists(), f"{here}: {link.path}"
            if link.anchor and target.suffix == ".md":
                assert link.anchor in anchors(target), f"{here}: {link.path}{link.anchor}"
        inner = re.findall(r"\]\((#[^)]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8")))
        assert set(inner) <= anchors(page), here


def test_every_page_is_in_the_sites_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r"([\w/.-]+\.md)", nav))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_notebooks_hold_no_outputs() -> None:
    """They are run where they are shown; in git an output would be a second, older truth."""
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), path.name
        assert any("fastsd" in "".join(cell["source"]) for cell in cells)


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in fastsd.__all__:
        if not name.startswith("__"):
            assert f"::: fastsd.{name}\n" in page, name
            assert getattr(fastsd, name).__doc__, name


def test_every_message_that_a_page_quotes_is_said() -> None:
    """Where one is reworded, the reader who looks for its words would no longer find them."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(quoted) > 12
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastsd").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", code)  # a text over several lines
    for message in quoted:
        assert message in said, message


# Words that codespell takes for mistakes.
KNOWN_WORDS = "te"  # the key of a LoRA's strength for text encoders


def misspelt(*paths: Path) -> str:
    command = [sys.executable, "-m", "codespell_lib", "-L", KNOWN_WORDS, *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_pages_and_code_are_spelt_right(tmp_path: Path) -> None:
    pages = (*PAGES, ROOT / "CHANGELOG.md", ROOT / "slides" / "fastsd.md", *NOTEBOOKS)
    code = [path for folder in ("fastsd", "bench", "book") for path in (ROOT / folder).rglob("*.py")]
    assert not misspelt(*pages, *code)
    (tmp_path / "page.md").write_text("Kernels recieve pointers.\n", encoding="utf-8")
    assert "receive" in misspelt(tmp_path / "page.md")


def test_a_name_that_moved_is_found_out() -> None:
    source = "LIMIT = 3\nclass A:\n    def run(self): ...\ndef free(): ...\n"
    names = ("LIMIT", "A", "A.run", "free", "run", "A.free")
    assert [line_of(name, source) for name in names] == [1, 2, 3, 4, None, None]
