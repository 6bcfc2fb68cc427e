"""Verification: `python -m fastsd verify` proves on this machine, with this checkpoint, that the fast path is right."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline
    from fastsd.verify.images import Drawing
    from fastsd.verify.rule import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd verify`."""
    parser.add_argument("--model", default="digits", metavar="FOLDER", help="a checkpoint (default: the bundled model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    parser.add_argument("--prompt", default="a handwritten eight", help="of the pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of the pictures (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Verify as the flags say: every op, every layer, every network, a picture, CUDA graphs.

    Returns:
        0 when nothing failed, else 1.

    Raises:
        FastsdError: no such model or device.
    """
    from fastsd.errors import FastsdError
    from fastsd.verify import report
    from fastsd.verify.images import Drawing

    if not 1 <= args.steps <= 1000:
        raise FastsdError(f"--steps is {args.steps}; it should be 1 to 1000")
    drawing = Drawing(args.model, args.device, args.dtype, args.prompt, args.steps)
    pipe = drawing.load()
    where = setting(pipe)
    if not args.json:
        print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    rows: list[Row] = []
    for row in verify(pipe, drawing):
        if not args.json:
            if not rows or rows[-1].level != row.level:
                print(f"\n{report.title(row.level)}")
            print(report.line(row), flush=True)
        rows.append(row)
    print(report.to_json(where, rows) if args.json else f"\n{report.summary(rows)}")
    return 1 if any(row.passed is False for row in rows) else 0


def verify(pipe: Pipeline, drawing: Drawing) -> Iterator[Row]:
    """Every comparison, level by level. On a CPU our kernels run in the interpreter, at small shapes."""
    from fastsd.verify import images as pictures
    from fastsd.verify import interpreted, layers, ops
    from fastsd.verify.clock import clock
    from fastsd.verify.drive import drive

    timed = clock(pipe.device)

    def short_run() -> None:
        drive(pipe, drawing.prompt, pipe.defaults["width"], pipe.defaults["height"])

    yield from ops.check_ops(short_run, timed)
    if pipe.device.type == "cpu":
        yield from interpreted.in_another_process()
    yield from layers.check_layers(pipe, short_run, timed)
    yield from layers.check_networks(pipe, drawing.prompt, timed)
    yield pictures.check_picture(drawing, pipe)
    yield pictures.check_graphs(drawing, pipe.device)


def setting(pipe: Pipeline) -> dict[str, Any]:
    """What was verified where: model, device, precision, versions, launch table."""
    import importlib.metadata

    import torch

    from fastsd import __version__
    from fastsd.kernels import dispatch
    from fastsd.kernels.launch import tuned
    from fastsd.runtime.devices import dtype_name

    missing = dispatch.why_no_triton(pipe.device)
    cuda = pipe.device.type == "cuda"
    return {
        "model": pipe.components.name,
        "device": torch.cuda.get_device_name(pipe.device) if cuda else "cpu (our kernels: in the interpreter alone)",
        "dtype": dtype_name(pipe.dtype),
        "fastsd": __version__,
        "torch": torch.__version__,
        "launches": tuned.described(pipe.device) if missing is None else "none",
        "triton": importlib.metadata.version("triton") if missing is None else missing,
    }
