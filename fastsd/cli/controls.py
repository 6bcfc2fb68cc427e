"""--control and related flags: ControlNets and T2I-Adapters with their images. The k-th of each flag belongs to the
k-th --control."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastsd.cli import models
from fastsd.cli.flags import CLI
from fastsd.cli.repeat import GivenImage
from fastsd.errors import FastsdError, about
from fastsd.image.control_maps import MAPS
from fastsd.image.files import open_image

if TYPE_CHECKING:
    from fastsd.generate.control import Control
    from fastsd.pipeline import Pipeline

PARTS = ("weight", "start", "end")  # of a control, each a flag; `fastsd.Control` has the defaults


@dataclass(frozen=True)
class ChosenControl:
    """One ControlNet as the flags give it."""

    net: str
    image: Image.Image
    given: GivenImage
    map_kind: str | None  # of `MAPS`, which was made of the image; None: the image is the map
    parts: dict[str, float]

    @classmethod
    def make(cls, net: str, image: Image.Image, given: GivenImage, name: str, parts: dict[str, float]) -> ChosenControl:
        """With the map that its image's name asks for: "image" is one, and of the images of `MAPS` it is made.

        Raises:
            FastsdError: it cannot be made.
        """
        if name not in MAPS:
            return cls(net, image, given, None, parts)
        return cls(net, MAPS[name](image), given, name, parts)


def read(args: argparse.Namespace, before: dict[str, Any]) -> list[ChosenControl]:
    """What the flags say of ControlNets, with the images read; nothing is loaded yet.

    Args:
        before: the settings of the repeated image, whose weights and shares of the steps are the defaults.

    Raises:
        FastsdError: an image that is missing or malformed, more values than ControlNets, or an image generated with
            ControlNets that are not given.
    """
    nets, images = args.control or [], args.control_images or []
    old = _earlier(before)
    if len(old) > len(nets):
        name = str(old[len(nets)].get("name"))[:80]
        raise FastsdError(
            f"it was generated with {{control}} {name!r}; give that and its image again",
            argument="from_image",
            path=args.from_image,
        )
    if len(images) != len(nets):
        raise FastsdError(
            f"{len(nets)} given with {len(images)} images; each needs a {{control_image}} (or "
            "{control_canny}, {control_color}), in the same order",
            argument="control",
        )
    for part in PARTS:
        values = getattr(args, f"control_{part}") or []
        if len(values) > len(nets):
            raise FastsdError(f"given {len(values)} times for {len(nets)} of {{control}}", argument=f"control_{part}")
    return [_choose(args, k, old[k] if k < len(old) else {}) for k in range(len(nets))]


def _earlier(before: dict[str, Any]) -> list[dict[str, Any]]:
    """The controls of the repeated image."""
    return [control for control in before.get("controls") or () if isinstance(control, dict)]


def _choose(args: argparse.Namespace, k: int, old: dict[str, Any]) -> ChosenControl:
    argument, path = args.control_images[k]
    given = GivenImage.read(path, argument)
    parts = {}
    for part in PARTS:
        values = getattr(args, f"control_{part}") or []
        if k < len(values):
            parts[part] = values[k]
        elif isinstance(old.get(part), int | float):
            parts[part] = _earlier_part(args, f"control_{part}", old[part])
    with about(argument, path):
        image = open_image(given.data, argument)
        return ChosenControl.make(args.control[k], image, given, argument.removeprefix("control_"), parts)


def _earlier_part(args: argparse.Namespace, name: str, value: Any) -> Any:
    """A number of the repeated image's control, within the limits of its flag."""
    try:
        return CLI[name].kind.check(value)
    except FastsdError as error:
        message = f"its {{{name}}} is {value!r}; {error.message}"
        raise FastsdError(message, argument="from_image", path=args.from_image) from None


def load(
    pipe: Pipeline, chosen: list[ChosenControl], allow_pickle: bool, loaded: dict[str, Any] | None = None
) -> tuple[list[Control], list[dict[str, Any]]]:
    """The controls, each file loaded once, and what metadata says of them.

    loaded: files that earlier calls loaded, with their places; new ones are added.

    Raises:
        FastsdError: a file that is missing, malformed or for another family of models.
    """
    import torch

    from fastsd.generate.control import Control
    from fastsd.weights.hub.locate import locate_controlnet

    nets: dict[str, Any] = {} if loaded is None else loaded
    controls, settings = [], []
    for choice in chosen:
        if choice.net not in nets:
            with about("control"):
                place = locate_controlnet(choice.net, pipe.dtype != torch.float32)
                nets[choice.net] = (pipe.load_controlnet(place.path, allow_pickle), place)
        net, place = nets[choice.net]
        control = Control(net, choice.image, **choice.parts)
        controls.append(control)
        settings.append(
            {
                **models.named(place, choice.net),
                "image": choice.given.as_setting(),
                "map": choice.map_kind,
                **{part: getattr(control, part) for part in PARTS},
            }
        )
    return controls, settings


def differences(before: dict[str, Any], settings: list[dict[str, Any]]) -> list[str]:
    """Notes on ControlNets and control images that differ from those of the repeated image."""
    notes = []
    for old, now in zip(_earlier(before), settings, strict=False):
        if any(old.get(key) != now.get(key) for key in ("fingerprint", "revision")):
            notes.append(f"--control is another file than {str(old.get('name'))[:80]!r}, which was used the first time")
        image = old.get("image")
        other = isinstance(image, dict) and image.get("sha256") != now["image"]["sha256"]
        if other or _map_kind(old) != now["map"]:
            notes.append("--control-image is another image than the first time")
    return notes


def _map_kind(old: dict[str, Any]) -> Any:
    """Of a stored control. Earlier versions made edges alone, and stored whether they had."""
    return old["map"] if "map" in old else "canny" if old.get("edges") else None
