"""The flags of `fastsd --prompt ...`: those of `fastsd.parameters`, and those that the command line alone has."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from fastsd import __version__
from fastsd.cli.parser import Parser
from fastsd.errors import about
from fastsd.parameters import PARAMETERS, asks, check_needs
from fastsd.parameters.kinds import (
    CONTROL,
    HOW,
    MAX_STEPS,
    SHARE,
    START,
    WHAT,
    WHERE,
    Constant,
    File,
    Kind,
    Name,
    Number,
    Parameter,
    Switch,
    Text,
    Value,
    Whole,
)
from fastsd.parameters.rows import MAX_CONTROL_WEIGHT
from fastsd.sampling.samplers import RARE

DEFAULT_OUTPUT = "outputs"
OUTPUT_HELP = f"a folder, or a file: .png, .jpg, .webp (default: {DEFAULT_OUTPUT}/00000-SEED-PROMPT.png)"
OF_UPSCALE = ("upscaler", "scale", "tile", "skip_existing")  # arguments with a flag of `fastsd upscale`
FOLDER, PATH = File(metavar="DIR"), File(metavar="PATH")
WEIGHT = Number(low=-MAX_CONTROL_WEIGHT, high=MAX_CONTROL_WEIGHT)


def _row(
    name: str,
    kind: Kind,
    group: str,
    help: str,
    *flags: str,
    default: Any = None,
    several: bool = False,
    rare: bool = False,
) -> Parameter:
    flags = flags or (f"--{name.replace('_', '-')}",)
    return Parameter(name, kind, help, flags, group, default, of="cli", several=several, rare=rare)


CLI: dict[str, Parameter] = {
    row.name: row
    for row in (
        _row(
            "embedding",
            Text(metavar="FILE[:NAME]"),
            WHAT,
            "a textual inversion, called by NAME in the prompt (default: the file's); may be given again",
            several=True,
        ),
        _row("embedding_dir", FOLDER, WHAT, "a folder of them; those that the prompt names are read"),
        _row(
            "lora",
            Text(metavar="FILE[:X]"),
            WHAT,
            "a LoRA, its strength (default: 1); may be repeated",
            several=True,
        ),
        _row("lora_dir", FOLDER, WHAT, "a folder of them, for <lora:NAME:X> in the prompt"),
        _row("allow_partial", Switch(), WHAT, "leave out a LoRA's layers that the model lacks", rare=True),
        _row("from_image", File(), WHAT, "repeat an image by the settings in it; flags change them"),
        _row("control", PATH, CONTROL, "a ControlNet, T2I-Adapter: path or hub id", several=True),
        _row("control_image", File(), CONTROL, "its input: edges, a pose", several=True),
        _row("control_canny", File(), CONTROL, "or an image, of which it gets the edges", several=True),
        _row("control_color", File(), CONTROL, "or one, of which it gets the colours", several=True, rare=True),
        _row("control_weight", WEIGHT, CONTROL, "how strongly it steers", default=1.0, several=True),
        _row("control_start", SHARE, CONTROL, "from this share of the steps on", default=0.0, several=True),
        _row("control_end", SHARE, CONTROL, "up to this share of the steps", default=1.0, several=True),
        _row(
            "ip_adapter",
            Text(metavar="FILE[:X]"),
            CONTROL,
            "an IP-Adapter and its scale (default: 1): what to generate, said by images; may be given again",
            several=True,
            rare=True,
        ),
        _row("ip_image", File(), CONTROL, "an image that the --ip-adapter before it reads", several=True, rare=True),
        _row("ip_mask", File(), CONTROL, "white where that --ip-adapter adds", several=True, rare=True),
        _row(
            "ip_encoder",
            PATH,
            CONTROL,
            "the vision tower that it reads images with (default: beside it)",
            several=True,
            rare=True,
        ),
        _row("output", PATH, WHERE, OUTPUT_HELP, "-o", "--output", "--out"),
        _row("overwrite", Switch(), WHERE, "replace a file of that name"),
        _row("progress", Switch(), WHERE, "a progress bar (default: on a terminal)"),
        _row(
            "preview_every",
            Whole(low=1, high=MAX_STEPS),
            WHERE,
            "write a preview of the first image every N steps",
            "--preview",
        ),
        _row("version", Value(), WHERE, "print the version and exit"),
    )
}

EXAMPLES = """\
examples:
  fastsd --prompt "a handwritten eight"
  fastsd -p "a lighthouse" -m sd15 --sampler dpm++2m --schedule karras --seed 7
  fastsd -p "a lighthouse" -n "fog" -m sd15 --count 4 -o lighthouse.png
  fastsd -p "in winter" -m sd15 --image lighthouse-0.png --strength 0.6
  fastsd -p "a [sketch:photo:0.3] of a (red:1.2) door" -m sd15
  fastsd -p "a fort" -m sd15 --control net.safetensors --control-canny fort.png
  fastsd -p "a lighthouse" -m sdxl --refiner sdxl-refiner --hires 1.5
  fastsd --from-image outputs/00012-7-a-lighthouse.png --guidance 5
