"""Links of a page to files beside docs/, and the line on which a named piece of code stands."""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]+)?\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@dataclass(frozen=True)
class Link:
    """A link of a page.

    Attributes:
        text: between the brackets.
        path: the file that it names, relative to the repository.
        anchor: "#..." or "".
        span: where it stands in the page.
    """

    text: str
    path: str
    anchor: str
    span: tuple[int, int]

    @property
    def symbol(self) -> str | None:
        """The piece of code that the text names: `` `Class.method` `` of a Python file."""
        named = re.fullmatch(r"`([A-Za-z_][\w.]*)`", self.text)
        return named[1] if named and self.path.endswith(".py") else None


def links(markdown: str, page: str) -> Iterator[Link]:
    """Every link of a page to a file. Code blocks have none.

    Args:
        page: the page's path relative to the repository, such as "docs/book/01-diffusion.md".
    """
    blocks = [match.span() for match in FENCE.finditer(markdown)]
    for match in LINK.finditer(markdown):
        if "://" in match["target"] or any(start <= match.start() < end for start, end in blocks):
            continue
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match["target"]))
        yield Link(match["text"], path, match["anchor"] or "", match.span())


def line_of(symbol: str, source: str) -> int | None:
    """The line, from 1, of a function, a class, a method or a name that is assigned at the top; None without it."""
    body: list[ast.stmt] = ast.parse(source).body
    line = None
    for part in symbol.split("."):
        found = next((node for node in body if _name(node) == part), None)
        if found is None:
            return None
        line, body = found.lineno, getattr(found, "body", [])
    return line


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None
