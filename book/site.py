"""MkDocs' hooks: links from a page to the repository's files lead to pages with their text; notebooks are run and
become pages; formulas become MathML. With FASTSD_NOTEBOOKS=0, notebooks show their code alone.

MkDocs imports this file by its path, outside of the package.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from book import notebooks  # noqa: E402
from book.formulas import mathml  # noqa: E402
from book.links import Link, line_of, links  # noqa: E402

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
LINE_ID = re.compile(r'id="(__codelineno-\d+-\d+)"')


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file of the repository that a page of docs/ links to, and that those link to in turn."""
    _add_notebooks(files, config)
    waiting = [(_own(file.src_uri), file.content_string) for file in files.documentation_pages()]
    known: set[str] = set()
    while waiting:
        page, markdown = waiting.pop()
        for link in links(markdown, page):
            if link.path.startswith(("docs/", "notebooks/")) or link.path in known or not (ROOT / link.path).is_file():
                continue
            known.add(link.path)
            text = (ROOT / link.path).read_text(encoding="utf-8")
            content = text if link.path.endswith(".md") else _listing(link.path, text)
            file = File.generated(config, _uri(link.path), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(file)
            if link.path.endswith(".md"):
                waiting.append((link.path, text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn each link to a file of the repository into one to its page, at the line of the code that it names."""
    uri = page.file.src_uri
    for link in reversed(list(links(markdown, _own(uri)))):
        target = link.path.removeprefix("docs/") if link.path.startswith("docs/") else _uri(link.path)
        there = posixpath.relpath(target, posixpath.dirname(uri))
        anchor = link.anchor or _line_anchor(link)
        markdown = f"{markdown[: link.span[0]]}[{link.text}]({there}{anchor}){markdown[link.span[1] :]}"
    return markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script. Lines of code become anchors that MkDocs knows."""
    page.present_anchor_ids = {*(page.present_anchor_ids or ()), *LINE_ID.findall(content)}

    def formula(match: re.Match[str]) -> str:
        return mathml(html.unescape(match[3]), display=match[2] == "[")

    return FORMULA.sub(formula, content)


def _add_notebooks(files: Files, config: Any) -> None:
    for path in notebooks.NOTEBOOKS:
        notebook = notebooks.read(path) if os.environ.get("FASTSD_NOTEBOOKS") == "0" else notebooks.run(path)
        markdown, images = notebooks.as_page(notebook, path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=markdown))
        for name, data in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))


def _own(uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    if uri.startswith("notebooks/"):
        return uri.removesuffix(".md") + ".ipynb"
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """Where the page of a repository's file stands in the site's sources."""
    if path.startswith("notebooks/"):
        return path.removesuffix(".ipynb") + ".md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _listing(path: str, text: str) -> str:
    language = {".py": "python", ".toml": "toml", ".ipynb": "json"}.get(Path(path).suffix, "text")
    return f'# {path}\n\n````{language} linenums="1"\n{text}\n````\n'


def _line_anchor(link: Link) -> str:
    if link.symbol is None:
        return ""
    line = line_of(link.symbol, (ROOT / link.path).read_text(encoding="utf-8"))
    return f"#__codelineno-0-{line}" if line else ""
