"""Draw pictures: check what can be checked at once, then load, draw batch by batch, save each batch when it is done."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd import __version__
from fastsd.cli import controls, embeddings, flags, loras, models, repeat
from fastsd.cli.output import Output
from fastsd.cli.parser import one_line
from fastsd.cli.preview import Preview
from fastsd.cli.repeat import Given
from fastsd.errors import FastsdError
from fastsd.image.files import open_image, open_mask
from fastsd.image.metadata import write_texts

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline, Result

PASSED_ON = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "width",
    "height",
    "sampler",
    "schedule",
    "eta",
    "clip_skip",
    "strength",
    "vae_tiling",
    "prompt_syntax",
    "hires_scale",
    "hires_strength",
    "hires_steps",
    "hires_upscaler",
    "refiner_switch",
)


def draw(args: argparse.Namespace) -> int:
    """Do what the flags ask.

    Everything that needs no model is checked first, the output last of it, so that nothing is left behind by a mistake.

    Raises:
        FastsdError: bad input.
    """
    before, notes = repeat.fill_in(args) if args.from_image is not None else ({}, [])
    check(args)
    given = {
        flag: Given.read(getattr(args, flag), f"--{flag}")
        for flag in ("image", "mask")
        if getattr(args, flag) is not None
    }
    arguments = {name: getattr(args, name) for name in PASSED_ON if getattr(args, name) is not None}
    if "image" in given:
        arguments["image"] = named(open_image, given["image"], f"--image {args.image}")
    if "mask" in given:
        arguments["mask_image"] = named(open_mask, given["mask"], f"--mask {args.mask}")
        if not arguments["mask_image"].getbbox():
            notes.append("the mask is black all over, so nothing is painted; white is what is painted anew")
    steering = controls.read(args, before)
    count = args.count or 1
    output = Output(args.output or flags.DEFAULT_OUTPUT, count, args.overwrite)
    try:
        pipe, fixed = load(args, before, notes)
        fixed |= {name: found.as_setting() for name, found in given.items()}
        fixed["embeddings"] = embeddings.load(pipe, args, before, notes) or None
        fixed["loras"] = loras.load(pipe, args, before, notes) or None
        arguments["controls"], fixed["controls"] = controls.load(pipe, steering, args.allow_pickle, flags.in_flags)
        notes += controls.differences(before, fixed["controls"])
        fixed |= {"vae_tiling": args.vae_tiling, "version": __version__}
        with Preview(output, args.preview) as preview:
            draw_batches(pipe, args, arguments, fixed, before, output, preview, notes)
    except BaseException:
        output.give_up()
        raise
    return 0


def check(args: argparse.Namespace) -> None:
    """What is wrong with the flags by themselves.

    Raises:
        FastsdError: the first thing that is.
    """
    if args.prompt is None or not args.prompt.strip():
        raise FastsdError('--prompt: no prompt; say what to draw, as in fastsd --prompt "a handwritten eight"')
    for flag in ("prompt", "negative_prompt"):
        try:
            (getattr(args, flag) or "").encode()
        except UnicodeEncodeError:
            raise FastsdError(f"--{flag.replace('_', '-')}: the text is not valid UTF-8") from None
    if args.mask is not None and args.image is None:
        raise FastsdError("--mask: given without --image; a mask says which part of a picture to paint anew")
    if args.strength is not None and args.image is None:
        raise FastsdError("--strength: given without --image; it says how much of a picture to redo")
    if args.preview_decoder is not None and args.preview is None:
        raise FastsdError("--preview-decoder: given without --preview; --preview 5 shows every fifth step")
    for flag in ("strength", "steps", "upscaler"):
        if getattr(args, f"hires_{flag}") is not None and args.hires_scale is None:
            raise FastsdError(f"--hires-{flag}: given without --hires, which says by how much to enlarge")
    if args.hires_scale is not None and args.image is not None:
        raise FastsdError("--hires: given with --image; the second drawing belongs to pictures from text alone")
    if args.refiner_switch is not None and args.refiner is None:
        raise FastsdError("--refiner-switch: given without --refiner, the model that does the last steps")
    if args.seed is not None and args.seed + (args.count or 1) > flags.MAX_SEED:
        raise FastsdError(f"--seed: {args.seed} leaves no seeds for {args.count or 1} pictures below {flags.MAX_SEED}")
    if args.sampler is not None or args.schedule is not None:
        from fastsd.sampling.samplers import resolve

        with in_flags():
            resolve(
                "euler" if args.sampler is None else args.sampler, "default" if args.schedule is None else args.schedule
            )


def named(read: Any, given: Given, name: str) -> Any:
    """A given file as a picture."""
    return read(given.data, name)


@contextmanager
def in_flags() -> Iterator[None]:
    """The pipeline's complaints in the words of the command line."""
    try:
        yield
    except FastsdError as error:
        raise FastsdError(flags.in_flags(str(error))) from error


