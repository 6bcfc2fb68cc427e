"""A1111's styles.csv: texts that are added to prompts by name."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from fastsd.errors import FastsdError, nearest
from fastsd.files import reason

MAX_BYTES = 2**22
PLACE = "{prompt}"
NO_STYLE = "None"  # A1111's name of it


@dataclass(frozen=True)
class Style:
    name: str
    prompt: str
    negative_prompt: str


class Styles:
    """The styles of a file; None: there are none.

    Raises:
        FastsdError: it cannot be read.
    """

    def __init__(self, path: str | None):
        self.styles: dict[str, Style] = {}
        if path is None:
            return
        try:
            if Path(path).stat().st_size > MAX_BYTES:
                raise FastsdError(f"at most {MAX_BYTES >> 20} MiB are read", argument="--styles", path=path)
            with open(path, encoding="utf-8-sig", newline="") as file:
                table = csv.DictReader(file)
                if "name" not in (table.fieldnames or ["name"]):
                    message = "not a table of styles: its first line should be name,prompt,negative_prompt"
                    raise FastsdError(message, argument="--styles", path=path)
                for row in table:
                    texts = [(row.get(key) or "") for key in ("name", "prompt", "negative_prompt")]
                    if texts[0]:
                        self.styles[texts[0]] = Style(*texts)
        except OSError as error:
            raise FastsdError(reason(error), argument="--styles", path=path) from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise FastsdError(f"not a table of styles ({error})", argument="--styles", path=path) from error

    def apply(self, names: list[str], prompt: str, negative: str) -> tuple[str, str]:
        """Both prompts with styles added: where a style holds "{prompt}", around them, else after a comma.

        Raises:
            FastsdError: there is no such style.
        """
        for name in filter(None, names):  # an empty box of a page sends an empty name
            if name not in self.styles:
                if name == NO_STYLE:
                    continue
                hint = nearest(name, self.styles) or f"; there are {', '.join(list(self.styles)[:8]) or 'none'}"
                raise FastsdError(f"no such style{hint}", argument="styles", value=name)
            style = self.styles[name]
            prompt, negative = _added(prompt, style.prompt), _added(negative, style.negative_prompt)
        return prompt, negative


def _added(text: str, style: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, text)
    return ", ".join(part for part in (text.strip(), style.strip()) if part)
