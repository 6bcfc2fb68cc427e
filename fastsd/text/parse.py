"""The prompts of a call, read: what each image is told in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.text.encode import SYNTAXES, Reading, read_prompt
from fastsd.text.syntax import LoraTag


@dataclass(frozen=True)
class Wording:
    """One entry for each image, unless it says otherwise.

    Attributes:
        prompts, negative_prompts: as they were given.
        texts, negative_texts: of each image, for each step from the first that runs.
        chunks: how many the texts of an image fill, positive or negative.
        syntax: that they were read in.
        loras: tags of all prompts, which say what the pipeline's adapters should be.
        embeddings: textual inversions in all texts, by name.
        notes: what the user should know.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    negative_texts: tuple[tuple[str, ...], ...]
    chunks: tuple[int, ...]
    syntax: str
    loras: tuple[LoraTag, ...]
    embeddings: tuple[str, ...]
    notes: tuple[str, ...]


def read_wording(
    components: Components, prompts: Sequence[str], negatives: Sequence[str], steps: int, syntax: Any, guided: bool
) -> Wording:
    """Read a prompt and a negative one for each image, each distinct text once.

    Args:
        components: whose tokenizers count and whose embeddings are found.
        prompts, negatives: one for each image.
        steps: of the run.
        syntax: "a1111" or "plain".
        guided: negative texts are used, and count for the chunks.

    Raises:
        FastsdError: an unknown syntax, or a text that is malformed or too long.
    """
    if syntax not in SYNTAXES:
        raise FastsdError(f"prompt_syntax is {syntax!r}; it should be one of {', '.join(SYNTAXES)}")
    read = {text: read_prompt(components, text, steps, syntax) for text in dict.fromkeys(prompts)}
    try:
        read |= {text: read_prompt(components, text, steps, syntax) for text in dict.fromkeys(negatives)}
    except FastsdError as error:
        raise FastsdError(f"negative_{error}" if str(error).startswith("prompt") else str(error)) from error
    readings = [(read[prompt], read[negative]) for prompt, negative in zip(prompts, negatives, strict=True)]
    all_read: dict[int, Reading] = {id(one): one for pair in readings for one in pair}
    notes = dict.fromkeys(note for one in all_read.values() for note in one.notes)
    if not guided and any(negatives):
        notes["the negative prompt has no effect: nothing is guided away from it"] = None
    return Wording(
        prompts=tuple(prompts),
        negative_prompts=tuple(negatives),
        texts=tuple(positive.texts for positive, _ in readings),
        negative_texts=tuple(negative.texts for _, negative in readings),
        chunks=tuple(max(one.chunks, negative.chunks) if guided else one.chunks for one, negative in readings),
        syntax=syntax,
        loras=tuple(dict.fromkeys(tag for one in all_read.values() for tag in one.loras)),
        embeddings=tuple(dict.fromkeys(name for one in all_read.values() for name in one.embeddings)),
        notes=tuple(notes),
    )
