"""Data sets to train on: `python -m fastsd data emoji` renders the emoji of a font and writes captions for them."""

from __future__ import annotations

import argparse
from pathlib import Path

SETS = ("emoji",)
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # Debian's fonts-noto-color-emoji
LICENCE = "/usr/share/doc/fonts-noto-color-emoji/copyright"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd data`."""
    parser.add_argument("set", choices=SETS, metavar="SET", help="the data set: emoji")
    parser.add_argument("--out", default="data/emoji", metavar="DIR", help="folder to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder of --out")
    parser.add_argument("--font", default=FONT, metavar="FILE", help="a font with CBDT bitmaps (default: Debian's)")
    parser.add_argument("--font-licence", default=LICENCE, metavar="FILE", help="its licence, which is copied")
    parser.add_argument(
        "--cldr", required=True, metavar="DIR", help="folder of npm's cldr-annotations-full and -derived-full"
    )
    parser.add_argument("--side", type=int, default=64, metavar="N", help="pixels of an image (default: %(default)s)")
    parser.add_argument(
        "--held-out", type=float, default=0.05, metavar="SHARE", help="of the captions (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which captions are held out (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the data set as the flags say; returns the exit code.

    Raises:
        FastsdError: a file is missing or unreadable, the folder exists, fontTools is not installed.
    """
    from fastsd.data.emoji import write

    counts = write(
        Path(args.out),
        font=Path(args.font),
        licence=Path(args.font_licence),
        cldr=Path(args.cldr),
        side=args.side,
        held_out=args.held_out,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    for name, count in counts.items():
        print(f"{name}: {count:,}")
    return 0
