"""The slides as a PDF: `python -m book.slides [OUT.pdf]`. Chromium prints slides/fastsd.md."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import markdown

from book.formulas import mathml

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "slides" / "fastsd.md"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def slides(text: str) -> list[str]:
    """The Markdown of each slide."""
    return [part.strip() for part in re.split(r"^---$", text, flags=re.M)]


def as_html(text: str, folder: Path) -> str:
    """A page with a section for each slide. Images are looked for from `folder`."""
    sections, style = [], (SOURCE.parent / "style.css").read_text(encoding="utf-8")
    for number, slide in enumerate(slides(text), 1):
        formulas: list[str] = []

        def keep(match: re.Match[str], formulas: list[str] = formulas) -> str:
            formulas.append(mathml(match[1] or match[2], display=match[0].startswith("$$")))
            return f"FORMULA{len(formulas) - 1}X"

        body = markdown.markdown(
            re.sub(r"\$\$(.+?)\$\$|\$(.+?)\$", keep, slide, flags=re.S), extensions=["tables", "fenced_code"]
        )
        body = re.sub(r"FORMULA(\d+)X", lambda match, formulas=formulas: formulas[int(match[1])], body)
        body = re.sub(
            r'src="([^"]+)"', lambda match: f'src="{html.escape((folder / match[1]).resolve().as_uri())}"', body
        )
        kind = ' class="title"' if slide.startswith("# ") else ""
        sections.append(f"<section{kind}>{body}<footer>{number}</footer></section>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>fastsd</title><style>{style}</style>'
        + "".join(sections)
    )


def main(arguments: list[str]) -> None:
    out = Path(arguments[0] if arguments else SOURCE.with_suffix(".pdf")).resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"slides are printed by Chromium, which is missing; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "slides.html"
        page.write_text(as_html(SOURCE.read_text(encoding="utf-8"), SOURCE.parent), encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-pdf-header-footer",
            f"--user-data-dir={folder}/profile",
        ]
        subprocess.run([browser, *options, f"--print-to-pdf={out}", page.as_uri()], check=True, capture_output=True)
    print(out)


if __name__ == "__main__":
    main(sys.argv[1:])
