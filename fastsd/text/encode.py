"""From prompts to what the UNet is told: text features, pooled text, sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.graph import Graphs
from fastsd.model.clip import Insertion, TextOutput
from fastsd.model.unet import AddedConditioning
from fastsd.text.chunks import COMMA_REACH, Chunk, find_names, split
from fastsd.text.syntax import LoraTag, Section, Span, by_step, take_loras, weigh

SYNTAXES = ("a1111", "plain")
MAX_CHUNKS = 100  # 7,500 tokens


@dataclass(frozen=True)
class Reading:
    """A prompt as it was read.

    Attributes:
        texts: of each step, 0 .. N - 1, for `encode_text`.
        chunks: how many the longest of them fills.
        loras: the LoRA tags that were taken out.
        embeddings: names of the textual inversions in it.
        notes: what a user should know.
    """

    texts: tuple[str, ...]
    chunks: int
    loras: tuple[LoraTag, ...] = ()
    embeddings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_prompt(components: Components, prompt: str, steps: int, syntax: str) -> Reading:
    """Read a prompt for a run of `steps` steps in "a1111" or "plain" syntax.

    Raises:
        FastsdError: it is malformed or too long.
    """
    loras: tuple[LoraTag, ...] = ()
    texts = (prompt,) * steps
    if syntax != "plain":
        text, loras = take_loras(prompt)
        texts = by_step(text, steps)
    notes: dict[str, None] = {}
    names: dict[str, None] = {}
    chunks = 1
    for text in dict.fromkeys(texts):
        chunks = max(chunks, *map(len, split_text(components, text, syntax)))
        notes |= dict.fromkeys(notes_on(components, text, syntax))
        names |= dict.fromkeys(name for _, name in pieces(components, text, syntax) if name is not None)
    return Reading(texts, chunks, loras, tuple(names), tuple(notes))


@dataclass(frozen=True)
class TextFeatures:
    """What the text encoders say of one text: `context` `[1, L, D]` and `pooled` `[1, P]`."""

    context: torch.Tensor
    pooled: torch.Tensor


def encode_text(
    components: Components,
    text: str,
    clip_skip: int,
    zeros: bool = False,
    syntax: str = "plain",
    chunks: int = 1,
    graphs: Graphs | None = None,
) -> TextFeatures:
    """Run the text encoders over one text, chunk by chunk.

    The features of each chunk are multiplied by its tokens' weights, and then by what gives them their mean back
    (A1111's arithmetic), for each encoder by itself. The pooled text is the first chunk's and knows no weights.

    Args:
        components: the checkpoint; two encoders' features are joined along the last dimension (SDXL).
        text: of one step; "plain": what exceeds one chunk is cut (`notes_on` says what); "a1111": see
            `fastsd.text.syntax.weigh`.
        clip_skip: how many of the last layers to leave out, counted as most programs do: 1 is none.
        zeros: return zeros of the right shape (what SDXL takes for an empty negative prompt).
        chunks: encode at least so many; what the text does not fill are chunks of no text.
        graphs: where captured encoders are kept; None runs them eagerly.

    Raises:
        FastsdError: the text is malformed or too long.
    """
    split_up = split_text(components, text, syntax)
    chunks = max(chunks, *map(len, split_up))
    graphs = Graphs() if graphs is None else graphs
    outputs = [
        _encode(components, which, [*part, *[Chunk()] * (chunks - len(part))], clip_skip, graphs)
        for which, part in enumerate(split_up)
    ]
    features = TextFeatures(torch.cat([output.hidden for output in outputs], dim=-1), outputs[-1].pooled)
    return TextFeatures(torch.zeros_like(features.context), torch.zeros_like(features.pooled)) if zeros else features


def split_text(components: Components, text: str, syntax: str) -> list[list[Chunk]]:
    """The chunks of a text for each text encoder.

    Raises:
        FastsdError: the text is malformed or too long.
    """
    sections = sections_of(text, syntax)
    found = []
    for which, tokenizer in enumerate(components.tokenizers):
        vectors = {name: embedding.vectors[which] for name, embedding in components.embeddings.items()}
        plain = syntax == "plain"
        chunks = split(sections, tokenizer, vectors, comma_reach=0 if plain else COMMA_REACH)
        found.append(chunks[:1] if plain else chunks)
    longest = max(map(len, found))
    if longest > MAX_CHUNKS:
        raise FastsdError(f"prompt: {longest} chunks of text; the longest prompt that is read fills {MAX_CHUNKS}")
    return found


def _encode(components: Components, which: int, chunks: list[Chunk], clip_skip: int, graphs: Graphs) -> TextOutput:
    """One encoder over all chunks: features joined along the tokens `[1, chunks * L, D]`, pooled of the first."""
    outputs: list[TextOutput] = []
    for i, chunk in enumerate(chunks):
        same = outputs[-1] if i and not chunk.ids and not chunks[i - 1].ids else None
        outputs.append(same or _encode_chunk(components, which, chunk, clip_skip, graphs))
    return TextOutput(torch.cat([output.hidden for output in outputs], dim=1), outputs[0].pooled)


def _encode_chunk(components: Components, which: int, chunk: Chunk, clip_skip: int, graphs: Graphs) -> TextOutput:
    encoder, tokenizer = components.text_encoders[which], components.tokenizers[which]
    ids = torch.full((1, tokenizer.max_length), tokenizer.pad_id, dtype=torch.int64)
    content = [tokenizer.bos_id, *chunk.ids, tokenizer.eos_id]
    ids[0, : len(content)] = torch.tensor(content)
    ids = ids.to(encoder.text_model.embeddings.token_embedding.weight.device)
    layer = -1 - clip_skip if is_xl(components) else -clip_skip  # SDXL reads one layer earlier, and not normed
    if chunk.vectors:
        output = encoder(ids, layer, [Insertion(0, 1 + start, vectors) for start, vectors in chunk.vectors])
    else:
        output = graphs(("text", which, layer), lambda x: encoder(x, layer), ids, weights=encoder)
    if clip_skip > 1 and not is_xl(components):
        output = TextOutput(encoder.text_model.final_layer_norm(output.hidden), output.pooled)
    if all(weight == 1.0 for weight in chunk.weights):
        return output
    weights = torch.ones(1, tokenizer.max_length, 1)
    weights[0, 1 : 1 + len(chunk.weights), 0] = torch.tensor(chunk.weights)
    return TextOutput(weighted(output.hidden, weights), output.pooled)


def weighted(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A1111's emphasis: `z = w h`, then `z mean(h) / mean(z)`; the means are over all tokens and channels.

    Args:
        hidden: `[1, L, D]`.
        weights: `[1, L, 1]`.

    Returns:
        `[1, L, D]` in the dtype of `hidden`; computed in fp32.
    """
    before = hidden.float()
    after = before * weights.to(before)
    ratio = before.mean() / after.mean()
    # Weights below 0 can take the mean to 0; then there is nothing to restore it by.
    return (after * torch.where(ratio.isfinite(), ratio, 1.0)).to(hidden.dtype)


def is_xl(components: Components) -> bool:
    """Whether the UNet takes added conditioning, as SDXL's do."""
    return components.unet.add_embedding is not None


def size_numbers(components: Components, width: int, height: int, negative: bool) -> tuple[float, ...]:
    """SDXL's size conditioning (Podell et al. 2023, section 2.2): original size, crop offset, target size or score."""
    numbers = (float(height), float(width), 0.0, 0.0)
    if components.aesthetic_score:
        return (*numbers, 2.5 if negative else 6.0)
    return (*numbers, float(height), float(width))


def added_conditioning(
    components: Components, pooled: torch.Tensor, negative: bool, width: int, height: int
) -> AddedConditioning | None:
    """The added conditioning of one prompt with pooled text `[1, P]`; None where the UNet takes none."""
    if not is_xl(components):
        return None
    sizes = size_numbers(components, width, height, negative)
    return AddedConditioning(pooled, torch.tensor([sizes], device=pooled.device))


def pieces(components: Components, text: str, syntax: str) -> Iterator[tuple[str, str | None]]:
    """The text without its signs, in pieces, each with the name of the textual inversion that follows it (or None)."""
    for section in sections_of(text, syntax):
        for span in section:
            yield from find_names(span.text, components.embeddings)


def sections_of(text: str, syntax: str) -> tuple[Section, ...]:
    """The weighted text of one step; "plain" has no weights."""
    return weigh(text) if syntax != "plain" else ((Span(text),),)


def notes_on(components: Components, text: str, syntax: str = "plain") -> list[str]:
    """What a user should know of one step's text: words that the model never saw, text that was cut, "AND".

    Raises:
        FastsdError: the text is malformed or too long.
    """
    notes = []
    plains = [plain for plain, _ in pieces(components, text, syntax)]
    if components.known_words:
        words = dict.fromkeys(word for plain in plains for word in re.findall(r"\w+", plain.lower()))
        unknown = [word for word in words if word not in components.known_words]
        if unknown:
            known = ", ".join(sorted(components.known_words))
            notes.append(f"{components.name} does not know {', '.join(map(repr, unknown))}; its words are: {known}")
    if syntax == "plain":
        cut = components.tokenizers[0].truncated(text)
        if cut:
            notes.append(f"the prompt is too long; left out: {cut!r}")
    elif any(re.search(r"\bAND\b", plain) for plain in plains):
        notes.append("the prompt holds AND, which is read as a word: prompts are not composed")
    return notes
