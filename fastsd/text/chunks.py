"""A weighted text of any length in chunks, which the text encoder reads one at a time; split where A1111 splits."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fastsd.errors import FastsdError
from fastsd.model.tokenizer import Tokenizer
from fastsd.text.syntax import Section, composed

COMMA_REACH = 20  # A1111's default: a chunk ends after its last comma if at most 20 tokens follow it


@dataclass(frozen=True)
class Piece:
    """A text of one weight, up to the name of a textual inversion; `embedding` is that name, or None."""

    text: str
    weight: float = 1.0
    embedding: str | None = None


@dataclass
class Chunk:
    """At most `max_length - 2` tokens, without start, end and padding.

    Attributes:
        ids: the tokens; 0 where vectors stand.
        weights: one for each token.
        vectors: `[n, hidden]` of textual inversions, each with the position of its first vector in `ids`.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    vectors: list[tuple[int, torch.Tensor]] = field(default_factory=list)


def split(
    sections: Sequence[Sequence[Piece]],
    tokenizer: Tokenizer,
    embeddings: Mapping[str, torch.Tensor],
    comma_reach: int = COMMA_REACH,
) -> list[Chunk]:
    """Fill chunks with the tokens of a text.

    A full chunk that more text follows is cut after its last comma, if that is one of its last `comma_reach` tokens;
    the tokens after the comma move to the next chunk. The vectors of an embedding stay together. The end of a section
    (BREAK) ends the chunk, even an empty one; an empty last section makes none.

    Args:
        sections: from `pieces_of`.
        embeddings: `[n, hidden]` for each name.

    Returns:
        At least one chunk.

    Raises:
        FastsdError: an embedding has more vectors than a chunk has room for.
    """
    room, comma_id = tokenizer.max_length - 2, tokenizer.comma_id
    chunks, comma = [Chunk()], -1  # the position of the last comma in the last chunk
    for number, section in enumerate(sections):
        if number:
            chunks.append(Chunk())
            comma = -1
        for token, weight in _tokens(section, tokenizer, embeddings):
            size = len(chunks[-1].ids)
            count = len(token) if isinstance(token, torch.Tensor) else 1
            if count > room:
                raise FastsdError(
                    f"an embedding has {count} vectors; the text encoder reads {room} at once", argument="prompt"
                )
            if size == room:
                is_comma = isinstance(token, int) and token == comma_id
                moves = not is_comma and comma >= 0 and size - comma <= comma_reach
                chunks.append(_cut(chunks[-1], comma + 1) if moves else Chunk())
                comma = -1
            elif isinstance(token, int) and token == comma_id:
                comma = size
            if len(chunks[-1].ids) + count > room:
                chunks.append(Chunk())
                comma = -1
            _add(chunks[-1], token, count, weight)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks


def _add(chunk: Chunk, token: int | torch.Tensor, count: int, weight: float) -> None:
    if isinstance(token, torch.Tensor):
        chunk.vectors.append((len(chunk.ids), token))
    chunk.ids += [0] * count if isinstance(token, torch.Tensor) else [token]
    chunk.weights += [weight] * count


def _cut(chunk: Chunk, at: int) -> Chunk:
    """Move everything from position `at` on to a new chunk."""
    rest = Chunk(chunk.ids[at:], chunk.weights[at:], [(i - at, v) for i, v in chunk.vectors if i >= at])
    del chunk.ids[at:], chunk.weights[at:]
    chunk.vectors = [(i, v) for i, v in chunk.vectors if i < at]
    return rest


def _tokens(
    section: Sequence[Piece], tokenizer: Tokenizer, embeddings: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int | torch.Tensor, float]]:
    for piece in section:
        for token in tokenizer.ids(piece.text):
            yield token, piece.weight
        if piece.embedding is not None:
            yield embeddings[piece.embedding], piece.weight


def pieces_of(sections: Sequence[Section], names: Iterable[str]) -> tuple[tuple[Piece, ...], ...]:
    """Weighted text cut at the names of textual inversions.

    Args:
        sections: from `fastsd.text.syntax.weigh`.
        names: of the embeddings that are loaded.
    """
    known = list(names)
    return tuple(
        tuple(Piece(text, span.weight, name) for span in section for text, name in find_names(span.text, known))
        for section in sections
    )


def find_names(text: str, names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each text before a name, with the name after it (None at the end).

    Case does not matter, nor whether letters with marks are composed (Unicode's forms NFC and NFD). A name is not
    found inside a longer word. Of two that match, the longer one counts.
    """
    ordered = sorted((name for name in names if name.strip()), key=lambda name: (-len(name), name))
    at = 0
    if ordered:
        either = "|".join(f"({'|'.join(map(_words, _forms(name)))})" for name in ordered)
        # A name that begins or ends with punctuation, as "<toy>" does, needs no gap there.
        for found in re.finditer(rf"(?:(?<!\w)|(?!\w))(?:{either})(?:(?!\w)|(?<!\w))", text, re.IGNORECASE):
            assert found.lastindex is not None  # each alternative is a group
            yield text[at : found.start()], ordered[found.lastindex - 1]
            at = found.end()
    yield text[at:], None


def _forms(name: str) -> list[str]:
    return list(dict.fromkeys((name, composed(name), unicodedata.normalize("NFD", name))))


def _words(name: str) -> str:
    """A pattern of the name, with any spaces between its words."""
    return r"\s+".join(map(re.escape, name.split()))
