"""--from-image: the settings that an image was generated with, as flags that were not given."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd.cli import models
from fastsd.errors import FastsdError, about, describe
from fastsd.files import fingerprint
from fastsd.image.files import read_file, read_text
from fastsd.image.infotext import UPSCALERS
from fastsd.image.metadata import read_texts
from fastsd.parameters import PARAMETERS
from fastsd.parameters.kinds import Number, Parameter
from fastsd.sampling.names import refusal
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES, resolve, spellings

PROGRAMS = {"a1111": "A1111", "comfy": "ComfyUI", "diffusers": "diffusers"}
UNKNOWN = "its precision and its GPU are not stored, so pixels may differ"
LISTS = ("timesteps", "sigmas")  # which say where the steps are, and what else says that or counts them:
PLACING = ("num_inference_steps", "hires_steps", "schedule", "spacing")
IMAGES = [PARAMETERS[name] for name in ("image", "mask_image", "depth_image")]


@dataclass(frozen=True)
class GivenImage:
    """An image file of the user: its bytes, and how metadata tells it from others."""

    data: bytes
    path: str
    sha256: str

    @classmethod
    def read(cls, path: str, argument: str) -> GivenImage:
        data = read_file(path, argument)
        return cls(data, path, fingerprint(data))

    def as_setting(self) -> dict[str, str]:
        return {"name": Path(self.path).name, "sha256": self.sha256}


def fill_in(args: argparse.Namespace) -> tuple[dict[str, Any], list[str], set[str]]:
    """Fill in what `args` leaves open from the image `args.from_image`.

    Returns:
        The image's settings, to compare with; notes for the user; and the names of what was filled in.

    Raises:
        FastsdError: it holds no settings, or they are out of range, or its model or starting image must be given.
    """
    filled: set[str] = set()
    with about("from_image", args.from_image):
        settings, others = read_texts(read_text(args.from_image, "from_image"))
        notes = _notes_on(settings, others)
        _check_images(args, settings)
        _check_unread(args, settings.get("unread", {}))
        _check_upscaler(args, settings)
        if settings.get("hires_scale") is not None and args.image is not None:
            notes.append("not repeated: --hires, as --image starts from an image")
        models.fill_in(args, settings, notes)
        _check_names(args, settings)
        kind_changed = args.few_step not in (None, settings.get("few_step"))
        outdated = _outdated(args, settings, notes)
        for row in PARAMETERS.values():
            value = None if row.name in outdated else settings.get(row.name)
            if row.is_repeated and value is not None and getattr(args, row.name) is None:
                if value != row.default and (lacking := _lacking(row, args)):
                    notes.append(f"not repeated: {row.flag}, as there is no {lacking}")
                if _applies(row, args, settings, kind_changed):
                    setattr(args, row.name, _checked(row, value))
                    filled.add(row.name)
    return settings, notes, filled


@contextmanager
def naming(path: str, filled: set[str]) -> Iterator[None]:
    """Errors raised inside about a setting that came from an image name the image, in place of a flag that nobody
    gave."""
    try:
        yield
    except FastsdError as error:
        if error.argument not in filled:
            raise
        message = f"its {describe(error)}"
        raise FastsdError(message, argument="from_image", path=path) from error


def _notes_on(settings: dict[str, Any], others: dict[str, str]) -> list[str]:
    """Which of another program's settings have no effect here."""
    ignored = f"not repeated: {', '.join(others)}" if others else ""
    if settings.get("like") not in (None, "none") and "version" not in settings:
        return [f"repeated by the rules of {PROGRAMS[settings['like']]}; {UNKNOWN}{ignored and '; '}{ignored}"]
    if "version" not in settings and "device" not in settings:
        return [f"the settings are another program's; the image will differ{ignored and '; '}{ignored}"]
    return [ignored] if ignored else []


