"""The flags of `fastsd --prompt ...`. The limits are the pipeline's, stated here so that --help loads no torch."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from typing import Any

from fastsd import __version__
from fastsd.cli.parser import Parser, real, whole
from fastsd.errors import FastsdError

MAX_IMAGES = 1000
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MIN_SIDE, MAX_SIDE = 8, 8192
MAX_SEED = 2**63 - 1
MAX_HIRES = 8.0
MAX_CONTROL_WEIGHT = 10.0
DEFAULT_BATCH = 8
DEFAULT_OUTPUT = "outputs"

# How a value is read, by the name of the pipeline's argument; --from-image checks what a picture says in the same way.
NUMBERS = {
    "num_inference_steps": whole(1, MAX_STEPS),
    "guidance_scale": real(0, MAX_GUIDANCE),
    "guidance_rescale": real(0, 1),
    "width": whole(MIN_SIDE, MAX_SIDE),
    "height": whole(MIN_SIDE, MAX_SIDE),
    "seed": whole(-1, MAX_SEED),
    "eta": real(0, 1),
    "strength": real(0, 1),
    "hires_scale": real(1, MAX_HIRES),
    "hires_strength": real(0, 1),
    "hires_steps": whole(1, MAX_STEPS),
    "refiner_switch": real(0, 1),
    "control_weight": real(-MAX_CONTROL_WEIGHT, MAX_CONTROL_WEIGHT),
    "control_start": real(0, 1),
    "control_end": real(0, 1),
    "clip_skip": whole(1, 99),
    "count": whole(1, MAX_IMAGES),
    "batch_size": whole(1, MAX_IMAGES),
}

# What the pipeline's messages call an argument, and what the command line calls it.
FLAGS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "guidance_rescale": "--guidance-rescale",
    "negative_prompt": "--negative-prompt",
    "num_images_per_prompt": "--count",
    "batch_size": "--batch-size",
    "mask_image": "--mask",
    "clip_skip": "--clip-skip",
    "vae_tiling": "--vae-tiling",
    "prompt_syntax": "--plain-prompt",
    "few_step": "--few-step",
    "hires_scale": "--hires",
    "hires_strength": "--hires-strength",
    "hires_steps": "--hires-steps",
    "hires_upscaler": "--hires-upscaler",
    "refiner_switch": "--refiner-switch",
}
_SHORT = "prompt|prediction|refiner|revision|width|height|seed|sampler|schedule|eta|image|strength|device|dtype"

EXAMPLES = """\
examples:
  fastsd --prompt "a handwritten eight"
  fastsd -p "a lighthouse" -m sd15 --sampler dpm++2m --schedule karras --seed 7
  fastsd -p "a lighthouse" -m stable-diffusion-v1-5/stable-diffusion-v1-5
  fastsd -p "a lighthouse" -n "fog" -m sd15 --count 4 -o lighthouse.png
  fastsd -p "in winter" -m sd15 --image lighthouse-0.png --strength 0.6
  fastsd -p "a [sketch:photo:0.3] of a (red:1.2) door" -m sd15
  fastsd -p "a red door" -m sd15 --image house.png --mask door.png
  fastsd -p "a fort" -m sd15 --control net.safetensors --control-canny fort.png
  fastsd -p "a lighthouse" -m sdxl --refiner sdxl-refiner --hires 1.5
  fastsd --from-image outputs/00012-7-a-lighthouse.png --guidance 5
