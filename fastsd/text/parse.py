"""Prompts parsed once into values: tokens with weights, in chunks, for each step. Encoding reads these and no text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.text import comfy
from fastsd.text.chunks import COMMA_REACH, Chunk, Piece, pieces_of, split
from fastsd.text.syntax import LoraTag, Section, Span, by_step, other_networks, take_loras, weigh

MAX_CHUNKS = 100  # 7,500 tokens


@dataclass(frozen=True, eq=False)
class ParsedText:
    """The text of one step. Two are equal only if they are the same object: each distinct text is parsed once.

    Attributes:
        text: as it reads once schedules are resolved.
        sections: its weighted spans, between two BREAKs each.
        pieces: the same, cut at the names of textual inversions.
        chunks: for each text encoder, what it reads at once.
        syntax: how it was read, see `parse_prompt`; "plain" text is cut to one chunk.
    """

    text: str
    sections: tuple[Section, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    syntax: str = "a1111"

    @property
    def plain(self) -> bool:
        return self.syntax == "plain"

    @property
    def length(self) -> int:
        """Chunks of the text encoder that needs most."""
        return max(map(len, self.chunks))


@dataclass(frozen=True, eq=False)
class ParsedPrompt:
    """A prompt for a run of N steps.

    Attributes:
        prompt: as it was given.
        texts: of each step, 0 .. N - 1.
        loras: its LoRA tags.
        notes: what the user should know.
    """

    prompt: str
    texts: tuple[ParsedText, ...]
    loras: tuple[LoraTag, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Chunks of the longest text."""
        return max(text.length for text in self.texts)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of the textual inversions in it."""
        pieces = (piece for text in self.texts for section in text.pieces for piece in section)
        return tuple(dict.fromkeys(piece.embedding for piece in pieces if piece.embedding is not None))


@dataclass(frozen=True)
class ParsedPrompts:
    """The prompts of a call, one entry for each image.

    Attributes:
        positive, negative: parsed; images with equal prompts share them.
        lengths: chunks that an image's conditioning fills. The negative prompt counts where there is guidance. Shorter
            texts are filled up with empty chunks, or repeated where the length is a multiple of theirs.
        own_notes: what the user should know of each image's own texts.
    """

    positive: tuple[ParsedPrompt, ...]
    negative: tuple[ParsedPrompt, ...]
    lengths: tuple[int, ...]
    own_notes: tuple[tuple[str, ...], ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of all images, each once."""
        return tuple(dict.fromkeys(note for own in self.own_notes for note in own))

    @property
    def loras(self) -> tuple[LoraTag, ...]:
        return tuple(dict.fromkeys(tag for prompt in self._all() for tag in prompt.loras))

    @property
    def embeddings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for prompt in self._all() for name in prompt.embeddings))

    def _all(self) -> tuple[ParsedPrompt, ...]:
        return (*self.positive, *self.negative)


def parse_prompts(
    components: Components,
    prompts: Sequence[str],
    negatives: Sequence[str],
    steps: int,
    syntax: str,
    guided: Sequence[bool],
    repeats: bool = False,
    before: int = 0,
) -> ParsedPrompts:
    """Parse a prompt and a negative prompt for each image.

    Args:
        components: the checkpoint, whose tokenizers and embeddings are used.
        prompts, negatives: one for each image.
        steps: of the run.
        syntax: see `parse_prompt`.
        guided: of each image, whether its negative prompt is used.
        repeats: shorter texts are repeated, else filled up with empty chunks.
        before: steps of a pass before, with which schedules go on.

    Raises:
        FastsdError: a prompt is malformed or too long.
    """
    texts: dict[str, ParsedText] = {}
    parsed = {one: parse_prompt(components, one, steps, syntax, texts, before) for one in dict.fromkeys(prompts)}
    try:
        for prompt in dict.fromkeys(negatives):
            if prompt not in parsed:
                parsed[prompt] = parse_prompt(components, prompt, steps, syntax, texts, before)
    except FastsdError as error:
        error.argument = "negative_prompt"
        raise
    positive = tuple(parsed[prompt] for prompt in prompts)
    negative = tuple(parsed[prompt] for prompt in negatives)
    images = zip(positive, negative, guided, strict=True)
    lengths = [_length((prompt, other) if steers else (prompt,), repeats) for prompt, other, steers in images]
    where = " on some images" if any(guided) else ""
    idle = f"the negative prompt has no effect{where}: without guidance nothing steers away from it"
    own_notes = tuple(
        (*prompt.notes, *other.notes, *([idle] if other.prompt and not steers else []))
        for prompt, other, steers in zip(positive, negative, guided, strict=True)
    )
    return ParsedPrompts(positive, negative, tuple(lengths), own_notes)


