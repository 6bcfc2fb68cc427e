"""`fastsd upscale IMAGE... --upscaler FILE`: images enlarged by a network of ESRGAN's kind."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastsd.cli.flags import flag_of
from fastsd.cli.output import Output
from fastsd.cli.parser import one_line
from fastsd.errors import FastsdError, about, describe
from fastsd.files import check_path
from fastsd.image.files import READABLE, WHITE, check_sides, count_frames, flatten, image_size, open_layers
from fastsd.image.infotext import with_upscale
from fastsd.parameters import PARAMETERS
from fastsd.upscale import SCALES, TILES

if TYPE_CHECKING:
    from fastsd.upscale.upscaler import Upscaler

DEFAULT_OUTPUT = "upscaled"
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
FAILED = 1  # exit code where some of several images were left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image, or a folder of images")
    parser.add_argument("--upscaler", metavar="FILE", required=True, help="ESRGAN's: .safetensors, .pth or a hub id")
    parser.add_argument("--scale", metavar="X", help="of the result, 0.25 to 16 (default: the network's own)")
    folder = f"a folder, or a file: .png, .jpg, .webp (default: {DEFAULT_OUTPUT}/)"
    parser.add_argument("-o", "--output", "--out", metavar="PATH", default=DEFAULT_OUTPUT, help=folder)
    parser.add_argument("--tile", metavar="N", help="pixels of a side that run at once (default: up to 512)")
    parser.add_argument("--skip-existing", action="store_true", help="leave out images whose results are there")
    parser.add_argument("--device", metavar="NAME", default="auto", help=PARAMETERS["device"].text)
    parser.add_argument("--dtype", choices=PRECISIONS, default="auto", help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .pth: tensors and plain values")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, help="a bar (default: on a terminal)")


def run(args: argparse.Namespace) -> int:
    """Enlarge each image, and save it before the next.

    Returns:
        0; or 1 where some of several images could not be enlarged, each of which has a line on stderr.

    Raises:
        FastsdError: a flag that is wrong, a file that is there already, no image at all.
    """
    with about("scale"):
        scale = None if args.scale is None else SCALES.parse(args.scale)
    with about("tile"):
        tile = None if args.tile is None else TILES.parse(args.tile)
    with about("device"):
        device = PARAMETERS["device"].kind.check(args.device)
    images = list(find_images(args.images))
    names = [f"{path.stem}.png" for path in images]
    if args.skip_existing:
        images, names = _without_existing(images, names, Path(args.output))
    if not images:
        print("nothing to do: every result is there", file=sys.stderr)
        return 0
    refuse_doubles(images, names)
    output = Output(args.output, len(images), names=names)
    try:
        from fastsd.upscale.upscaler import Upscaler

        with about("upscaler"):
            upscaler = Upscaler.from_file(args.upscaler, device, args.dtype, args.allow_pickle)
        return _upscale_all(upscaler, images, output, scale, tile, args.progress)
    finally:
        output.remove_empty_folders()


def find_images(given: list[str]) -> Iterator[Path]:
    """The images that the words name: files, and the files of folders whose names end like images.

    Raises:
        FastsdError: a path that is not there, or a folder without images.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in READABLE}
    for text in given:
        check_path(text)
        path = Path(text)
        if not path.is_dir():
            if not path.exists():
                raise FastsdError("no such file or folder", path=path)
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.is_file())
        if not inside:
            raise FastsdError("a folder without images", path=path)
        yield from inside


def _without_existing(images: list[Path], names: list[str], folder: Path) -> tuple[list[Path], list[str]]:
    """The images whose results are not in the folder yet."""
    left = [(path, name) for path, name in zip(images, names, strict=True) if not os.path.lexists(folder / name)]
    return [path for path, _ in left], [name for _, name in left]


def refuse_doubles(images: list[Path], names: list[str]) -> None:
    """Refuse two images whose results would have one name."""
    known: dict[str, Path] = {}
    for path, name in zip(images, names, strict=True):
        if name.lower() in known:  # some file systems know no case
            raise FastsdError(
                f"its result would be {name}, as that of {known[name.lower()]}; take one each time", path=path
            )
        known[name.lower()] = path


def _upscale_all(
    upscaler: Upscaler, images: list[Path], output: Output, scale: float | None, tile: int | None, bar: bool | None
) -> int:
    from tqdm import tqdm

    from fastsd.cli.said import PathsSaid

    wanted = sys.stderr.isatty() if bar is None else bar
    columns, rows = shutil.get_terminal_size()
    failed, said = 0, PathsSaid()
    for path in images:
        with tqdm(file=sys.stderr, disable=not wanted, ncols=min(columns, 100), nrows=rows, unit="tile") as shown:

            def progress(done: int, total: int) -> None:
                shown.total = total
                shown.update()

            try:
                saved = _upscale_one(upscaler, path, output, scale, tile, progress)
                shown.close()
                said.say(saved)
            except FastsdError as error:
                if len(images) == 1 or error.argument == "output":
                    raise
                failed += 1
                output.skip()
                tqdm.write(f"fastsd: error: {one_line(describe(error, flag_of))}", file=sys.stderr)
    said.end()
    return FAILED if failed else 0


def _upscale_one(
    upscaler: Upscaler,
    path: Path,
    output: Output,
    scale: float | None,
    tile: int | None,
    progress: Callable[[int, int], Any],
) -> Path:
    """Read, enlarge and save one image.

    Raises:
        FastsdError: it is damaged or too large, or what it becomes.
    """
    suffix = output.next_suffix
    with about(None, path):
        size = upscaler.result_size(image_size(path), scale)
        check_sides(size, suffix, "output")
        image, texts = open_layers(path, None)
        notes = list(image.info.get("notes", ()))
        if (frames := count_frames(path)) > 1:
            notes.append(f"it holds {frames} images, of which the first is taken")
        result = upscaler(image, scale, tile=tile, progress=progress)
    if result.mode == "RGBA" and suffix in (".jpg", ".jpeg"):
        result = flatten(result, "RGB", WHITE)
        notes.append(f"{suffix} holds no transparency; transparent pixels are white")
    for note in (*notes, *upscaler.take_notes()):
        print(f"note: {path.name}: {one_line(note)}", file=sys.stderr)
    recorded = with_upscale(texts, upscaler.name, size[0] / image.width, suffix)
    return output.save(result, 0, "", recorded)
