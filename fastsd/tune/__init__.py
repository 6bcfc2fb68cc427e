"""Tuning: `python -m fastsd tune` measures launches on the GPU at hand and keeps the best for this user."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.kernels.launch.tuned import Question
    from fastsd.tune.search import Clock, Found
    from fastsd.verify.rule import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd tune`."""
    parser.add_argument(
        "--model", default="digits", metavar="FOLDER", help="whose shapes to tune for (default: digits)"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    parser.add_argument("--prompt", default="a handwritten eight", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Tune as the flags say and write the table of this GPU, which fastsd uses from then on.

    Returns:
        0.

    Raises:
        FastsdError: no GPU, no Triton, no such model, a cache folder that cannot be written to.
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
        raise FastsdError("tune: needs a CUDA GPU, and there is none to be used here; the committed tables stay in use")
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, graphs=False)
    missing = dispatch.why_no_triton(pipe.device)
    if missing is not None:
        raise FastsdError(f"tune: {missing}")
    belongs = tuned.origin(torch.cuda.get_device_name(pipe.device), architecture.of(pipe.device))
    launches = dict(tuned.load(belongs))  # of other models' shapes

    def short_run() -> None:
        drive(pipe, args.prompt, pipe.defaults["width"], pipe.defaults["height"])

    for question, found in tune(short_run, gpu_seconds):
        if found is None:
            print(
                f"{question.op} {question.key}: the committed launch is not right here; python -m fastsd verify",
                flush=True,
            )
            continue
        launches[question] = found.launch
        times = f"{1e6 * found.seconds:.1f} us, committed {1e6 * found.committed_seconds:.1f} us"
        print(
            f"{question.op} {question.key}: {times}, {found.right} of {found.tried} right: {found.launch}", flush=True
        )
    try:
        print(tuned.save(launches, belongs))
    except OSError as error:
        raise FastsdError(f"tune: cannot write to {cache_folder()}: {error.strerror}") from error
    return 0


def tune(run: Callable[[], Any], clock: Clock) -> Iterator[tuple[Question, Found | None]]:
    """Search for the best launch of every question that the kernels ask of their tables during `run`.

    Returns what was asked and what was found, in that order; None where the committed launch computes the wrong thing.
    """
    import torch

    from fastsd.kernels.launch import tuned
    from fastsd.tune.candidates import candidates
    from fastsd.tune.search import search
    from fastsd.verify.ops import compared
    from fastsd.verify.watch import Call, has_kernel, watched

    results: dict[tuned.Question, Found | None] = {}

    def see(call: Call) -> None:
        if not has_kernel(call.op.name):
            return
        with tuned.asked() as questions:
            call.run()
        for question, committed in questions.items():
            if question in results:
                continue
            listed = candidates(question, committed)
            results[question] = search(listed, *_trial(question, call.run, compared(call)), clock)

    with torch.inference_mode(), watched(see):
        run()
    yield from results.items()


def _trial(
    question: Question, call: Callable[[], Any], judge: Callable[[Any], Row]
) -> tuple[Callable[[Any], bool], Callable[[Any], Any]]:
    """For a launch: whether `call` is right with it, and `call` with it."""
    from fastsd.kernels.launch.tuned import tried

    def run(launch: Any) -> Any:
        with tried(question, launch):
            return call()

    return lambda launch: judge(run(launch)).passed is True, run