def _length(prompts: Sequence[ParsedPrompt], repeats: bool) -> int:
    """The chunks that serve all texts of an image: those of the longest, or the least common multiple."""
    lengths = {text.length for prompt in prompts for text in prompt.texts}
    common = math.lcm(*lengths)
    return common if repeats and common <= MAX_CHUNKS else max(lengths)


def parse_prompt(
    components: Components,
    prompt: str,
    steps: int,
    syntax: str,
    texts: dict[str, ParsedText] | None = None,
    before: int = 0,
) -> ParsedPrompt:
    """Parse one prompt for a run of `steps` steps.

    Args:
        syntax: "a1111" (weights, schedules, tags), "literal" (the same, but brackets are text), "comfy" (ComfyUI's
            weights), or "plain".
        texts: the texts parsed so far; new ones are added.
        before: as `by_step` takes it.

    Raises:
        FastsdError: it is malformed or too long.
    """
    texts = {} if texts is None else texts
    loras: tuple[LoraTag, ...] = ()
    by_step_texts = (prompt,) * steps
    notes: dict[str, None] = {}
    if syntax in ("a1111", "literal"):
        text, loras = take_loras(prompt)
        by_step_texts = by_step(text, steps, before)
        notes |= dict.fromkeys(f"{tag[:80]} has no effect: no such extra network" for tag in other_networks(prompt))
    for text in dict.fromkeys(by_step_texts):
        if text not in texts:
            texts[text] = parse_text(components, text, syntax)
        notes |= dict.fromkeys(notes_on(components, texts[text]))
    return ParsedPrompt(prompt, tuple(texts[text] for text in by_step_texts), loras, tuple(notes))


def parse_text(components: Components, text: str, syntax: str = "plain") -> ParsedText:
    """Parse the text of one step: weights, embeddings, tokens.

    Raises:
        FastsdError: it is malformed or too long.
    """
    weighted = {"a1111": weigh, "comfy": comfy.weigh}.get(syntax, lambda text: ((Span(text),),))
    return tokenize(components, text, weighted(text), syntax)


def tokenize(components: Components, text: str, sections: tuple[Section, ...], syntax: str) -> ParsedText:
    """A weighted text as chunks for each text encoder of a checkpoint; plain text is cut to its first chunk.

    Raises:
        FastsdError: the text fills more than `MAX_CHUNKS`.
    """
    find = comfy.pieces_of if syntax == "comfy" else pieces_of
    pieces = find(sections, components.embeddings)
    found = []
    for which, tokenizer in enumerate(components.tokenizers):
        vectors = {name: embedding.vectors[which] for name, embedding in components.embeddings.items()}
        if syntax == "comfy":
            chunks = comfy.split(pieces, tokenizer, vectors)
        else:
            chunks = split(pieces, tokenizer, vectors, comma_reach=0 if syntax == "plain" else COMMA_REACH)
        found.append(tuple(chunks[:1] if syntax == "plain" else chunks))
    longest = max(map(len, found))
    if longest > MAX_CHUNKS:
        raise FastsdError(
            f"{longest} chunks of text; the longest prompt that is read fills {MAX_CHUNKS}", argument="prompt"
        )
    return ParsedText(text, sections, pieces, tuple(found), syntax)


def notes_on(components: Components, text: ParsedText) -> Iterator[str]:
    """What a user should know of one text: unknown words, text that was cut, "AND"."""
    plain = [piece.text for section in text.pieces for piece in section]
    if components.known_words:
        words = dict.fromkeys(word for part in plain for word in re.findall(r"\w+", part.lower()))
        unknown = [word for word in words if word not in components.known_words]
        if unknown:
            known = ", ".join(sorted(components.known_words))
            yield f"{components.name} does not know {', '.join(map(repr, unknown))}; its words are: {known}"
    if text.plain:
        cut = components.tokenizers[0].truncated(text.text)
        if cut:
            yield f"the prompt is too long; left out: {cut!r}"
    elif text.syntax == "a1111" and any(re.search(r"\bAND\b", part) for part in plain):
        yield "the prompt holds AND, which is read as a word: prompts are not composed"
