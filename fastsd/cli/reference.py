"""docs/reference.md: every parameter, in Python and on the command line. `python -m fastsd.cli.reference` prints it."""

from __future__ import annotations

import re

from fastsd.cli.flags import CLI
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import Parameter

HEAD = """\
# Parameters

Every argument of `Pipeline.__call__` and `Pipeline.from_pretrained`, and every flag of `python -m fastsd`. Where no
default is given, the checkpoint has its own. This page is written by `make reference` from `fastsd/parameters/`.
"""
SECTIONS = {
    "call": "## Of a call\n\n`pipe(prompt, ...)` and `pipe.stream(prompt, ...)`.",
    "load": "## Of loading\n\n`Pipeline.from_pretrained(path, ...)`; `path` is the model.",
    "cli": "## Of the command line alone",
}


def reference() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for of, title in SECTIONS.items():
        rows = [row for row in (*PARAMETERS.values(), *CLI.values()) if row.of == of]
        table = ["| argument | flag | values | default | |", "|---|---|---|---|---|", *map(_line, rows)]
        parts.append(f"{title}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def _line(row: Parameter) -> str:
    name = "`path`" if row.name == "model" else f"`{row.name}`" if row.of != "cli" else ""
    default = "" if row.default in (None, "", ()) or row.of == "cli" else f"`{row.default}`"
    text = re.sub(r"\{(\w+)\}", lambda found: f"`{found[1]}`", row.text)
    if row.needs is not None:
        text += f"; needs `{row.needs[0]}`"
    if row.excludes is not None:
        text += f"; not with `{row.excludes[0]}`"
    flags = ", ".join(f"`{flag}`" for flag in row.flags)
    return f"| {name} | {flags} | {str(row.kind).replace('|', '/')} | {default} | {text.replace('|', '/')} |"


if __name__ == "__main__":
    print(reference(), end="")
