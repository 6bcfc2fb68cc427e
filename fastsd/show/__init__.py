"""`python -m fastsd show`: what happens inside, as images that explain themselves (docs/show.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsd.generate.lora_flags import add_lora_arguments

KINDS = {
    "forward": "an image dissolves into noise; its signal-to-noise ratio",
    "reverse": "noise becomes an image: a filmstrip and an animation",
    "attention": "where each word looks, and what a pixel looks at",
    "schedule": "betas, noise levels, and the steps of each sampler",
    "latents": "the channels of an image's latents, and what each holds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd show`."""
    parser.epilog = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser.add_argument("kind", metavar="WHAT", help=", ".join(KINDS))
    parser.add_argument(
        "-m", "--model", default="digits", metavar="PATH", help="the model (default: the bundled digits)"
    )
    add_lora_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what to generate (default: a prompt that fits the digits)")
    parser.add_argument("--image", metavar="FILE", help="forward, latents: this image in place of a generated one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the image (default: %(default)s)")
    parser.add_argument("--settings", default="", metavar="TEXT", help='of the call: "steps=20 sampler=euler"')
    parser.add_argument("--pixel", metavar="X,Y", help="attention: of which pixel (default: the middle)")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="(default: %(default)s)")
    parser.add_argument("--palette", action="store_true", help="256 colours: a smaller file")
    parser.add_argument("--out", metavar="FILE", help="the .png to write (default: show-WHAT.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draw as the flags say; returns the exit code.

    Raises:
        FastsdError: an unknown kind, no such model or image, a pixel outside of the image, a file that exists.
    """
    from fastsd.errors import FastsdError, nearest
    from fastsd.files import reason

    if args.kind not in KINDS:
        raise FastsdError(f"{args.kind!r} is none of {', '.join(KINDS)}{nearest(args.kind, KINDS)}")
    for flag, kinds in (("pixel", ("attention",)), ("image", ("forward", "latents"))):
        if getattr(args, flag) is not None and args.kind not in kinds:
            raise FastsdError(f"belongs to {' and '.join(kinds)}, not to {args.kind}", argument=f"--{flag}")
    out = Path(args.out or f"show-{args.kind}.png")
    if out.suffix.lower() != ".png":
        raise FastsdError("it should end in .png", argument="--out", path=out)
    files = [out, *([out.with_suffix(".webp")] if args.kind == "reverse" else [])]
    for file in files:
        if file.exists() and not args.overwrite:
            raise FastsdError("the file exists; --overwrite replaces it", argument="--out", path=file)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastsdError(f"cannot be written: {reason(error)}", argument="--out", path=out) from error
    from fastsd.files import write_whole
    from fastsd.show.scene import Scene, draw

    for file, data in zip(files, draw(args.kind, Scene.of(args))):
        write_whole(file, data, args.overwrite)
        print(file)
    sys.stdout.flush()
    return 0