"""


def make_parser(commands: Mapping[str, str]) -> Parser:
    """The parser of the command that draws. Every value is None until given."""
    known = "".join(f"\n  fastsd {name} --help: {what}" for name, what in commands.items())
    parser = Parser(
        prog="fastsd",
        usage='fastsd --prompt "what to draw" [flags]',
        description="Draw pictures with Stable Diffusion.",
        epilog=f"{EXAMPLES}\nother commands:{known}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
    )

    def number(group: argparse._ArgumentGroup, *names: str, dest: str, help: str, metavar: str = "N") -> None:
        group.add_argument(*names, dest=dest, type=NUMBERS[dest], metavar=metavar, help=help)

    what = parser.add_argument_group("what to draw")
    what.add_argument("-p", "--prompt", metavar="TEXT", help="what to draw")
    what.add_argument("-n", "--negative-prompt", metavar="TEXT", help="what to stay away from")
    what.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        help="a diffusers folder, a single file or a hub id, org/name (default: the digits that come along)",
    )
    what.add_argument("--revision", metavar="REV", help="of a hub id: a branch, tag or commit")
    what.add_argument(
        "--vae",
        nargs="+",
        action=_Autoencoder,
        metavar="PATH",
        help="an autoencoder to take instead of the model's own; --vae taesd PATH: TAESD, the tiny one, and no other",
    )
    what.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction", "sample"),
        metavar="NAME",
        help="epsilon, v_prediction or sample, where the file does not say",
    )
    what.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="the averaged weights of a file that holds both",
    )
    what.add_argument(
        "--few-step",
        metavar="KIND",
        help="lcm turbo lightning lightning-1 hyper: how model or LoRA was distilled, where its file does not say",
    )
    what.add_argument(
        "--allow-pickle", action="store_true", help="read .ckpt, .pt, .bin files: tensors and plain values"
    )
    what.add_argument(
        "--plain-prompt",
        dest="prompt_syntax",
        action="store_const",
        const="plain",
        help="read (), [], BREAK and the like as text, and only as much as fits the text encoder",
    )
    what.add_argument(
        "--embedding",
        action="append",
        metavar="FILE[:NAME]",
        help="a textual inversion, called by NAME in the prompt (default: the file's); may be given again",
    )
    what.add_argument("--embedding-dir", metavar="DIR", help="a folder of them; those that the prompt names are read")
    what.add_argument(
        "--lora", action="append", metavar="FILE[:X]", help="a LoRA and its strength (default: 1); may be given again"
    )
    what.add_argument("--lora-dir", metavar="DIR", help="a folder of them, for <lora:NAME:X> in the prompt")
    what.add_argument("--allow-partial", action="store_true", help="leave out a LoRA's layers that the model lacks")
    number(what, "-W", "--width", dest="width", help="pixels; a multiple of 8")
    number(what, "-H", "--height", dest="height", help="pixels; a multiple of 8")
    number(what, "-s", "--seed", dest="seed", help="of the first picture, the next has one more; -1: random")
    number(what, "--count", dest="count", help=f"how many pictures, up to {MAX_IMAGES} (default: 1)")
    what.add_argument("--from-image", metavar="FILE", help="repeat a picture by the settings in it; flags change them")

    how = parser.add_argument_group("how to draw (defaults: the model's own)")
    number(how, "--steps", dest="num_inference_steps", help=f"denoising steps, 1 to {MAX_STEPS}")
    number(
        how, "--guidance", "--cfg-scale", dest="guidance_scale", metavar="X", help="how closely to follow the prompt"
    )
    number(how, "--guidance-rescale", dest="guidance_rescale", metavar="X", help="0 to 1; against overexposed pictures")
    how.add_argument(
        "--sampler",
        "--sampling-method",
        metavar="NAME",
        help="ddpm ddim pndm euler euler_a heun dpm++2m dpm++2m_sde dpm++sde dpm++2s unipc lms lcm euler_maruyama",
    )
    how.add_argument("--schedule", metavar="NAME", help="default karras exponential sgm_uniform")
    number(how, "--eta", dest="eta", metavar="X", help="ddim's share of fresh noise, 0 to 1 (default: 0)")
    number(how, "--clip-skip", dest="clip_skip", help="stop N layers before the text encoder's end; 1: at its end")

    number(how, "--hires", dest="hires_scale", metavar="X", help="draw, enlarge by this, and draw over it (1 to 8)")
    number(how, "--hires-strength", dest="hires_strength", metavar="X", help="how much that redoes (default: 0.5)")
    number(how, "--hires-steps", dest="hires_steps", help="steps that it runs that share of (default: --steps)")
    how.add_argument(
        "--hires-upscaler", choices=("latent", "lanczos"), metavar="NAME", help="latent or lanczos (default: latent)"
    )
    how.add_argument("--refiner", metavar="PATH", help="a model that does the last steps: SDXL's refiner")
    number(
        how,
        "--refiner-switch",
        dest="refiner_switch",
        metavar="X",
        help="the share of the noise that it leaves to the model (default: 0.8)",
    )

    control = parser.add_argument_group("steering by pictures (flags may be given again, for the next --control)")
    control.add_argument(
        "--control", action="append", metavar="PATH", help="a ControlNet: a folder, a file or a hub id"
    )
    control.add_argument(
        "--control-image", action=_Pictures, dest="control_images", metavar="FILE", help="what it reads: edges, a pose"
    )
    control.add_argument(
        "--control-canny", action=_Pictures, dest="control_images", metavar="FILE", help="or a picture, for its edges"
    )
    for part, text in (
        ("weight", "how strongly it steers (default: 1)"),
        ("start", "from this share of the steps on (default: 0)"),
        ("end", "up to this share (default: 1)"),
    ):
        dest = f"control_{part}"
        control.add_argument(
            f"--control-{part}", action="append", dest=dest, type=NUMBERS[dest], metavar="X", help=text
        )

    start = parser.add_argument_group("starting from a picture")
    start.add_argument("--image", "--init-img", metavar="FILE", help="start from this picture; sets the size too")
    number(start, "--strength", dest="strength", metavar="X", help="how much of it to redo, 0 to 1 (default: 0.8)")
    start.add_argument("--mask", metavar="FILE", help="paint only where this picture is white")

    where = parser.add_argument_group("where")
    where.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help=f"a folder, or a file: .png, .jpg, .webp (default: {DEFAULT_OUTPUT}/00000-SEED-PROMPT.png)",
    )
    where.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    where.add_argument("--device", type=_device, metavar="NAME", help="auto, cpu, cuda, cuda:1 (default: auto)")
    where.add_argument("--dtype", choices=("auto", "fp32", "fp16", "bf16"), help="precision (default: auto)")
    number(where, "-b", "--batch-size", dest="batch_size", help=f"pictures drawn together (default: {DEFAULT_BATCH})")
    where.add_argument(
        "--vae-tiling", action="store_true", default=None, help="decode in tiles: less memory for large pictures"
    )
    where.add_argument("--no-graphs", action="store_true", help="CUDA: launch each kernel by itself, slower")
    where.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="a progress bar (default: on a terminal)"
    )
    where.add_argument(
        "--preview", type=whole(1, MAX_STEPS), metavar="N", help="write a picture of what is coming every N steps"
    )
    where.add_argument("--preview-decoder", metavar="PATH", help="TAESD, which draws the previews in almost no time")
    where.add_argument("--version", action="version", version=f"fastsd {__version__}")
    parser.set_defaults(taesd=False)
    return parser


class _Autoencoder(argparse.Action):
    """`--vae PATH` or `--vae taesd PATH`; the word goes to `taesd`, so that `vae` is a path."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.taesd = values[0] == "taesd" and (len(values) > 1 or not os.path.exists("taesd"))
        if len(values) != 1 + namespace.taesd:
            raise argparse.ArgumentError(self, "takes a file, a folder or a hub id; or the word taesd and one of them")
        namespace.vae = values[-1]


