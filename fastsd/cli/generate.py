"""Generate images: check the flags, load the model, then generate and save batch by batch."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastsd import __version__
from fastsd.bundled import DIGITS
from fastsd.cli import controls, embeddings, flags, image_prompts, loras, models, repeat
from fastsd.cli.output import Output
from fastsd.cli.parser import one_line
from fastsd.cli.preview import Preview
from fastsd.cli.repeat import GivenImage
from fastsd.cli.timing import TimingNote
from fastsd.errors import FastsdError, about
from fastsd.image.files import open_depth, open_image, open_mask
from fastsd.image.infotext import UPSCALERS
from fastsd.image.metadata import write_texts
from fastsd.parameters import PARAMETERS, check_seeds, of_call
from fastsd.parameters.kinds import RANDOM_SEED
from fastsd.parameters.rows import DEFAULT_BATCH
from fastsd.sampling.samplers import resolve

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline, Result

READERS = {"image": open_image, "mask_image": open_mask, "depth_image": open_depth}
OF_NOISE = ("subseed", "subseed_strength", "noise_index", "noise_count")
OF_BATCHES = ("prompt", "seed", "num_images_per_prompt", "batch_size")  # each batch is a call with its own
NOT_PASSED = ("model", "device", "dtype")  # `load` passes these in its own way


def generate(args: argparse.Namespace) -> int:
    """Do what the flags ask.

    Everything that needs no model is checked first, the output last, so that a mistake leaves nothing behind.

    Raises:
        FastsdError: bad input.
    """
    if args.from_image is None:
        return _generate(args, {}, [])
    before, notes, filled = repeat.fill_in(args)
    with repeat.naming(args.from_image, filled):
        return _generate(args, before, notes)


def _generate(args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> int:
    """`generate`, with the settings of a repeated image in `args`, and as they were in it: `before`."""
    check(args)
    given = {name: GivenImage.read(getattr(args, name), name) for name in READERS if getattr(args, name) is not None}
    arguments = _arguments(args) | {name: _open(image, name) for name, image in given.items()}
    chosen = controls.read(args, before)
    prompts = image_prompts.read(args, before)
    _check_upscaler(args.hires_upscaler)
    output = Output(args.output or flags.DEFAULT_OUTPUT, args.num_images_per_prompt or 1, bool(args.overwrite))
    try:
        pipe, fixed = load(args, before, notes)
        fixed |= {PARAMETERS[name].key: image.as_setting() for name, image in given.items()}
        fixed["embeddings"] = embeddings.load(pipe, args, before, notes) or None
        fixed["loras"] = loras.load(pipe, args, before, notes) or None
        arguments["controls"], fixed["controls"] = controls.load(pipe, chosen, bool(args.allow_pickle))
        notes += controls.differences(before, fixed["controls"])
        shown = image_prompts.load(pipe, prompts, bool(args.allow_pickle))
        arguments["image_prompts"], fixed["image_prompts"] = shown[0], shown[1] or None
        notes += image_prompts.differences(before, shown[1])
        if args.hires_upscaler not in (None, *UPSCALERS):
            with about("hires_upscaler"):
                arguments["hires_upscaler"] = pipe.load_upscaler(args.hires_upscaler, bool(args.allow_pickle))
        fixed |= {"vae_tiling": args.vae_tiling, "version": __version__}
        with Preview(output, args.preview_every) as preview:
            generate_batches(pipe, args, arguments, fixed, before, output, preview, notes)
    except BaseException:
        output.remove_empty_folders()
        raise
    return 0


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are arguments of the call, the same for every batch."""
    return {
        row.name: getattr(args, row.name)
        for row in of_call()
        if row.flags and row.name not in (*READERS, *OF_BATCHES) and getattr(args, row.name) is not None
    }


def _open(given: GivenImage, name: str) -> Any:
    with about(name, given.path):
        return READERS[name](given.data, name)


def _check_upscaler(given: str | None) -> None:
    """Refuse a name or a file that is not there, before the model is loaded."""
    from fastsd.weights.hub.hub_id import parse_hub_id

    if given is not None and given not in UPSCALERS and not os.path.exists(given) and parse_hub_id(given) is None:
        message = f"no such file; give {', '.join(UPSCALERS)} or an upscaler's .safetensors or .pth"
        raise FastsdError(message, argument="hires_upscaler", path=given)


def check(args: argparse.Namespace) -> None:
    """Refuse flags that are wrong without any model.

    Raises:
        FastsdError: the first one.
    """
    if args.prompt is None:
        raise FastsdError(
            'no prompt; say what to generate, as in fastsd --prompt "a handwritten eight"', argument="prompt"
        )
    for name in ("prompt", "negative_prompt"):
        try:
            (getattr(args, name) or "").encode()
        except UnicodeEncodeError:
            raise FastsdError("the text is not valid UTF-8", argument=name) from None
    flags.check_flags(args)
    if args.seed is not None:
        check_seeds(args.seed, args.num_images_per_prompt or 1)
    if args.sampler is not None or args.schedule is not None:
        sampler = "euler" if args.sampler is None else args.sampler
        resolve(sampler, "default" if args.schedule is None else args.schedule)


