"""From a line's fields to a request: the arguments of a call, checked as far as that needs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd.batch.lines import ID, UPSCALE, AskedLine, BadLine
from fastsd.errors import FastsdError, about
from fastsd.generate.together import count_of, shape_of
from fastsd.image.control_maps import MAPS
from fastsd.image.infotext import UPSCALERS
from fastsd.parameters import PARAMETERS, check_call, check_seeds
from fastsd.parameters.kinds import RANDOM_SEED, SHARE, Function, Value, Whole
from fastsd.sampling.samplers import resolve
from fastsd.text.syntax import LoraTag, take_loras
from fastsd.upscale import SCALES, TILES
from fastsd.weights.hub.hub_id import parse_hub_id

IMAGES = ("image", "mask_image", "depth_image")
OF_JOB = {"batch_size": "--batch-size"}  # parameters of a call that the job has for all
OF_PYTHON = {"return_dict", "output_type"} | {
    row.name
    for row in PARAMETERS.values()
    if isinstance(row.kind, Value | Function) and row.name not in ("controls", "image_prompts")
}
CONTROL_IMAGES = ("image", *MAPS)  # of a control: its map, or an image of which one is made
CONTROL_PARTS = ("weight", "start", "end")
HIRES = "hires_upscaler"
WINDOW = 1024  # lines among which those of one shape are sought


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for.

    Attributes:
        line: its number.
        fields: as they were read, for the manifest.
        arguments: of the call, with a seed; images and upscalers are paths.
        controls: of each, {"net": PATH, "image", "canny" or "color": PATH, "weight", "start", "end"}.
        loras: the tags in its prompt.
        image_prompts: of each, {"adapter": PATH, "images": [PATH, ...], "encoder": PATH, "mask": PATH, "scale"}.
        upscale: how each image is enlarged once it is there, {"upscaler": PATH, "scale", "tile"}.
    """

    line: int
    fields: dict[str, Any]
    arguments: dict[str, Any]
    controls: tuple[dict[str, Any], ...] = ()
    loras: tuple[LoraTag, ...] = field(default=())
    image_prompts: tuple[dict[str, Any], ...] = ()
    upscale: dict[str, Any] | None = None

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """Requests of equal shape run in one batch; None: it runs alone."""
        shape = None if self.controls or self.image_prompts else shape_of(self.arguments)
        return None if shape is None else (self.loras, shape)

    @property
    def count(self) -> int:
        """How many images."""
        return count_of(self.arguments)


