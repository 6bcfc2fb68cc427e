"""--ip-adapter with --ip-image, --ip-mask and --ip-encoder: each belongs to the --ip-adapter before it."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastsd.cli import models
from fastsd.cli.repeat import GivenImage
from fastsd.errors import FastsdError, about
from fastsd.image.files import open_image, open_mask
from fastsd.parameters.kinds import Number
from fastsd.parameters.rows import MAX_IMAGE_PROMPT_SCALE

if TYPE_CHECKING:
    from fastsd.generate.image_prompts import ImagePrompt
    from fastsd.pipeline import Pipeline

SCALE = Number(low=-MAX_IMAGE_PROMPT_SCALE, high=MAX_IMAGE_PROMPT_SCALE)


@dataclass
class ChosenPrompt:
    """One image prompt as the flags give it."""

    file: str
    scale: float
    encoder: str | None = None
    images: list[tuple[Image.Image, GivenImage]] = field(default_factory=list)
    mask: tuple[Image.Image, GivenImage] | None = None


def read(args: argparse.Namespace, before: dict[str, Any]) -> list[ChosenPrompt]:
    """What the flags say of image prompts, with the images read; nothing is loaded yet.

    Args:
        before: the settings of the repeated image.

    Raises:
        FastsdError: an image that is missing or malformed, a flag before its --ip-adapter, an adapter without an image,
            or an image that was generated with adapters which are not given.
    """
    chosen: list[ChosenPrompt] = []
    for flag, value in args.ip_given or ():
        if flag == "ip_adapter":
            chosen.append(ChosenPrompt(*split(value)))
            continue
        if not chosen:
            raise FastsdError("given before {ip_adapter}, to which it belongs", argument=flag, value=value)
        if flag == "ip_encoder":
            chosen[-1].encoder = value
            continue
        given = GivenImage.read(value, flag)
        with about(flag, value):
            if flag == "ip_mask":
                chosen[-1].mask = open_mask(given.data, flag), given
            else:
                chosen[-1].images.append((open_image(given.data, flag), given))
    for one in chosen:
        if not one.images:
            raise FastsdError("given without {ip_image}, an image that it reads", argument="ip_adapter", path=one.file)
    old = [one for one in before.get("image_prompts") or () if isinstance(one, dict)]
    if len(old) > len(chosen):
        raise FastsdError(
            f"it was generated with {{ip_adapter}} {str(old[len(chosen)].get('name'))[:80]!r}; give that and its "
            "images again",
            argument="from_image",
            path=args.from_image,
        )
    return chosen


def split(given: str) -> tuple[str, float]:
    """`FILE` or `FILE:scale`; a colon in the name of an existing file belongs to the name."""
    path, colon, text = given.rpartition(":")
    if not colon or os.path.exists(given):
        return given, 1.0
    try:
        return path, SCALE.parse(text)
    except FastsdError:
        raise FastsdError(f"{text[:40]!r} should be a scale, {SCALE}", argument="ip_adapter", path=given) from None


def load(
    pipe: Pipeline,
    chosen: list[ChosenPrompt],
    allow_pickle: bool,
    loaded: dict[tuple[str, str | None], Any] | None = None,
) -> tuple[list[ImagePrompt], list[dict[str, Any]]]:
    """The image prompts, each file loaded once, and what metadata says of them.

    loaded: adapters of earlier calls, by file and encoder; new ones are added.

    Raises:
        FastsdError: a file that is missing, malformed or for another family of models.
    """
    from fastsd.generate.image_prompts import ImagePrompt
    from fastsd.weights.hub.locate import locate_file

    adapters: dict[tuple[str, str | None], Any] = {} if loaded is None else loaded
    prompts, settings = [], []
    for one in chosen:
        key = (one.file, one.encoder)
        with about("ip_adapter"):
            place = locate_file(one.file)
        if key not in adapters:
            with about("ip_adapter"):
                adapters[key] = pipe.load_ip_adapter(place.path, one.encoder, allow_pickle)
        mask = None if one.mask is None else one.mask[0]
        prompts.append(ImagePrompt(adapters[key], [image for image, _ in one.images], one.scale, mask))
        settings.append(
            {
                **models.named(place, one.file),
                "images": [given.as_setting() for _, given in one.images],
                "mask": None if one.mask is None else one.mask[1].as_setting(),
                "scale": one.scale,
            }
        )
    return prompts, settings


def differences(before: dict[str, Any], settings: list[dict[str, Any]]) -> list[str]:
    """Notes on adapters, images and scales that differ from those of the repeated image."""
    notes = []
    for old, now in zip(before.get("image_prompts") or (), settings, strict=False):
        if not isinstance(old, dict):
            continue
        if any(old.get(key) != now.get(key) for key in ("fingerprint", "revision")):
            notes.append(
                f"--ip-adapter is another file than {str(old.get('name'))[:80]!r}, which was used the first time"
            )
        if old.get("images") != now["images"] or old.get("mask") != now["mask"]:
            notes.append("--ip-image or --ip-mask is another image than the first time")
        if old.get("scale") != now["scale"]:
            notes.append(f"the scale of --ip-adapter was {old.get('scale')} the first time")
    return notes
