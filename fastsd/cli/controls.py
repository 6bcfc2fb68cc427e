"""--control and its kin: ControlNets with their pictures. The k-th of each flag belongs to the k-th --control."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from fastsd.cli import flags, models
from fastsd.cli.repeat import Given
from fastsd.errors import FastsdError
from fastsd.image.files import draw_edges, open_image

if TYPE_CHECKING:
    from fastsd.generate.validation import Control
    from fastsd.pipeline import Pipeline

PARTS = ("weight", "start", "end")  # of a control, each a flag; what is not given is as `fastsd.Control` has it


@dataclass(frozen=True)
class Chosen:
    """One ControlNet as the flags give it."""

    net: str
    picture: Image.Image
    given: Given
    edges: bool  # the picture was made into its edges
    parts: dict[str, float]


def read(args: argparse.Namespace, before: dict[str, Any]) -> list[Chosen]:
    """What the flags say of ControlNets, with the pictures read; nothing is loaded yet.

    Args:
        before: the settings of the picture that is repeated, whose weights and steps count where none are given.

    Raises:
        FastsdError: a picture that is missing or none, more values than ControlNets, or a picture drawn with ones that
            are not given.
    """
    nets, pictures = args.control or [], args.control_images or []
    old = _earlier(before)
    if len(old) > len(nets):
        name = str(old[len(nets)].get("name"))[:80]
        raise FastsdError(
            f"--from-image {args.from_image}: it was drawn with --control {name!r}; give that and its picture again"
        )
    if len(pictures) != len(nets):
        raise FastsdError(
            f"--control: {len(nets)} given with {len(pictures)} pictures; each needs a --control-image (or "
            "--control-canny), in the same order"
        )
    for part in PARTS:
        values = getattr(args, f"control_{part}") or []
        if len(values) > len(nets):
            raise FastsdError(f"--control-{part}: given {len(values)} times for {len(nets)} of --control")
    return [_chosen(args, k, old[k] if k < len(old) else {}) for k in range(len(nets))]


def _earlier(before: dict[str, Any]) -> list[dict[str, Any]]:
    """The controls of the picture that is repeated."""
    return [one for one in before.get("controls") or () if isinstance(one, dict)]


def _chosen(args: argparse.Namespace, k: int, old: dict[str, Any]) -> Chosen:
    flag, path = args.control_images[k]
    given = Given.read(path, flag)
    picture = open_image(given.data, f"{flag} {path}")
    edges = flag == "--control-canny"
    parts = {}
    for part in PARTS:
        values = getattr(args, f"control_{part}") or []
        if k < len(values):
            parts[part] = values[k]
        elif isinstance(old.get(part), int | float):
            parts[part] = flags.checked(f"control_{part}", old[part], f"--from-image {args.from_image}")
    return Chosen(args.control[k], draw_edges(picture) if edges else picture, given, edges, parts)


def load(
    pipe: Pipeline, chosen: list[Chosen], allow_pickle: bool, in_flags: Callable[[str], str]
) -> tuple[list[Control], list[dict[str, Any]]]:
    """The controls, each file loaded once, and what metadata says of them.

    Raises:
        FastsdError: a file that is missing, malformed or for another family of models.
    """
    import torch

    from fastsd.generate.validation import Control
    from fastsd.weights.hub.locate import locate_controlnet

    nets, places, controls, settings = {}, {}, [], []
    for one in chosen:
        if one.net not in nets:
            try:
                places[one.net] = locate_controlnet(one.net, pipe.dtype != torch.float32)
                nets[one.net] = pipe.load_controlnet(places[one.net].path, allow_pickle)
            except FastsdError as error:
                raise FastsdError(f"--control {in_flags(str(error))}") from error
        control = Control(nets[one.net], one.picture, **one.parts)
        controls.append(control)
        settings.append(
            {
                **models.named(places[one.net], one.net),
                "image": one.given.as_setting(),
                "edges": one.edges,
                **{part: getattr(control, part) for part in PARTS},
            }
        )
    return controls, settings


def differences(before: dict[str, Any], settings: list[dict[str, Any]]) -> list[str]:
    """Notes on ControlNets and pictures that are not those that drew the repeated picture."""
    notes = []
    for old, now in zip(_earlier(before), settings, strict=False):
        if any(old.get(key) != now.get(key) for key in ("fingerprint", "revision")):
            notes.append(f"--control is another file than {str(old.get('name'))[:80]!r}, which drew the picture")
        image = old.get("image")
        other = isinstance(image, dict) and image.get("sha256") != now["image"]["sha256"]
        if other or old.get("edges") != now["edges"]:
            notes.append("--control-image is another picture than the one that drew the picture")
    return notes