def load(args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, and what metadata says of its model. A repeated picture goes to the device that first drew it."""
    import torch

    from fastsd.model.taesd import TAESD
    from fastsd.pipeline import Pipeline

    bundled = args.model in (None, "digits")
    device, dtype = args.device, args.dtype
    if device is None and before.get("device") in ("cpu", "cuda"):
        there = before["device"] == "cpu" or torch.cuda.is_available()
        device = before["device"] if there else "auto"
        if device == "cpu" and torch.cuda.is_available():
            notes.append("drawn on the CPU, as the first time; --device cuda is faster")
    if dtype is None and before.get("dtype") in ("fp32", "fp16", "bf16"):
        dtype = before["dtype"]
    if args.progress is False:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # its own bars, which a terminal shows, are for --progress too
    try:
        with in_flags():
            pipe = Pipeline.from_pretrained(
                None if bundled else args.model,
                device or "auto",
                dtype or "auto",
                vae=args.vae,
                preview=args.preview_decoder,
                refiner=args.refiner,
                prediction=args.prediction,
                few_step=args.few_step,
                ema=bool(args.ema),
                revision=args.revision,
                allow_pickle=args.allow_pickle,
                graphs=not args.no_graphs,
            )
    except FastsdError as error:
        raise FastsdError(f"{_flag_of(error, args)}{error}") from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise FastsdError(
            f"--model {args.model or 'digits'}: not enough memory for the model; {advice(dtype)}"
        ) from error
    if args.taesd and not isinstance(pipe.components.vae, TAESD):
        raise FastsdError(f"--vae taesd {args.vae}: not TAESD, the tiny autoencoder; --vae {args.vae} takes any")
    return pipe, models.settings(pipe, args)


def _flag_of(error: FastsdError, args: argparse.Namespace) -> str:
    """The flag whose path a message begins with, the longest where several do, and a space; or nothing."""
    paths = {"--model": args.model, "--vae": args.vae, "--refiner": args.refiner}
    paths["--preview-decoder"] = args.preview_decoder
    given = {flag: str(Path(path)) for flag, path in paths.items() if path is not None}
    found = [(len(path), flag) for flag, path in given.items() if str(error).startswith(path)]
    return f"{max(found)[1]} " if found else ""


def draw_batches(
    pipe: Pipeline,
    args: argparse.Namespace,
    arguments: dict[str, Any],
    fixed: dict[str, Any],
    before: dict[str, Any],
    output: Output,
    preview: Preview,
    notes: list[str],
) -> None:
    """Draw `args.count` pictures. Each batch is a call of its own, so that what is done is saved before the next."""
    from tqdm import tqdm

    count = args.count or 1
    batch = min(args.batch_size or flags.DEFAULT_BATCH, count)
    seed = secrets.randbelow(2**32) if args.seed in (None, -1) else args.seed
    starts = range(0, count, batch)
    wanted = sys.stderr.isatty() if args.progress is None else args.progress
    said: set[str] = set()
    columns, rows = shutil.get_terminal_size()  # tqdm by itself shows nothing on a terminal that tells no size
    with tqdm(file=sys.stderr, disable=not wanted, ncols=min(columns, 100), nrows=rows, unit="it") as bar:
        for i, start in enumerate(starts):
            size = min(batch, count - start)
            result = draw_batch(pipe, args.prompt, arguments, seed + start, size, len(starts), bar, preview)
            shared = {**result.parameters, **fixed, "prompt": args.prompt, "batch_size": size}
            shared["negative_prompt"] = args.negative_prompt or ""
            if i + 1 == len(starts):
                bar.close()
            for note in (*notes, *repeat.differences(before, shared, args), *result.notes):
                if note not in said:
                    tqdm.write(f"note: {one_line(note)}", file=sys.stderr)
                    said.add(note)
            for image, own_seed in zip(result.images, result.seeds, strict=True):
                path = output.save(image, own_seed, args.prompt, write_texts(shared | {"seed": own_seed}))
                tqdm.write(str(path), file=sys.stdout)
                sys.stdout.flush()


def draw_batch(
    pipe: Pipeline,
    prompt: str,
    arguments: dict[str, Any],
    seed: int,
    size: int,
    batches: int,
    bar: Any,
    preview: Preview,
) -> Result:
    """One batch, step by step on the progress bar."""
    result = None
    try:
        with in_flags():
            steps = pipe.stream(prompt, seed=seed, num_images_per_prompt=size, batch_size=size, **arguments)
            for step in steps:
                bar.total = step.total * batches
                bar.update()
                if new := preview.show(step):
                    bar.write(f"note: what is coming is in {one_line(str(new))} until it is done", file=sys.stderr)
                result = step.result
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise FastsdError(
            f"not enough memory for {size} pictures at once; {advice_on(pipe, arguments, size)}"
        ) from error
    assert result is not None  # the last step has it
    return result


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory; on the CPU PyTorch has no exception of its own for it."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def advice(dtype: str | None) -> str:
    """What to do when a model does not fit."""
    half = "--dtype fp16 or bf16 takes half, " if dtype == "fp32" else ""
    return f"{half}close other programs or take a smaller model"


def advice_on(pipe: Pipeline, arguments: dict[str, Any], size: int) -> str:
    """What to do when a batch does not fit: the next smaller thing to ask for."""
    if size > 1:
        return f"try --batch-size {size // 2}"
    image = arguments.get("image")
    default = image.size if image is not None else (pipe.defaults["width"], pipe.defaults["height"])
    width, height = arguments.get("width", default[0]), arguments.get("height", default[1])
    smaller = f"--width {max(width // 2 // 8 * 8, 8)} --height {max(height // 2 // 8 * 8, 8)} takes about a quarter"
    return smaller if arguments.get("vae_tiling") else f"try --vae-tiling; {smaller}"
