"""Tuning: `python -m fastsd tune` measures launches on this GPU and saves the fastest in the user's cache."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.kernels.choice.rule import CheckResult
    from fastsd.kernels.launch.tuned import Lookup
    from fastsd.tune.search import Clock, SearchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd tune`."""
    parser.add_argument(
        "--model",
        default="digits",
        metavar="FOLDER",
        help="the checkpoint whose shapes are tuned (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    parser.add_argument("--prompt", default="a handwritten eight", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Tune as the flags say, and write the launch table of this GPU.

    Returns:
        0.

    Raises:
        FastsdError: no GPU, no Triton, no such model, an unwritable cache folder.
    """
    import torch

    from fastsd.errors import FastsdError
    from fastsd.files import cache_folder
    from fastsd.kernels import dispatch
    from fastsd.kernels.launch import architecture, tuned
    from fastsd.pipeline import Pipeline
    from fastsd.verify.clock import gpu_seconds
    from fastsd.verify.drive import drive

    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        raise FastsdError("tune: needs a CUDA GPU, and none is available; the committed tables remain in use")
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, graphs=False)
    no_triton = dispatch.why_no_triton(pipe.device)
    if no_triton is not None:
        raise FastsdError(f"tune: {no_triton}")
    valid_for = tuned.fingerprint(torch.cuda.get_device_name(pipe.device), architecture.class_of(pipe.device))
    launches = dict(tuned.load(valid_for))  # includes the shapes of models that were tuned before

    def short_run() -> None:
        drive(pipe, args.prompt, pipe.defaults["width"], pipe.defaults["height"])

    for lookup, result in tune(short_run, gpu_seconds):
        print(f"{lookup.op} {lookup.key}: {_describe(result)}", flush=True)
        if result is not None:
            launches[lookup] = result.launch
    try:
        print(tuned.save(launches, valid_for))
    except OSError as error:
        raise FastsdError(f"tune: cannot write to {cache_folder()}: {error.strerror}") from error
    return 0


def _describe(result: SearchResult | None) -> str:
    if result is None:
        return "the committed launch computes a wrong result here; run python -m fastsd verify"
    times = f"{1e6 * result.seconds:.1f} us, committed {1e6 * result.committed_seconds:.1f} us"
    return f"{times}, {result.correct} of {result.candidates} correct: {result.launch}"


def tune(run: Callable[[], Any], clock: Clock) -> Iterator[tuple[Lookup, SearchResult | None]]:
    """Search for the fastest launch for every lookup in the launch tables during `run`.

    Yields each lookup with its result, in order; None where the committed launch computes a wrong result.
    """
    import torch

    from fastsd.kernels.choice.call import Call
    from fastsd.kernels.launch import tuned
    from fastsd.tune.candidates import candidates
    from fastsd.tune.search import search
    from fastsd.verify.ops import judge_of
    from fastsd.verify.watch import has_kernel, observed

    results: dict[tuned.Lookup, SearchResult | None] = {}

    def on_call(call: Call) -> None:
        if not has_kernel(call.op.name):
            return
        with tuned.recorded_lookups() as lookups:
            call.run()
        for lookup, committed in lookups.items():
            if lookup in results:
                continue
            launches = candidates(lookup, committed)
            results[lookup] = search(launches, *_trial(lookup, call.run, judge_of(call)), clock)

    with torch.inference_mode(), observed(on_call):
        run()
    yield from results.items()


def _trial(
    lookup: Lookup, call: Callable[[], Any], judge: Callable[[Any], CheckResult]
) -> tuple[Callable[[Any], bool], Callable[[Any], Any]]:
    """Two functions of a launch: whether `call` is correct with it, and `call` with it."""
    from fastsd.kernels.launch.tuned import overridden

    def run(launch: Any) -> Any:
        with overridden(lookup, launch):
            return call()

    return lambda launch: judge(run(launch)).passed is True, run
