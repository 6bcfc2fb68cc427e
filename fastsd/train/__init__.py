"""Training: `python -m fastsd train --config configs/digits.toml`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd train`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="what to train: configs/digits.toml")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: the config's out)")
    parser.add_argument("--export", metavar="DIR", help="where the model goes (default: the config's export)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--export-only", action="store_true", help="export the model as the last checkpoint has it")


def run(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code.

    Raises:
        FastsdError: bad config, missing data, a run in the way.
    """
    from fastsd.train.run import train

    train(args.config, out=args.out, export=args.export, resume=args.resume, export_only=args.export_only)
    return 0
