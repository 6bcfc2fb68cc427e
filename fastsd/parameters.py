"""Every parameter, stated once: name, type, range, default, flags, help, what it needs, and its name in A1111's text.

The call's validation, the command line with its help, an image's metadata, A1111's text, `--from-image` and
docs/reference.md derive from `PARAMETERS`. To add a parameter, add a row; then use it where it acts, as
`request.settings.<name>`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastsd.config import PREDICTIONS, SPACINGS
from fastsd.errors import FastsdError, nearest
from fastsd.kinds import (
    HOW,
    MAX_IMAGES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    SHARE,
    START,
    WHAT,
    WHERE,
    Choice,
    Constant,
    Descending,
    File,
    Name,
    Number,
    NumberEach,
    Parameter,
    Switch,
    Text,
    Value,
    Whole,
)
from fastsd.mask_rows import MASK_ROWS
from fastsd.pass_rows import PASS_ROWS
from fastsd.program_rows import LOAD_ROWS, PROGRAM_ROWS, PYTHON_ROWS
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES

MAX_CONTROL_WEIGHT = 10.0
MAX_IMAGE_PROMPT_SCALE = 10.0
DEFAULT_BATCH = 8
RANDOM_SEED = -1


ROWS: tuple[Parameter, ...] = (
    Parameter("prompt", Text(), "what to generate", ("-p", "--prompt"), WHAT),
    Parameter("negative_prompt", Text(), "what to stay away from", ("-n", "--negative-prompt"), WHAT, ""),
    Parameter(
        "num_inference_steps",
        Whole(low=1, high=MAX_STEPS),
        f"denoising steps, 1 to {MAX_STEPS}",
        ("--steps",),
        HOW,
        label="Steps",
        few_step=True,
    ),
    Parameter("sampler", Name(names=SAMPLERS), "", ("--sampler", "--sampling-method"), HOW, few_step=True),
    Parameter("schedule", Name(names=SCHEDULES), "", ("--schedule",), HOW, few_step=True),
    Parameter(
        "spacing",
        Choice(options=SPACINGS),
        "of the timesteps: leading, trailing or linspace",
        ("--spacing",),
        HOW,
        label="Timestep spacing",
        few_step=True,
        rare=True,
    ),
    Parameter(
        "timesteps",
        Descending(whole=True),
        "the training timesteps of the steps, from high to low, in place of a schedule",
        ("--timesteps",),
        HOW,
        excludes=("sigmas", "either says where the steps are"),
        label="Timesteps",
        rare=True,
    ),
    Parameter(
        "sigmas",
        Descending(least=2),
        "the noise levels of the steps and the one after the last, mostly 0, in place of a schedule",
        ("--sigmas",),
        HOW,
        label="Sigmas",
        rare=True,
    ),
    Parameter(
        "guidance_scale",
        NumberEach(low=0, high=100),
        "how closely to follow the prompt; 1 and less: without guidance",
        ("--guidance", "--cfg-scale"),
        HOW,
        label="CFG scale",
        few_step=True,
    ),
    Parameter(
        "seed",
        Whole(low=RANDOM_SEED, high=MAX_SEED),
        "of the first image, the next has one more; -1: random",
        ("-s", "--seed"),
        WHAT,
        label="Seed",
    ),
    *PROGRAM_ROWS,
    Parameter("width", Whole(low=8, high=MAX_SIDE), "pixels; a multiple of 8", ("-W", "--width"), WHAT),
    Parameter("height", Whole(low=8, high=MAX_SIDE), "pixels; a multiple of 8", ("-H", "--height"), WHAT),
    Parameter(
        "model",
        File(metavar="PATH"),
        "a diffusers folder, a single file or a hub id, org/name (default: the bundled digits)",
        ("-m", "--model"),
        WHAT,
        of="load",
    ),
    Parameter(
        "revision",
        Text(metavar="REV"),
        "of a hub id: a branch, tag or commit",
        ("--revision",),
        WHAT,
        of="load",
        repeat=False,
        rare=True,
    ),
    Parameter(
        "vae",
        File(metavar="PATH", stored=dict),
        "replaces the model's autoencoder; --vae taesd PATH: TAESD, the tiny one, and no other",
        ("--vae",),
        WHAT,
        of="load",
    ),
    Parameter(
        "prediction",
        Choice(options=PREDICTIONS),
        "epsilon, v_prediction or sample, where the file does not say",
        ("--prediction",),
        WHAT,
        of="load",
        repeat=False,
        rare=True,
    ),
    Parameter(
        "ema",
        Switch(),
        "the averaged weights (EMA) of a file that holds both",
        ("--ema",),
        WHAT,
        of="load",
        repeat=False,
        rare=True,
    ),
    Parameter(
        "few_step",
        Name(metavar="KIND"),
        "lcm turbo lightning lightning-1 hyper none: how model or LoRA was distilled, where its file does not say",
        ("--few-step",),
        WHAT,
        of="load",
    ),
    Parameter(
        "allow_pickle",
        Switch(stored=None),
        "read .ckpt, .pt, .bin files: tensors and plain values",
        ("--allow-pickle",),
        WHAT,
        False,
        of="load",
    ),
    Parameter("image", File(stored=dict), "start from this image; sets the size too", ("--image", "--init-img"), START),
    Parameter(
        "strength",
        SHARE,
        "how much of it to change",
        ("--strength",),
        START,
        0.8,
        needs=("image", "the image to change"),
    ),
    *MASK_ROWS,
    Parameter(
        "depth_image",
        File(stored=dict),
        "what SD 2's depth model reads: white where things are near",
        ("--depth",),
        START,
        metadata_key="depth",
    ),
    Parameter(
        "clip_skip",
        Whole(low=1, high=99),
        "stop N layers before the text encoder's end; 1: at its end",
        ("--clip-skip",),
        HOW,
        1,
        label="Clip skip",
    ),
    Parameter("eta", SHARE, "ddim's share of fresh noise", ("--eta",), HOW, 0.0, label="Eta DDIM", rare=True),
    Parameter(
        "guidance_rescale",
        SHARE,
        "against overexposed images",
        ("--guidance-rescale",),
        HOW,
        0.0,
        label="Guidance rescale",
        rare=True,
    ),
    Parameter(
        "image_guidance_scale",
        Number(low=0, high=100),
        "how closely to follow {image} in a model that edits, as InstructPix2Pix (default: 1.5)",
        ("--image-guidance",),
        HOW,
        needs=("image", "the image to edit"),
        label="Image CFG scale",
        rare=True,
    ),
    *PASS_ROWS,
    Parameter("controls", Value(stored=list), "`fastsd.Control`s: ControlNets with their images", default=()),
    Parameter(
        "image_prompts",
        Value(stored=list),
        "`fastsd.ImagePrompt`s: images read beside the text (IP-Adapter)",
        default=(),
    ),
    Parameter(
        "prompt_syntax",
        Constant(options=("a1111", "comfy", "plain"), value="plain"),
        "plain reads (), [], BREAK and the like as text, and only as much as fits the text encoder",
        ("--plain-prompt",),
        WHAT,
        "a1111",
        label="Prompt syntax",
    ),
    Parameter(
        "num_images_per_prompt",
        Whole(low=1, high=MAX_IMAGES, stored=None),
        f"how many images, up to {MAX_IMAGES}",
        ("--count",),
        WHAT,
        1,
    ),
    Parameter(
        "device",
        Name(pattern=r"auto|cpu|cuda(:\d{1,3})?", expected="auto, cpu, cuda or cuda:N"),
        "auto, cpu, cuda, cuda:1",
        ("--device",),
        WHERE,
        "auto",
        of="load",
        repeat=False,
    ),
    Parameter(
        "dtype",
        Choice(options=("auto", "fp32", "fp16", "bf16", "fp8", "fp8-emulated")),
        "fp32, fp16, bf16, fp8[-emulated]",
        ("--dtype",),
        WHERE,
        "auto",
        of="load",
        repeat=False,
    ),
    Parameter(
        "batch_size",
        Whole(low=1, high=MAX_IMAGES),
        f"images generated together (default: {DEFAULT_BATCH})",
        ("-b", "--batch-size"),
        WHERE,
        repeat=False,
    ),
    Parameter("vae_tiling", Switch(), "decode in tiles: less memory for large images", ("--vae-tiling",), WHERE),
    *LOAD_ROWS,
    *PYTHON_ROWS,
)

PARAMETERS: dict[str, Parameter] = {row.name: row for row in ROWS}


class Settings(dict[str, Any]):
    """A value for each parameter of a call; `settings.seed` is `settings["seed"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some of them changed."""
        return Settings(self | changes)


def of_call() -> list[Parameter]:
    """The parameters of `Pipeline.__call__`."""
    return [parameter for parameter in PARAMETERS.values() if parameter.of == "call"]


def describe(of: str) -> str:
    """The arguments of a call ("call") or of loading ("load"), a line each, for docstrings."""
    lines = ["        Arguments:"]
    for row in PARAMETERS.values():
        if row.of != of or row.name == "model":
            continue
        default = "" if row.default in (None, "", ()) else f" (default: {row.default})"
        lines.append(f"            {row.name}: {row.text.replace('{', '`').replace('}', '`')}{default}")
    return "\n".join(lines) + "\n        "


def check_call(arguments: Mapping[str, Any], loaded: Collection[str] = ()) -> Settings:
    """The arguments of a call, each within its range, with the defaults of those that are missing or None.

    Args:
        arguments: by name, as the caller gave them.
        loaded: parameters of the loaded pipeline that arguments may need, such as "refiner".

    Raises:
        FastsdError: an argument that is unknown, out of range, or without effect beside the others.
    """
    known = {parameter.name: parameter for parameter in of_call()}
    for name in arguments:
        if name not in known:
            flags = {flag.lstrip("-").replace("-", "_"): row.name for row in known.values() for flag in row.flags}
            hint = f"; did you mean {flags[name]}?" if name in flags else nearest(name, known)
            raise FastsdError(f"no such argument{hint}", argument=name)
    given = {name: value for name, value in arguments.items() if value is not None}
    check_needs({*given, *loaded})
    return Settings(
        {
            name: parameter.check(given[name]) if name in given else parameter.default
            for name, parameter in known.items()
        }
    )


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings of a call that an image's metadata keeps; prompts and seed, which each image has, are not among
    them."""
    given = {name for name, value in settings.items() if value is not None}
    given |= {"refiner"} if settings.refiner_switch is not None else set()
    given = _counted(given - {row.name for row in of_call() if settings[row.name] is False})
    return {
        parameter.name: settings[parameter.name]
        for parameter in of_call()
        if parameter.is_repeated
        and parameter.name not in ("prompt", "negative_prompt", "seed")
        and (parameter.needs is None or parameter.needs[0] in given)
        and not (isinstance(parameter.kind, Constant) and settings[parameter.name] == parameter.default)
    }


def not_stored(names: Iterable[str]) -> list[str]:
    """A note on each of the arguments that change the image and that its metadata does not hold."""
    return [f"{name} is not stored: the image does not repeat from its settings alone" for name in names]


def check_needs(given: Collection[str]) -> None:
    """Refuse parameters that have no effect, or no meaning, beside the others.

    Args:
        given: the names of all that were given.

    Raises:
        FastsdError: it names both.
    """
    given = _counted(given)
    for parameter in PARAMETERS.values():
        if parameter.name not in given:
            continue
        if parameter.needs is not None and parameter.needs[0] not in given:
            raise FastsdError(f"given without {{{parameter.needs[0]}}}, {parameter.needs[1]}", argument=parameter.name)
        if parameter.excludes is not None and parameter.excludes[0] in given:
            raise FastsdError(
                f"given with {{{parameter.excludes[0]}}}; {parameter.excludes[1]}", argument=parameter.name
            )


def _counted(given: Collection[str]) -> set[str]:
    """The names that were given, with those that others of them count as."""
    return {*given, *(row.counts_as for row in PARAMETERS.values() if row.counts_as and row.name in given)}
