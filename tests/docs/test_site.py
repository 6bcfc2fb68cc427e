"""The site as MkDocs builds it, and the figures; `make test-docs`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import ROOT

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"FASTSD_NOTEBOOKS": "0", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "book" / "01-diffusion" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20 and "arithmatex" not in page


def test_a_name_leads_to_its_line(site: Path) -> None:
    page = (site / "book" / "05-samplers" / "index.html").read_text(encoding="utf-8")
    found = re.search(r'href="\.\./\.\./repository/fastsd/sampling/karras\.py/(#__codelineno-0-(\d+))"', page)
    assert found
    listing = (site / "repository" / "fastsd" / "sampling" / "karras.py" / "index.html").read_text(encoding="utf-8")
    assert f'id="{found[1][1:]}"' in listing
    source = (ROOT / "fastsd" / "sampling" / "karras.py").read_text(encoding="utf-8").splitlines()
    assert source[int(found[2]) - 1].startswith("def ")


def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    loads = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["'](?:https?:)?//([^/"']+)""")
    hosts = {host for page in site.rglob("*.html") for host in loads.findall(page.read_text(encoding="utf-8"))}
    assert not hosts


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path) -> None:
    from book import notebooks

    text, images = notebooks.as_page(notebooks.run(path), path.stem)
    assert text.startswith("# ") and (images or "```text" in text)


def test_figures_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from book.figures import __main__ as figures

    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main([])
    kept = {path.name for path in (ROOT / "docs" / "book" / "images").glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_slides_become_a_pdf(tmp_path: Path) -> None:
    from book import slides

    if not any(map(shutil.which, slides.BROWSERS)):
        pytest.skip("no Chromium")
    slides.main([str(tmp_path / "deck.pdf")])
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "deck.pdf").read_bytes())
    assert len(pages) == len(slides.slides(slides.SOURCE.read_text(encoding="utf-8"))) >= 30


def test_letters_of_other_variants_are_characters() -> None:
    from book.formulas import mathml

    assert (
        "𝔼" in mathml(r"\mathbb E", False) and "ℝ" in mathml(r"\mathbb R", False) and "𝒩" in mathml(r"\mathcal N", True)
    )


def test_a_figure_that_is_not_there_is_refused() -> None:
    from book.figures import __main__ as figures

    with pytest.raises(SystemExit, match="no figure nothing; there are forward"):
        figures.main(["nothing"])