def _check_images(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse to repeat an image without the image that it was generated from."""
    for row in IMAGES:
        if settings.get(row.key) and getattr(args, row.name) is None:
            raise FastsdError(f"it was generated with {{{row.name}}} {_named(settings[row.key])}; give that file again")
    has_strength = settings.get("strength") is not None or "strength" in settings.get("unread", {})
    if has_strength and args.image is None:
        raise FastsdError("it was generated from another image; give that with {image}")


def _check_unread(args: argparse.Namespace, unread: dict[str, str]) -> None:
    """Refuse to guess a setting that a graph leaves open, unless a flag says it or makes it superfluous."""
    for name, reason in unread.items():
        placed = name in PLACING and any(getattr(args, other) is not None for other in LISTS)
        if getattr(args, name) is None and not placed and not (name == "schedule" and args.sampler is not None):
            raise FastsdError(f"{reason}; give {{{name}}}")


def _check_upscaler(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse to repeat a second pass without the file that enlarged between the two, or what stands for it."""
    name = settings.get("hires_upscaler")
    repeats = settings.get("hires_scale") is not None and args.image is None
    if not repeats or name is None or name in UPSCALERS or args.hires_upscaler is not None:
        return
    if name.startswith("Latent ("):
        raise FastsdError(_lacks("hires_upscaler", name, "latent"))
    raise FastsdError(f"it was generated with {{hires_upscaler}} {name[:80]!r}; give that file, or lanczos")


def _lacks(what: str, wanted: str, near: str) -> str:
    """That fastsd lacks a thing of that name, and which one is the nearest."""
    thing = what.replace("_", " ")
    return (
        f"it was generated with the {thing} {wanted[:60]!r}, which fastsd lacks; the nearest is {near}: give {{{what}}}"
    )


def _check_names(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse a sampler or a schedule that fastsd lacks, by its name in the image, with the nearest that it has."""
    tables: dict[str, dict[str, str]] = {
        "sampler": {name: entry.label for name, entry in SAMPLERS.items()},
        "schedule": SCHEDULES,
    }
    for what, labels in tables.items():
        wanted = settings.get(what)
        if wanted is None or getattr(args, what) is not None or (what == "schedule" and args.sampler is not None):
            continue
        try:
            resolve(wanted if what == "sampler" else "euler", wanted if what == "schedule" else "default")
        except FastsdError:
            found = {text.lower(): name for name, label in labels.items() for text in (name, label)}
            near = found[difflib.get_close_matches(wanted.lower(), found, n=1, cutoff=0)[0]]
            why, near = (refusal(wanted, spellings()) if what == "sampler" else None) or ("", near)
            raise FastsdError(f"{_lacks(what, wanted, near)}{f' ({why})' if why else ''}") from None


def _lacking(row: Parameter, args: argparse.Namespace) -> str:
    """The flag that a setting needs and that is missing, or nothing: also where another flag excludes it, which is
    said."""
    needed = PARAMETERS[row.needs[0]] if row.needs is not None else None
    if needed is None or _is_met(needed.name, args):
        return ""
    excluded = needed.excludes is not None and getattr(args, needed.excludes[0]) is not None
    return "" if excluded else needed.flag


def _is_met(needed: str, args: argparse.Namespace) -> bool:
    """Whether a parameter that others need is given, or one that counts as it."""
    names = [needed, *(row.name for row in PARAMETERS.values() if row.counts_as == needed)]
    return any(getattr(args, name) is not None for name in names)


def _outdated(args: argparse.Namespace, settings: dict[str, Any], notes: list[str]) -> tuple[str, ...]:
    """The settings that no longer hold since a flag says in another way where the steps are. Of a list that is not
    repeated there is a note."""
    if any(getattr(args, name) is not None for name in LISTS):
        return (*LISTS, *PLACING)
    given = [name for name in PLACING if getattr(args, name) not in (None, settings.get(name))]
    for name in (name for name in LISTS if given and settings.get(name) is not None):
        notes.append(f"not repeated: {PARAMETERS[name].flag}, as {PARAMETERS[given[0]].flag} is given")
    return LISTS if given else ()


def _applies(row: Parameter, args: argparse.Namespace, settings: dict[str, Any], kind_changed: bool) -> bool:
    """Whether a setting still has its meaning beside the flags."""
    if row.needs is not None and not _is_met(row.needs[0], args):
        return False
    if row.excludes is not None and getattr(args, row.excludes[0]) is not None:
        return False
    if row.few_step and kind_changed:
        return False  # it belongs to the kind of model that was replaced
    of_the_sampler = row.name in ("schedule", "spacing")
    return not of_the_sampler or args.sampler == settings.get("sampler")


def _checked(row: Parameter, value: Any) -> Any:
    """A setting within the limits of its flag."""
    if not isinstance(row.kind, Number):
        return value
    try:
        return row.kind.parse(str(value))
    except FastsdError as error:
        raise FastsdError(f"its {row.name} is {str(value)[:60]!r}; {error.message}") from None


def _named(wanted: dict[str, Any]) -> str:
    return f"{str(wanted.get('name'))[:80]!r} (sha256 {str(wanted.get('sha256'))[:12]}...)"


def differences(settings: dict[str, Any], now: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Notes on what differs from the first time, and whose effect a user may not expect."""
    notes = []
    for row in IMAGES:
        before, after = settings.get(row.key), now.get(row.key)
        if before and after and before.get("sha256") != after["sha256"]:
            notes.append(f"{row.flag} is another file than {_named(before)}, which was used the first time")
    notes += models.differences(settings, now)
    if args.device is None and settings.get("device") not in (None, now.get("device")):
        notes.append(
            f"generated on {now.get('device')} instead of {settings['device'][:20]}; pixels may differ slightly"
        )
    elif now.get("device") == "cuda" and settings.get("batch_size", 1) != now.get("batch_size"):
        notes.append(f"first generated in a batch of {settings.get('batch_size')}; pixels may differ slightly")
    return notes