def make_request(asked: AskedLine, folder: Path, job_seed: int) -> BatchRequest:
    """The request of a line.

    Args:
        folder: from which its relative paths count.
        job_seed: a line without a seed draws its own from this one.

    Raises:
        FastsdError: a field that is wrong whatever the model.
    """
    fields = {name: value for name, value in asked.fields.items() if value is not None}
    given = {name: _as_whole(name, value) for name, value in fields.items() if name not in (ID, UPSCALE)}
    if not isinstance(fields.get(ID, ""), str | int):
        raise FastsdError("it should be a text or a whole number", argument=ID, value=fields[ID])
    for name in given:
        if name in OF_PYTHON:
            raise FastsdError("a file cannot hold it; Python alone takes it", argument=name)
        if name in OF_JOB:
            raise FastsdError(f"it belongs to the job: {OF_JOB[name]}", argument=name)
        if name in PARAMETERS and PARAMETERS[name].of == "load":
            raise FastsdError(
                f"it belongs to the job, whose lines have one model: {PARAMETERS[name].flag}", argument=name
            )
    for name in ("prompt", "negative_prompt"):
        _check_text(given.get(name, ""), name)
    if "prompt" not in given:
        raise FastsdError("the line has none", argument="prompt")
    controls = tuple(_read_controls(given.pop("controls", ()), folder))
    image_prompts = tuple(_read_image_prompts(given.pop("image_prompts", ()), folder))
    upscale = _read_upscale(fields[UPSCALE], folder) if UPSCALE in fields else None
    files = {}
    if given.get(HIRES, "latent") not in tuple(UPSCALERS):
        files[HIRES] = _upscaler_file(given[HIRES], folder, HIRES, f"; give {', '.join(UPSCALERS)} or a file")
        given[HIRES] = "lanczos"  # which the rules of a call take as they do a network
    checked = check_call(given, ("refiner",))  # whether the job has one, the call itself checks
    arguments = {name: checked[name] for name in given} | files
    if "sampler" in given or "schedule" in given:
        names = resolve(given.get("sampler", "euler"), given.get("schedule", "default"))
        arguments |= {name: value for name, value in zip(("sampler", "schedule"), names, strict=True) if name in given}
    if arguments.get("seed", RANDOM_SEED) == RANDOM_SEED:
        arguments["seed"] = own_seed(job_seed, asked.number)
    if arguments.get("subseed_strength") and arguments.get("subseed", RANDOM_SEED) == RANDOM_SEED:
        arguments["subseed"] = own_seed(own_seed(job_seed, 0), asked.number)  # lines count from 1: no line has that one
    check_seeds(arguments["seed"], count_of(arguments))
    for name in IMAGES:
        if name in arguments:
            arguments[name] = _path(arguments[name], folder, name)
    tags = () if arguments.get("prompt_syntax") == "plain" else take_loras(arguments["prompt"])[1]
    return BatchRequest(asked.number, fields, arguments, controls, tuple(tags), image_prompts, upscale)


