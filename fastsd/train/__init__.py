"""Training: `python -m fastsd train --config configs/digits.toml`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd train`."""
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the training config, for example configs/digits.toml"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: `out` in the config)")
    parser.add_argument(
        "--export", metavar="DIR", help="folder of the finished model (default: `export` in the config)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the config: unet.fit.steps=500",
    )
    parser.add_argument(
        "--max-bad",
        metavar="N",
        help="images that cannot be read, at most: a share below 1, or a number (data.max_bad; default: 0.01)",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the run")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint without training")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code.

    Raises:
        FastsdError: invalid config, missing data, an existing run without `--resume`, none with it.
    """
    from fastsd.train.training import train

    train(
        args.config,
        out=args.out,
        export=args.export,
        resume=args.resume,
        export_only=args.export_only,
        changes=[*args.set, *([f"data.max_bad={args.max_bad}"] if args.max_bad is not None else [])],
    )
    return 0
