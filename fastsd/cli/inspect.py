"""`fastsd inspect FILE`: what a model file or folder is, and how that is known."""

from __future__ import annotations

import argparse

from fastsd.cli.parser import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, a .ckpt, a model's folder, a hub id")
    parser.add_argument("--allow-pickle", action="store_true", help="read a .ckpt: tensors and plain values")


def run(args: argparse.Namespace) -> int:
    from fastsd.weights.hub.locate import locate_model
    from fastsd.weights.inspect import inspect

    facts = inspect(locate_model(args.file, None, half=True).path, args.allow_pickle)
    width = max(len(name) for name, _ in facts) + 1
    for name, value in facts:
        print(f"{name + ':' if name else '':{width}} {one_line(value)}")
    return 0