class _Pictures(argparse.Action):
    """Collects (flag, file) of several flags in the order in which they are given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), (option, values)])


def checked(name: str, value: Any, where: str) -> Any:
    """A setting out of a picture, within the limits of its flag.

    Raises:
        FastsdError: it is not; the message begins with `where`.
    """
    if name not in NUMBERS:
        return value
    try:
        return NUMBERS[name](str(value))
    except argparse.ArgumentTypeError as error:
        raise FastsdError(f"{where}: its {name} is {error}") from None


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} should be auto, cpu, cuda or cuda:N")
    return text


def in_flags(message: str) -> str:
    """A message of the pipeline, with its arguments called by their flags."""
    message = message.replace("image and mask_image", "--image and --mask")
    message = re.sub(r"^controls\[(\d+)\]\.net", lambda found: f"--control {int(found[1]) + 1}", message)
    message = re.sub(
        r"^controls\[(\d+)\]\.(\w+)", lambda found: f"--control-{found[2]} of --control {int(found[1]) + 1}", message
    )
    names = "|".join(FLAGS)
    message = re.sub(rf"(?<![\w/\\.-])({names})(?![\w/\\.-])", lambda found: FLAGS[found[1]], message)
    return re.sub(rf"^({_SHORT})(?=:| is\b)", r"--\1", message)
