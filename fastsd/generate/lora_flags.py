"""`--lora FILE[:strength]`, of every command that loads a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd.errors import FastsdError, about
from fastsd.parameters.kinds import Number
from fastsd.text.syntax import MAX_WEIGHT

if TYPE_CHECKING:
    from fastsd.weights.adapters.apply import Adapter

STRENGTH = Number(low=-MAX_WEIGHT, high=MAX_WEIGHT)


def add_lora_arguments(parser: Any, *sides: str) -> None:
    """`--lora` and what is allowed of its files; with `sides`, such as "a", `--lora-a` for one of two models too."""
    for name in ("--lora", *(f"--lora-{side}" for side in sides)):
        text = f"a LoRA of {name[-1].upper()}" if name != "--lora" else "a LoRA and its strength (default: 1)"
        parser.add_argument(name, action="append", metavar="FILE[:X]", help=f"{text}; may be given again")
    parser.add_argument("--allow-partial", action="store_true", help="leave out a LoRA's layers that the model lacks")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read LoRAs that are pickles: tensors, plain values"
    )


def adapters_of(texts: Sequence[str], argument: str = "lora") -> list[Adapter]:
    """The adapters that texts name, `FILE` or `FILE:strength`; a file may be a hub id.

    Raises:
        FastsdError: about `argument`: no such file, a strength out of range.
    """
    from fastsd.weights.adapters.apply import Adapter
    from fastsd.weights.adapters.locate import adapter_parts
    from fastsd.weights.hub.locate import locate_file

    with about(argument):
        files = [(locate_file(str(path)).path, strength) for path, strength in map(split_strength, texts)]
        for path, _ in files:
            adapter_parts(path)  # refuses what is not there, before a model is loaded
    return [Adapter(path, strength, strength) for path, strength in files]


def split_strength(given: str) -> tuple[Path, float]:
    """`FILE` or `FILE:strength`; a colon in the name of an existing file belongs to the name.

    Raises:
        FastsdError: the strength is not a number from -100 to 100.
    """
    path, colon, text = given.rpartition(":")
    if not colon or os.path.exists(given) or text.startswith("//"):  # a URL is refused as a path
        return Path(given), 1.0
    try:
        return Path(path), STRENGTH.parse(text)
    except FastsdError:
        raise FastsdError(f"{text[:40]!r} should be a strength, {STRENGTH}", path=given) from None


def put_on(pipe: Any, adapters: Sequence[Adapter], args: argparse.Namespace) -> list[str]:
    """Put adapters into a `fastsd.Pipeline` in place of those that it has; notes on what was skipped.

    Args:
        args: the flags of `add_lora_arguments`.

    Raises:
        FastsdError: a file is malformed or for another model.
    """
    with about("lora"):
        notes: list[str] = pipe.set_adapters(adapters, args.allow_partial, args.allow_pickle)
    return notes


def titled_with(model: str, adapters: Sequence[Adapter]) -> str:
    """A model's name, and those of its adapters."""
    return " + ".join([model, *(f"{adapter.path.name}:{adapter.unet:g}" for adapter in adapters)])
