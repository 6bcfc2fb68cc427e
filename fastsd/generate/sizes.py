"""Sizes: of a result, and images brought to it."""

from __future__ import annotations

from typing import Any

from PIL import Image

from fastsd.errors import FastsdError, about
from fastsd.image.files import WHITE, load
from fastsd.image.modes import flatten
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import MAX_SIDE

# The hires upscalers of images (`fastsd.parameters.passes.IMAGE_UPSCALERS`).
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def check_side(argument: str, value: Any, factor: int) -> int:
    """A width or height: a multiple of `factor` within range; the error names the nearest ones."""
    value = PARAMETERS[argument].check(value)
    if value % factor or value < factor:
        below = max(value // factor * factor, factor)
        raise FastsdError(
            f"it should be a multiple of {factor}: {below} or {below + factor}", argument=argument, value=value
        )
    return value


def fit_image(image: Any, width: int | None, height: int | None, factor: int) -> tuple[Image.Image, list[str]]:
    """The image to start from, as RGB at the size of the result.

    Without a width and height the size is the image's own, rounded down to multiples of `factor`.

    Returns:
        The image, and notes on what was changed.
    """
    if width is None or height is None:
        own = own_size("image", image, factor)
        width, height = own[0] if width is None else width, own[1] if height is None else height
    size = check_side("width", width, factor), check_side("height", height, factor)
    read, notes = read_image(image, "image", "RGB", WHITE)
    if read.size == size:
        return read, notes
    notes.append(resized_note(read.size, size))
    return read.resize(size, Image.Resampling.LANCZOS), notes


def resized_note(before: tuple[int, int], after: tuple[int, int]) -> str:
    """What a user should know of an image that was brought to another size."""
    return f"the image was resized from {before[0]}x{before[1]} to {after[0]}x{after[1]}"


def read_image(image: Any, argument: str, mode: str, background: int) -> tuple[Image.Image, list[str]]:
    """A PIL image in `mode`, see `fastsd.image.files.flatten`; and notes."""
    with about(argument):
        check_image(image)
        load(image)
        before = image.info.get("notes")  # of `fastsd.image.files.flatten`, where it read the file
        read, notes = flatten(image, mode, background)
        return read, [*(before if isinstance(before, tuple) else ()), *notes]


_ARRAY = "; Image.fromarray makes one of an array [H, W, 3] of 8 bits"
_FILE = "; PIL.Image.open reads one from a file"
_HINTS = {"ndarray": _ARRAY, "Tensor": _ARRAY, "list": "; one is for all images of a call", "str": _FILE}
_HINTS |= {"PosixPath": _FILE, "WindowsPath": _FILE, "bytes": "; PIL.Image.open(io.BytesIO(data)) reads one"}


def check_image(image: Any) -> None:
    """Refuse what is no PIL image; the caller adds the argument."""
    if not isinstance(image, Image.Image):
        raise FastsdError(f"should be a PIL image, not {type(image).__name__}{_HINTS.get(type(image).__name__, '')}")
    if not image.width * image.height:
        raise FastsdError(f"{image.width}x{image.height} pixels; it should have some")


def own_size(argument: str, image: Any, factor: int) -> tuple[int, int]:
    """An image's width and height, rounded down to multiples of `factor`."""
    with about(argument):
        check_image(image)
        if max(image.size) > MAX_SIDE:
            raise FastsdError(
                f"{image.width}x{image.height} pixels; at most {MAX_SIDE} a side are generated: give {{width}} and "
                "{height}"
            )
    width, height = (max(n // factor * factor, factor) for n in image.size)
    return width, height