def load(args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline, and what metadata says of its model. A repeated image goes to the device that generated it."""
    from fastsd.cuda.capture import ran_out_of_memory
    from fastsd.model.taesd import TAESD
    from fastsd.pipeline import Pipeline

    device, dtype = _place(args, before, notes)
    if args.progress is False:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # its own bars, which a terminal shows
    options = {
        row.name: getattr(args, row.name)
        for row in PARAMETERS.values()
        if row.of == "load" and row.name not in NOT_PASSED and getattr(args, row.name) is not None
    }
    try:
        pipe = Pipeline.from_pretrained(args.model, device, dtype, **options)
    except FastsdError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        half = "{dtype} fp16 or bf16 takes half, " if dtype == "fp32" else ""
        raise FastsdError(
            f"not enough memory for the model; {half}close other programs or take a smaller model",
            argument="model",
            path=args.model or DIGITS,
        ) from error
    if args.taesd and not isinstance(pipe.components.vae, TAESD):
        raise FastsdError(
            f"not TAESD, the tiny autoencoder; --vae {args.vae} takes any", argument="vae", path=f"taesd {args.vae}"
        )
    return pipe, models.settings(pipe, args)


def _place(args: argparse.Namespace, before: dict[str, Any], notes: list[str]) -> tuple[str, str]:
    """Device and dtype: as the flags say, else as they were, else automatic."""
    import torch

    from fastsd.runtime.devices import DTYPES

    device, dtype = args.device, args.dtype
    if device is None and before.get("device") in ("cpu", "cuda"):
        device = before["device"] if before["device"] == "cpu" or torch.cuda.is_available() else "auto"
        if device == "cpu" and torch.cuda.is_available():
            notes.append("generated on the CPU, as the first time; --device cuda is faster")
    if dtype is None and before.get("dtype") in (*DTYPES, "fp8"):
        dtype = before["dtype"]
    return device or "auto", dtype or "auto"


def generate_batches(
    pipe: Pipeline,
    args: argparse.Namespace,
    arguments: dict[str, Any],
    fixed: dict[str, Any],
    before: dict[str, Any],
    output: Output,
    preview: Preview,
    notes: list[str],
) -> None:
    """Generate all images. Each batch is a call of its own, and saved before the next."""
    from tqdm import tqdm

    from fastsd.cli.said import PathsSaid
    from fastsd.generate.like import LIKE
    from fastsd.generate.noise import fill_subseed, of_image
    from fastsd.generate.threads import suited_threads

    count = args.num_images_per_prompt or 1
    batch = min(args.batch_size or DEFAULT_BATCH, count)
    seed = secrets.randbelow(2**32) if args.seed in (None, RANDOM_SEED) else args.seed
    source = args.noise or LIKE[args.like or "none"].settings["noise"]
    noise = {name: getattr(args, name) for name in OF_NOISE} | {"noise": source, "seed": seed}
    noise["subseed"] = fill_subseed(args.subseed, args.subseed_strength)
    starts = range(0, count, batch)
    wanted = sys.stderr.isatty() if args.progress is None else args.progress
    shown, said = set[str](), PathsSaid()
    columns, rows = shutil.get_terminal_size()  # tqdm alone shows nothing on a terminal that reports no size
    bar = tqdm(file=sys.stderr, disable=not wanted, ncols=min(columns, 100), nrows=rows, unit="it")
    with suited_threads(pipe.components, pipe.device), bar:
        timing = TimingNote(bar)
        pipe.choice_mode = replace(pipe.choice_mode, tell=timing)
        for i, start in enumerate(starts):
            size = min(batch, count - start)
            own = of_image(noise, start, count) | {"num_images_per_prompt": size, "batch_size": size}
            result = generate_batch(pipe, args.prompt, arguments | own, len(starts), bar, preview, timing)
            shared = {**result.parameters, **fixed, "prompt": args.prompt, "batch_size": size}
            shared["negative_prompt"] = args.negative_prompt or ""
            if i + 1 == len(starts):
                bar.close()
            for note in (*notes, *repeat.differences(before, shared, args), *result.notes):
                if note not in shown:
                    tqdm.write(f"note: {one_line(note)}", file=sys.stderr)
                    shown.add(note)
            for image, each in zip(result.images, result.own, strict=True):
                path = output.save(image, each["seed"], args.prompt, write_texts(shared | each))
                said.say(path)
    said.end()


def generate_batch(
    pipe: Pipeline,
    prompt: str,
    arguments: dict[str, Any],
    batches: int,
    bar: Any,
    preview: Preview,
    timing: TimingNote,
) -> Result:
    """One batch, step by step on the progress bar."""
    result = None
    for step in pipe.stream(prompt, **arguments):
        bar.total = step.total * batches
        timing.clear()
        bar.update()
        if new := preview.show(step):
            bar.write(f"note: a preview is in {one_line(str(new))} until the image is done", file=sys.stderr)
        result = step.result
    assert result is not None  # the last step has it
    return result
