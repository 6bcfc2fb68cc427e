"""Calls that share a batch: which may, the one call that stands for them, and whose images and notes are whose.

The server's queue and a batch job decide by the same rule. An image is the one that its own call gives, since noise and
conditioning depend on nothing else (docs/architecture.md). torch is imported where a call is made, not before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.generate.result import Result

# Arguments that each image of a batch may have for itself; calls that differ elsewhere run one after another.
OF_IMAGES = frozenset(("prompt", "negative_prompt", "seed", "num_images_per_prompt", "batch_size"))
# Arguments with which a call runs alone: images, and noise that is not drawn for each image by its seed.
ALONE = frozenset(
    (
        "image",
        "mask_image",
        "depth_image",
        "outpaint",
        "controls",
        "image_prompts",
        "subseed",
        "subseed_strength",
        "ensd",
    )
)


def shape_of(arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Calls of equal shape may share a batch; None: it runs alone.

    Args:
        arguments: of `fastsd.Pipeline.__call__`; one prompt.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    noise = given.get("noise", {"none": "cpu"}.get(given.get("like", "none"), "other"))
    if ALONE & given.keys() or noise != "cpu" or isinstance(given.get("guidance_scale"), list | tuple):
        return None
    return tuple(sorted((name, repr(value)) for name, value in given.items() if name not in OF_IMAGES))


def count_of(arguments: Mapping[str, Any]) -> int:
    """How many images a call of one prompt makes."""
    return int(arguments.get("num_images_per_prompt") or 1)


def join(calls: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """The arguments of one call for calls of one shape: a prompt, a negative prompt and a generator for each image.

    Args:
        calls: the arguments of each, with a seed.
        size: images that run together at most.
    """
    first = calls[0]
    if len(calls) == 1:
        return {**first, "batch_size": min(size, first.get("batch_size") or size)}
    import torch

    shared = {name: value for name, value in first.items() if name not in ("seed", "num_images_per_prompt")}
    images = [(own, k) for own in calls for k in range(count_of(own))]
    return shared | {
        "prompt": [own["prompt"] for own, _ in images],
        "negative_prompt": [own.get("negative_prompt") or "" for own, _ in images],
        "generator": [torch.Generator("cpu").manual_seed(own["seed"] + k) for own, k in images],
        "batch_size": size,
    }


def split(
    calls: Sequence[Mapping[str, Any]], facts: Sequence[Mapping[str, Any]], result: Result
) -> Iterator[tuple[list[Any], list[dict[str, Any]], list[str]]]:
    """The images of each call, the settings of each image, and the call's notes; an interrupted call has fewer images.

    Calls may come from different users: none gets a note on another's texts.

    Args:
        facts: of each call, what its images' files say besides the arguments.
        result: of the call that `join` gave.
    """
    on_texts, start = {note for each in result.own_notes for note in each}, 0
    for own, said in zip(calls, facts, strict=True):
        end = start + count_of(own)
        images = result.images[start:end]
        texts = {name: own.get(name) or "" for name in ("prompt", "negative_prompt")}
        shared = {**result.parameters, **said, **texts, "batch_size": min(count_of(own), len(result.images))}
        on_own_texts = {note for each in result.own_notes[start:end] for note in each}
        notes = [note for note in result.notes if note not in on_texts or note in on_own_texts]
        yield images, [shared | each for each in result.own[start:end]], notes
        start = end
