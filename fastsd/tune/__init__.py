"""Tuning: `python -m fastsd tune` times every way to compute each op of a model on this GPU, and keeps the fastest."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fastsd.kernels.choice.call import Call
    from fastsd.kernels.choice.decide import ChoiceMode
    from fastsd.kernels.choice.op import Key
    from fastsd.kernels.choice.table import ChoiceTable, Place, TableEntry

    Attention = list[object]  # the arguments of an attention, as `encoded` gives them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fastsd tune`."""
    parser.add_argument(
        "-m",
        "--model",
        default="digits",
        metavar="FOLDER",
        help="the checkpoint whose shapes are tuned (default: %(default)s)",
    )
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: %(default)s)")
    parser.add_argument("--prompt", default="a handwritten eight", help=argparse.SUPPRESS)
    parser.add_argument(
        "--no-probe", action="store_false", dest="probe", help="run kernels here, not in a process of their own first"
    )
    parser.add_argument(
        "--gradients", action="store_true", help="also the gradients of attention, as training in 16 bits needs them"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="after them no more launches are tried")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--export", metavar="FILE", help="write what was measured on this GPU to a file to share")
    files.add_argument("--import", metavar="FILE", dest="import_", help="take over such a file, for the GPU it names")


def run(args: argparse.Namespace) -> int:
    """Tune as the flags say, and write the table of this GPU; or write or read a file to share.

    Returns:
        0.

    Raises:
        FastsdError: no GPU, no Triton, no such model, an unwritable cache folder, a file that is no table.
    """
    from pathlib import Path

    import torch

    from fastsd.errors import FastsdError
    from fastsd.kernels import dispatch
    from fastsd.kernels.choice import decide, table
    from fastsd.runtime.devices import resolve_device

    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise FastsdError("it should be a number of minutes above 0", argument="--minutes", value=args.minutes)
    if args.import_ is not None:
        print(_imported(table.import_file(Path(args.import_))))
        return 0
    if not torch.cuda.is_available():
        raise FastsdError("tune: needs a CUDA GPU, and none is available; PyTorch's own ops are used")
    device = resolve_device(args.device)
    if device.type != "cuda":
        raise FastsdError(
            "tune: it should be a CUDA GPU; on a CPU nothing is timed", argument="device", value=args.device
        )
    if args.export is not None:
        count = table.export(decide.machine.identity(device), Path(args.export))
        print(f"{args.export}: {count} choices")
        return 0
    no_triton = dispatch.why_no_triton(device)
    if no_triton is not None:
        raise FastsdError(f"tune: {no_triton}")
    _tune(args)
    return 0


def _tune(args: argparse.Namespace) -> None:
    """Run the model once, while every op times all its ways."""
    import time
    from contextlib import nullcontext
    from dataclasses import replace

    from fastsd.errors import FastsdError
    from fastsd.files import reason
    from fastsd.kernels.choice import decide, table
    from fastsd.pipeline import Pipeline
    from fastsd.verify.drive import drive
    from fastsd.verify.watch import observed

    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype, graphs=False)
    ends = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    pipe.choice_mode = replace(pipe.choice_mode, thorough=True, probe=args.probe, ends=ends, tell=tell)
    attention: dict[Key, Attention] = {}
    with observed(lambda call: note_attention(call, attention)) if args.gradients else nullcontext():
        drive(pipe, args.prompt, pipe.defaults["width"], pipe.defaults["height"])
    tune_gradients(list(attention.values()), pipe.device, pipe.choice_mode)
    gpu = decide.gpu_of(next(pipe.components.unet.parameters()).device)
    try:
        print(table.save(gpu.table, gpu.table.entries))
    except OSError as error:
        raise FastsdError(reason(error), path=table.table_path(gpu.identity).parent) from error


def note_attention(call: Call, found: dict[Key, Attention]) -> None:
    """Keep the sizes of an attention with a key of its own."""
    from fastsd.kernels.choice.op import encoded

    if call.op.name == "flash_attn" and call.key not in found:
        found[call.key] = encoded(list(call.arguments.values()))


def tune_gradients(calls: Sequence[Attention], device: torch.device, mode: ChoiceMode) -> None:
    """Time every way of both passes of these attentions. It comes last, since it holds all scores, to compare."""
    import torch

    from fastsd.kernels.candidates import choosing
    from fastsd.kernels.choice.op import decoded
    from fastsd.kernels.flash_attn import flash_attn

    with choosing(mode), torch.enable_grad():
        for call in calls:
            q, *others = decoded(call, device)
            flash_attn(q.requires_grad_(), *others)


def tell(place: Place, entry: TableEntry) -> None:
    """Print a choice: the op, its key, the times in microseconds, and what was left out."""
    op, key = place
    times = sorted(entry.microseconds.items(), key=lambda pair: pair[1])[:4]
    print(f"{op} ({key}): " + ", ".join(f"{label} {time:.1f} us" for label, time in times), flush=True)
    for label, reason in entry.excluded.items():
        print(f"    left out: {label}: {reason}", flush=True)


def _imported(table: ChoiceTable) -> str:
    """What happens to an imported table, in a line."""
    import torch

    gpu, entries = table.identity["gpu"], len(table.entries)
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if here != gpu:
        return f"{entries} choices for {gpu}: kept for it; the GPU here is {here or 'none'}"
    return f"{entries} choices for {gpu}: each is compared with the specification at its first use"