"""


def known() -> list[Parameter]:
    """Every parameter with a flag."""
    return [row for row in (*PARAMETERS.values(), *CLI.values()) if row.flags]


def make_parser(commands: Mapping[str, str], everything: bool = False) -> Parser:
    """The parser of the command that generates. Every value is None until given.

    Args:
        commands: the other commands, and what each does.
        everything: the help has rare flags too.
    """
    names = "".join(f"\n  fastsd {name} --help: {what}" for name, what in commands.items())
    parser = Parser(
        prog="fastsd",
        usage='fastsd --prompt "what to generate" [flags]',
        description="Generate images with Stable Diffusion.",
        epilog=f"{EXAMPLES}\nother commands:{names}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
    )
    groups = {title: parser.add_argument_group(title) for title in (WHAT, HOW, CONTROL, START, WHERE)}
    for row in known():
        text = argparse.SUPPRESS if row.rare and not everything else help_text(row, everything)
        add_flag(groups[row.group], row, text)
    parser.add_argument("--help-all", action="help", help="rare flags too")
    parser.set_defaults(taesd=False, control_images=None, ip_given=None)
    return parser


def add_flag(to: Any, row: Parameter, text: str | None = None) -> None:
    """Add a parameter's flag to a parser, or to a group of one. `text`: its help, where that is not `help_text`."""
    to.add_argument(*row.flags, dest=row.name, help=help_text(row) if text is None else text, **_options(row))


def read_value(args: argparse.Namespace, row: Parameter, typed: str | None = None) -> None:
    """Turn the text of a flag into its value, within its range. `typed`: the flag as it was written."""
    value = getattr(args, row.name, None)
    with about(typed or row.name):
        if isinstance(value, str):
            setattr(args, row.name, row.kind.parse(value))
        elif isinstance(value, list):
            setattr(args, row.name, [row.kind.parse(each) for each in value])


def _options(row: Parameter) -> dict[str, Any]:
    """How argparse reads a flag; values are checked afterwards, in `parse`."""
    if row.name in _SPECIAL:
        return _SPECIAL[row.name] | ({"metavar": row.kind.metavar} if row.name != "version" else {})
    if hasattr(row.kind, "value"):
        return {"action": "store_const", "const": row.kind.value}
    return {"metavar": row.kind.metavar, "action": "append" if row.several else "store"}


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The flags, each within its range.

    Raises:
        FastsdError: it names the flag.
    """
    args = parser.parse(words)
    typed = [word.split("=")[0] for word in reversed(words)]
    for row in known():
        read_value(args, row, next((word for word in typed if word in row.flags), None))
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that have no effect beside the others; `fastsd.parameters.check_needs` states which."""
    check_needs({row.name for row in known() if asks(row, getattr(args, row.name, None))})


def help_text(row: Parameter, everything: bool = True) -> str:
    """One line of --help, with range and default where the row's own text does not say them.

    Without `everything`, a table of samplers or schedules is cut to the common ones.
    """
    if isinstance(row.kind, Name) and not everything and any(name in RARE for name in row.kind.names):
        return f"{' '.join(name for name in row.kind.names if name not in RARE)} (--help-all has more)"
    text = re.sub(r"\{(\w+)\}", lambda found: flag_of(found[1]), row.text)
    if "(default" in text or isinstance(row.kind, Constant):
        return text
    details = ["0 to 1"] if row.kind is SHARE else []
    if isinstance(row.default, int | float | str) and not isinstance(row.default, bool) and row.default != "":
        details.append(f"default: {row.default if isinstance(row.default, str) else format(row.default, 'g')}")
    return f"{text} ({', '.join(details)})" if details else text


def flag_of(argument: str) -> str:
    """The flag of an argument, in Python's spelling: "width", "controls[0].weight"."""
    row = PARAMETERS.get(argument) or CLI.get(argument)
    if row is not None and row.flags:
        return row.flag
    if argument in OF_UPSCALE:
        return f"--{argument.replace('_', '-')}"
    prompt = re.fullmatch(r"image_prompts(?:\[(\d+)\]\.(\w+))?", argument)
    if prompt is not None:
        of = "--ip-adapter" if prompt[1] is None else f"--ip-adapter {int(prompt[1]) + 1}"
        return {"images": f"--ip-image of {of}", "mask": f"--ip-mask of {of}"}.get(prompt[2] or "", of)
    found = re.fullmatch(r"controls(?:\[(\d+)\]\.(\w+))?", argument)
    if found is None:
        return argument
    if found[1] is None:
        return "--control"
    of = f"--control {int(found[1]) + 1}"
    return of if found[2] == "net" else f"--control-{found[2]} of {of}"


class _Autoencoder(argparse.Action):
    """`--vae PATH` or `--vae taesd PATH`; the word sets `taesd`, so that `vae` is a path."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.taesd = values[0] == "taesd" and (len(values) > 1 or not os.path.exists("taesd"))
        if len(values) != 1 + namespace.taesd:
            raise argparse.ArgumentError(self, "takes a file, a folder or a hub id; or the word taesd and one of them")
        namespace.vae = values[-1]


class _ControlImage(argparse.Action):
    """Collects (argument, file) of --control-image and its kin in the order in which they are given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.control_images = [*(namespace.control_images or ()), (self.dest, values)]


class _OfImagePrompt(argparse.Action):
    """Collects (flag, value) of --ip-adapter and what belongs to it, in the order in which they are given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.ip_given = [*(namespace.ip_given or ()), (self.dest, values)]


_SPECIAL: dict[str, dict[str, Any]] = {
    "vae": {"nargs": "+", "action": _Autoencoder},
    "control_image": {"action": _ControlImage},
    "control_canny": {"action": _ControlImage},
    "control_color": {"action": _ControlImage},
    **{name: {"action": _OfImagePrompt} for name in ("ip_adapter", "ip_image", "ip_mask", "ip_encoder")},
    "progress": {"action": argparse.BooleanOptionalAction},
    "version": {"action": "version", "version": f"fastsd {__version__}"},
}