def _as_whole(name: str, value: Any) -> Any:
    """7.0 as 7 where a parameter takes whole numbers: tables hold such a column as floats where some cells are empty.
    Above 2^53 a float stands for several whole numbers, and is left to be refused."""
    whole = name in PARAMETERS and isinstance(PARAMETERS[name].kind, Whole)
    return int(value) if whole and isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise FastsdError("it should be one text; each prompt has a line of its own", argument=name, value=value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FastsdError("the text is not valid UTF-8", argument=name) from None


def own_seed(job_seed: int, line: int) -> int:
    """The seed of a line that leaves it to chance: the same where the job goes on after a kill."""
    return int.from_bytes(hashlib.sha256(f"{job_seed} {line}".encode()).digest()[:4], "big")


def _path(value: Any, folder: Path, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise FastsdError("it should be the path of an image", argument=name, value=value)
    return str(folder / value)


def _read_controls(given: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """The ControlNets of a line, with their paths made whole."""
    if not isinstance(given, list | tuple):
        raise FastsdError('it should be a list of objects, {"net": PATH, "image": PATH}', argument="controls")
    from fastsd.generate.control import WEIGHT

    kinds = {"weight": WEIGHT, "start": SHARE, "end": SHARE}
    for k, one in enumerate(given):
        with about(f"controls[{k}]"):
            right = '{"net": PATH, "image": PATH}, or "canny" or "color", with "weight", "start", "end"'
            if not isinstance(one, dict) or not one.keys() <= {"net", *CONTROL_IMAGES, *CONTROL_PARTS}:
                raise FastsdError(f"it should be {right}")
            images = [name for name in CONTROL_IMAGES if name in one]
            if len(images) != 1:
                raise FastsdError(f"it should have one of {', '.join(CONTROL_IMAGES)}: {right}")
            if not isinstance(one.get("net"), str):
                raise FastsdError("net should be the path of a ControlNet or T2I-Adapter, or a hub id")
            found = {"net": _file_or_hub_id(one["net"], folder)}
            found[images[0]] = _path(one[images[0]], folder, f"controls[{k}]")
            yield found | {part: kinds[part].check(one[part]) for part in CONTROL_PARTS if part in one}


def _read_image_prompts(given: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """The image prompts of a line, with their paths made whole."""
    right = '{"adapter": PATH, "image": PATH}, or "images": [PATH, ...], with "scale", "mask", "encoder"'
    if not isinstance(given, list | tuple):
        raise FastsdError(f"it should be a list of objects, {right}", argument="image_prompts")
    from fastsd.generate.image_prompts import SCALE

    for k, one in enumerate(given):
        with about(f"image_prompts[{k}]"):
            known = {"adapter", "image", "images", "scale", "mask", "encoder"}
            if not isinstance(one, dict) or not one.keys() <= known or ("image" in one) == ("images" in one):
                raise FastsdError(f"it should be {right}")
            for name in {"adapter", "encoder"} & {"adapter", *one}:
                if not isinstance(one.get(name), str):
                    raise FastsdError(f"{name} should be the path of a file, or a hub id")
            images = one["images"] if "images" in one else [one["image"]]
            if not isinstance(images, list) or not images:
                raise FastsdError("images should be a list of paths")
            found: dict[str, Any] = {
                name: _file_or_hub_id(one[name], folder) for name in ("adapter", "encoder") if name in one
            }
            found["images"] = [_path(image, folder, f"image_prompts[{k}].images") for image in images]
            if "mask" in one:
                found["mask"] = _path(one["mask"], folder, f"image_prompts[{k}].mask")
            with about(f"image_prompts[{k}].scale"):
                found["scale"] = SCALE.check(one.get("scale", 1.0))
            yield found


def _read_upscale(given: Any, folder: Path) -> dict[str, Any]:
    """How a line's images are enlarged, with the path made whole."""
    kinds = {"scale": SCALES, "tile": TILES}
    if not isinstance(given, dict) or "upscaler" not in given or not given.keys() <= {"upscaler", *kinds}:
        raise FastsdError('it should be {"upscaler": PATH}, with "scale", "tile"', argument=UPSCALE)
    found = {"upscaler": _upscaler_file(given["upscaler"], folder, f"{UPSCALE}.upscaler")}
    for name, kind in kinds.items():
        if name in given:
            with about(f"{UPSCALE}.{name}"):
                found[name] = kind.check(given[name])
    return found


def _upscaler_file(given: Any, folder: Path, argument: str, hint: str = "") -> str:
    """The file of an upscaler, or a hub id; refused before the model is loaded where it is neither."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise FastsdError("it should be the path of an upscaler, or a hub id", argument=argument, value=given)
    if not (folder / given).exists() and parse_hub_id(given) is None:
        raise FastsdError(f"no such file{hint}", argument=argument, path=folder / given)
    return _file_or_hub_id(given, folder)


def _file_or_hub_id(given: str, folder: Path) -> str:
    return str(folder / given) if (folder / given).exists() else given


def in_batches(lines: Iterable[BatchRequest | BadLine], size: int) -> Iterator[list[BatchRequest] | BadLine]:
    """Requests of one shape together, up to `size` images, the oldest first; bad lines as they come.

    `WINDOW` requests wait at most, so that a long file takes no more memory than a short one.
    """
    waiting: dict[Any, list[BatchRequest]] = {}
    count = 0
    for line in lines:
        if isinstance(line, BadLine):
            yield line
            continue
        shape = line.shape
        waiting.setdefault(line.line if shape is None else shape, []).append(line)
        count += 1
        if count == WINDOW:
            taken = _take_oldest(waiting, size)
            count -= len(taken)
            yield taken
    while waiting:
        yield _take_oldest(waiting, size)


def _take_oldest(waiting: dict[Any, list[BatchRequest]], size: int) -> list[BatchRequest]:
    shape = min(waiting, key=lambda one: waiting[one][0].line)
    group, images, n = waiting[shape], 0, 0
    while n < len(group) and (n == 0 or images + group[n].count <= size):
        images += group[n].count
        n += 1
    waiting[shape] = group[n:]
    if not waiting[shape]:
        del waiting[shape]
    return group[:n]
