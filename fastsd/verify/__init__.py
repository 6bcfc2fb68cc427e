"""Verification: `python -m fastsd verify` compares the fast path with its specification, here, with your checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.kernels.choice.rule import CheckResult
    from fastsd.pipeline import Pipeline
    from fastsd.verify.images import ImageRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd verify`."""
    parser.add_argument(
        "-m", "--model", default="digits", metavar="FOLDER", help="a checkpoint (default: the bundled model)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    parser.add_argument("--prompt", default="a handwritten eight", help="of the test image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of the test image (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Verify as the flags say: every op, layer and network, an image, CUDA graphs.

    Returns:
        0 if no check failed, else 1.

    Raises:
        FastsdError: no such model or device.
    """
    from fastsd.errors import FastsdError
    from fastsd.verify import report
    from fastsd.verify.images import ImageRun

    if not 1 <= args.steps <= 1000:
        raise FastsdError(f"--steps is {args.steps}; it should be 1 to 1000")
    image_run = ImageRun(args.model, args.device, args.dtype, args.prompt, args.steps)
    pipe = image_run.load()
    header = environment(pipe)
    if not args.json:
        print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
    results: list[CheckResult] = []
    for result in verify(pipe, image_run):
        if not args.json:
            if not results or results[-1].level != result.level:
                print(f"\n{report.title(result.level)}")
            print(report.line(result), flush=True)
        results.append(result)
    print(report.to_json(header, results) if args.json else f"\n{report.summary(results)}")
    return 1 if any(result.passed is False for result in results) else 0


def verify(pipe: Pipeline, image_run: ImageRun) -> Iterator[CheckResult]:
    """Yield every comparison, level by level. On a CPU, the Triton kernels run in the interpreter at small shapes."""
    from fastsd.verify import images, interpreted, layers, ops
    from fastsd.verify.clock import clock_for
    from fastsd.verify.drive import drive

    clock = clock_for(pipe.device)

    def short_run() -> None:
        drive(pipe, image_run.prompt, pipe.defaults["width"], pipe.defaults["height"])

    yield from ops.check_ops(short_run, clock)
    if pipe.device.type == "cpu":
        yield from interpreted.check_in_interpreter()
    yield from layers.check_layers(pipe, short_run, clock)
    yield from layers.check_networks(pipe, image_run.prompt, clock)
    yield images.check_image(image_run, pipe)
    yield images.check_graphs(image_run, pipe.device)


def environment(pipe: Pipeline) -> dict[str, Any]:
    """What the checks run on: model, device, precision, versions, launch tables."""
    import importlib.metadata

    import torch

    from fastsd import __version__
    from fastsd.kernels import dispatch
    from fastsd.kernels.choice import decide
    from fastsd.runtime.devices import dtype_name

    no_triton = dispatch.why_no_triton(pipe.device)
    cuda = pipe.device.type == "cuda"
    return {
        "model": pipe.components.name,
        "device": torch.cuda.get_device_name(pipe.device) if cuda else "cpu (Triton kernels run in the interpreter)",
        "dtype": dtype_name(pipe.dtype),
        "fastsd": __version__,
        "torch": torch.__version__,
        "choices": decide.describe(pipe.device),
        "triton": importlib.metadata.version("triton") if no_triton is None else no_triton,
    }
