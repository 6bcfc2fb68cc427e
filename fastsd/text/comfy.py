"""ComfyUI's prompts: weights, and chunks that keep words whole (comfy/sd1_clip.py, `token_weights` and
`SDTokenizer.tokenize_with_weights`).

`(a)` multiplies by 1.1; `(a:1.3)` is 1.3, whatever stands around it. Square brackets, BREAK, schedules and tags are
text. `embedding:name` is a textual inversion; a name alone is a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastsd.model.tokenizer import Tokenizer
from fastsd.text.chunks import Chunk, Piece
from fastsd.text.syntax import MAX_DEPTH, ROUND, Section, Span, check_length, check_weight, composed, too_deep

EMBEDDING = "embedding:"
LARGE = 8  # tokens of a word that a chunk's end may cut
_CLOSE, _OPEN = "\0\1", "\0\2"  # what stands for \) and \( until the brackets are read


def weigh(text: str) -> tuple[Section, ...]:
    """The weighted spans of a text, in one section.

    Raises:
        FastsdError: a weight beyond MAX_WEIGHT, a text that is too long, or brackets nested too deeply.
    """
    check_length(text)
    escaped = text.replace("\\)", _CLOSE).replace("\\(", _OPEN)
    spans = []
    for part, weight in _weights(escaped, 1.0, 0):
        part = part.replace(_CLOSE, ")").replace(_OPEN, "(")
        check_weight(part, weight)
        spans.append(Span(part, weight))
    return (tuple(spans),)


def _weights(text: str, weight: float, depth: int) -> list[tuple[str, float]]:
    """Each part of a text of this weight, with its own weight; `depth` counts the brackets around it."""
    if depth > MAX_DEPTH:
        raise too_deep()
    found = []
    for part in _outer_brackets(text):
        if len(part) < 2 or part[0] != "(" or part[-1] != ")":
            found.append((part, weight))
            continue
        inner, own = part[1:-1], weight * ROUND
        at = inner.rfind(":")
        if at > 0:
            try:
                inner, own = inner[:at], float(inner[at + 1 :])
            except ValueError:
                pass
        found += _weights(inner, own, depth + 1)
    return found


def _outer_brackets(text: str) -> list[str]:
    """The text cut around its outermost brackets; a closing bracket too many makes the next opening one text."""
    parts, part, level = [], "", 0
    for character in text:
        if character == "(":
            if level == 0 and part:
                parts.append(part)
            part = "(" if level == 0 else part + character
            level += 1
        elif character == ")":
            level -= 1
            part += character
            if level == 0:
                parts.append(part)
                part = ""
        else:
            part += character
    return [*parts, part] if part else parts


def pieces_of(sections: Sequence[Section], names: Mapping[str, object]) -> tuple[tuple[Piece, ...], ...]:
    """The words of a weighted text, a piece each; `embedding:name` with a comma or without is that embedding."""
    known = {composed(name).lower(): name for name in names}
    pieces: list[Piece] = []
    for section in sections:
        for span in section:
            for word in span.text.replace("\n", " ").split(" "):
                called = word.removeprefix(EMBEDDING)
                bare = called.rstrip(",")
                name = known.get(composed(bare).lower()) if word.startswith(EMBEDDING) else None
                if name is not None:
                    pieces.append(Piece("", span.weight, name))
                    word = called[len(bare) :]
                if word:
                    pieces.append(Piece(word, span.weight))
    return (tuple(pieces),)


def split(
    sections: Sequence[Sequence[Piece]], tokenizer: Tokenizer, embeddings: Mapping[str, torch.Tensor]
) -> list[Chunk]:
    """Fill chunks with words. A word that does not fit begins the next chunk; one of `LARGE` tokens or more is cut."""
    room, chunks = tokenizer.max_length - 2, [Chunk()]
    for piece in (piece for section in sections for piece in section):
        vectors = embeddings[piece.embedding] if piece.embedding is not None else None
        ids = [0] * len(vectors) if vectors is not None else list(tokenizer.ids(piece.text))
        large, at = len(ids) >= LARGE, 0
        while at < len(ids):
            free = room - len(chunks[-1].ids)
            whole = len(ids) - at <= free
            count = len(ids) - at if whole else free if large else 0
            if count and vectors is not None:
                chunks[-1].vectors.append((len(chunks[-1].ids), vectors[at : at + count]))
            chunks[-1].ids += ids[at : at + count]
            chunks[-1].weights += [piece.weight] * count
            at += count
            if not whole:
                if not count and not chunks[-1].ids:  # a word longer than a chunk and shorter than LARGE
                    large = True
                    continue
                chunks.append(Chunk())
    return chunks
