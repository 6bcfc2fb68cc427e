"""What tests of the command line read and write: images with their settings, and how a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastsd.image import files as images
from fastsd.image import metadata


@dataclass
class Ran:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def settings(path: Path) -> dict[str, Any]:
    return metadata.read_texts(images.read_text(path))[0]


def refused(ran: Any, *said: str) -> None:
    """Exit code 2, one line that says this, and nothing on stdout."""
    assert (ran.code, ran.out) == (2, ""), ran
    assert ran.err.startswith("fastsd: error: ") and ran.err.count("\n") == 1
    for words in said:
        assert words in ran.err


def write_image(path: Path, **texts: str) -> Path:
    path.write_bytes(images.encode(Image.new("RGB", (64, 64)), ".png", texts))
    return path
