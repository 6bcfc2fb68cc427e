"""--from-image: the settings that a picture was drawn with, as flags that were not given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.cli import flags, models
from fastsd.errors import FastsdError
from fastsd.files import fingerprint
from fastsd.image.files import read_file, read_text
from fastsd.image.metadata import read_texts

# No settings of one picture; or several, which `fastsd.cli.controls` takes from there.
OTHERS = ("count", "batch_size", "control_weight", "control_start", "control_end")
SETTINGS = (
    *(name for name in flags.NUMBERS if name not in OTHERS),
    "prompt",
    "negative_prompt",
    "sampler",
    "schedule",
    "vae_tiling",
    "prompt_syntax",
    "few_step",
    "hires_upscaler",
)
OF_SECOND_PASS = ("hires_scale", "hires_strength", "hires_steps", "hires_upscaler")
OF_FEW_STEPS = ("num_inference_steps", "guidance_scale", "sampler", "schedule")


@dataclass(frozen=True)
class Given:
    """A picture that the user gave: its bytes, and how metadata tells it from others."""

    data: bytes
    name: str
    sha256: str

    @classmethod
    def read(cls, path: str, flag: str) -> Given:
        data = read_file(path, flag)
        return cls(data, Path(path).name, fingerprint(data))

    def as_setting(self) -> dict[str, str]:
        return {"name": self.name, "sha256": self.sha256}


def fill_in(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Fill in what `args` leaves open from the picture `args.from_image`.

    Returns:
        The picture's settings, to compare with, and notes for the user.

    Raises:
        FastsdError: it holds no settings, or they are out of range, or its model or starting picture must be given.
    """
    where = f"--from-image {args.from_image}"
    texts = read_text(args.from_image, "--from-image")
    try:
        settings, others = read_texts(texts)
    except FastsdError as error:
        raise FastsdError(f"{where}: {error}") from None
    notes = []
    ignored = f"not repeated: {', '.join(others)}" if others else ""
    if "version" not in settings and "device" not in settings:
        notes.append(f"the settings are another program's; the picture will differ{ignored and '; '}{ignored}")
    elif ignored:
        notes.append(ignored)
    for flag, name in (("--image", "image"), ("--mask", "mask")):
        wanted = settings.get(name)
        if wanted and getattr(args, name) is None:
            raise FastsdError(f"{where}: it was drawn with {flag} {_named(wanted)}; give that file again")
    if settings.get("strength") is not None and args.image is None:
        raise FastsdError(f"{where}: it was drawn from another picture; give that with --image")
    if settings.get("hires_scale") is not None and args.image is not None:
        notes.append("not repeated: --hires, as --image starts from a picture")
    models.fill_in(args, settings, where, notes)
    other_kind = args.few_step not in (None, settings.get("few_step"))
    for name in SETTINGS:
        value = settings.get(name)
        if value is None or getattr(args, name) is not None:
            continue
        if name in OF_SECOND_PASS and (args.image is not None or (name != "hires_scale" and args.hires_scale is None)):
            continue  # it belongs to pictures from text alone, and to a scale
        if name == "refiner_switch" and args.refiner is None:
            continue  # the refiner went with the model that was replaced
        if name in OF_FEW_STEPS and other_kind:
            continue  # they belong to the kind of model that was replaced
        if name == "schedule" and args.sampler != settings.get("sampler"):
            continue  # it belongs to the sampler that was replaced
        setattr(args, name, flags.checked(name, value, where))
    return settings, notes


def _named(wanted: dict[str, Any]) -> str:
    return f"{str(wanted.get('name'))[:80]!r} (sha256 {str(wanted.get('sha256'))[:12]}...)"


def differences(settings: dict[str, Any], now: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Notes on what is not as it was the first time, and whose effect a user may not expect."""
    notes = []
    for name, said in (("image", "--image is another file"), ("mask", "--mask is another file")):
        before, after = settings.get(name), now.get(name)
        if before and after and before.get("sha256") != after["sha256"]:
            notes.append(f"{said} than {_named(before)}, which drew the picture")
    notes += models.differences(settings, now)
    if args.device is None and settings.get("device") not in (None, now.get("device")):
        notes.append(f"drawn on {now.get('device')} instead of {settings['device'][:20]}; pixels may differ slightly")
    elif now.get("device") == "cuda" and settings.get("batch_size", 1) != now.get("batch_size"):
        notes.append(f"first drawn in a batch of {settings.get('batch_size')}; pixels may differ slightly")
    return notes
