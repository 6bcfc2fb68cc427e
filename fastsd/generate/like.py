"""What other programs do otherwise, as values: `--like a1111|comfy|diffusers` takes a row of `LIKE`.

A rule that users set by itself is a parameter too, which precedes the row. docs/migration.md has the rows as a table,
with the file of each program that states its rule.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from fastsd.parameters import Settings


@dataclass(frozen=True)
class Rules:
    """The rules of one program.

    Attributes:
        settings: of parameters, where the caller gives none.
        from_mean: an image is encoded to the mean of its latents' distribution, else to a sample of it.
        clip_layers: how clip skip counts, a key of `fastsd.text.encode.LAYERS`.
        zeros_for_empty: SDXL reads zeros for an empty negative prompt; None: as the checkpoint says.
        repeats_texts: where texts of one image fill unequal numbers of chunks, the shorter ones count as they are, else
            they are filled up with empty chunks.
    """

    settings: dict[str, Any]
    from_mean: bool = False
    clip_layers: str = "added"
    zeros_for_empty: bool | None = None
    repeats_texts: bool = False


LIKE: dict[str, Rules] = {
    "none": Rules({"noise": "cpu", "emphasis": "original"}),
    "a1111": Rules(
        {"noise": "gpu", "emphasis": "original"},
        from_mean=True,
        clip_layers="fixed",
        zeros_for_empty=True,
        repeats_texts=True,
    ),
    "comfy": Rules(
        {"noise": "comfy", "emphasis": "comfy", "prompt_syntax": "comfy"},
        from_mean=True,
        clip_layers="from_end",
        zeros_for_empty=False,
        repeats_texts=True,
    ),
    "diffusers": Rules({"noise": "batch", "emphasis": "original", "prompt_syntax": "plain"}),
}


def fill(settings: Settings, given: Collection[str]) -> Settings:
    """The settings with the rules' own where the caller gave none.

    Args:
        given: the names of those that were given.
    """
    own = LIKE[settings.like].settings
    return settings.replace(**{name: value for name, value in own.items() if name not in given})
