"""`fastsd convert IN OUT`: a checkpoint between a folder and a single file, or to another precision; an upscaler."""

from __future__ import annotations

import argparse
import sys

from fastsd.cli.parser import one_line
from fastsd.config import PREDICTIONS
from fastsd.errors import FastsdError
from fastsd.parameters import PARAMETERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="IN", help="a diffusers folder, a .safetensors file, a .ckpt, an upscaler's .pth, a hub id"
    )
    parser.add_argument("target", metavar="OUT", help="a file that ends in .safetensors, or a folder")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of the weights (default: as they are)")
    parser.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        metavar="NAME",
        help=PARAMETERS["prediction"].help,
    )
    parser.add_argument("--allow-pickle", action="store_true", help="read a .ckpt: tensors and plain values")
    parser.add_argument("--ema", action="store_true", help="take the weights as training averaged them")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")


def run(args: argparse.Namespace) -> int:
    from fastsd.runtime.devices import DTYPES
    from fastsd.weights.convert import convert
    from fastsd.weights.hub.locate import locate_model

    source = locate_model(args.source, None, half=args.dtype in ("fp16", "bf16")).path
    try:
        dtype = DTYPES[args.dtype] if args.dtype else None
        notes = convert(source, args.target, dtype, args.prediction, args.allow_pickle, args.overwrite, args.ema)
    except MemoryError as error:
        raise FastsdError(f"{args.source}: not enough memory for its largest tensor") from error
    for note in notes:
        print(f"note: {one_line(note)}", file=sys.stderr)
    print(args.target)
    return 0
