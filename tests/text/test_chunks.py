"""Splitting a text into chunks, against cases counted by hand. "a" and "," are one token each, 320 and 267."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsd
from fastsd.errors import FastsdError
from fastsd.model.tokenizer import Tokenizer
from fastsd.text import chunks as under_test
from fastsd.text.chunks import Chunk, find_names, pieces_of
from fastsd.text.syntax import Section, weigh

CLIP = Tokenizer()
DIGITS = Tokenizer(Path(fastsd.__file__).parent / "assets" / "digits" / "tokenizer")
A, COMMA = 320, 267
NONE: dict[str, torch.Tensor] = {}


def split(sections: tuple[Section, ...], tokenizer: Tokenizer, embeddings: dict[str, torch.Tensor]) -> list[Chunk]:
    return under_test.split(pieces_of(sections, embeddings), tokenizer, embeddings)


def a(count: int) -> str:
    return "a " * count


SIZES = [
    # (text, tokens of each chunk, why)
    ("", [0], "no text is one chunk all the same"),
    (a(75), [75], "exactly full"),
    (a(76), [75, 1], "one too many"),
    (a(151), [75, 75, 1], ""),
    (a(70) + "," + a(10), [71, 10], "cut after the comma: 4 that were in, 6 that came"),
    (a(55) + "," + a(30), [56, 30], "the comma is the 20th token from the end"),
    (a(54) + "," + a(30), [75, 10], "the 21st: too far"),
    (a(74) + "," + a(1), [75, 1], "a comma as the last token: nothing to move"),
    (a(75) + "," + a(1), [75, 2], "a comma after the end belongs to the next chunk"),
    (a(60) + "," + a(10) + "," + a(10), [72, 10], "the last comma counts"),
    (a(60) + "," + a(100), [61, 75, 25], "a comma does not count for the next chunk"),
    (a(60) + ", BREAK " + a(80), [61, 75, 5], "nor beyond BREAK"),
    (a(70) + "," + a(4), [75], "what fits is never cut"),
    (a(75) + "," + a(80), [75, 75, 6], "the first token of a chunk is too far"),
    (a(70) + "," + a(10) + "BREAK " + a(70) + a(10), [71, 10, 75, 5], "a comma does not reach beyond BREAK"),
    (a(3) + "BREAK " + a(2), [3, 2], ""),
    ("BREAK a", [0, 1], "BREAK ends an empty chunk"),
    ("a BREAK BREAK a", [1, 0, 1], ""),
    ("a BREAK", [1], "no chunk for nothing at the end"),
    ("BREAK", [0], ""),
    (a(75) + "BREAK a", [75, 1], "BREAK after a full chunk gives no empty one"),
]


@pytest.mark.parametrize(("text", "sizes", "why"), SIZES, ids=[str(i) for i in range(len(SIZES))])
def test_sizes(text: str, sizes: list[int], why: str) -> None:
    chunks = split(weigh(text), CLIP, NONE)
    assert [len(chunk.ids) for chunk in chunks] == sizes, why
    assert all(len(chunk.weights) == len(chunk.ids) for chunk in chunks)
    ids = [token for chunk in chunks for token in chunk.ids]
    assert ids == [token for section in weigh(text) for span in section for token in CLIP.ids(span.text)]


def test_a_model_of_another_length_has_chunks_of_its_own() -> None:
    assert DIGITS.max_length == 32
    assert [len(chunk.ids) for chunk in split(weigh(a(31)), DIGITS, NONE)] == [30, 1]
    assert [len(chunk.ids) for chunk in split(weigh(a(20) + "," + a(11)), DIGITS, NONE)] == [21, 11]
    assert [len(chunk.ids) for chunk in split(weigh(a(9) + "," + a(22)), DIGITS, NONE)] == [30, 2]


def test_weights_go_with_their_tokens() -> None:
    first, second = split(weigh(a(60) + "(, " + a(5) + ":2) " + a(5) + "(" + a(10) + ":3)"), CLIP, NONE)
    assert first.ids == [A] * 60 + [COMMA] and first.weights == [1.0] * 60 + [2.0]
    assert second.ids == [A] * 20 and second.weights == [2.0] * 5 + [1.0] * 5 + [3.0] * 10


def test_vectors_stay_together() -> None:
    toy = {"<toy>": torch.ones(10, 4)}
    (one,) = split(weigh("a (<toy>:1.5)a"), CLIP, toy)
    assert one == Chunk([A, *[0] * 10, A], [1.0, *[1.5] * 10, 1.0], [(1, toy["<toy>"])])
    first, second = split(weigh(a(66) + "<toy> a"), CLIP, toy)
    assert first.ids == [A] * 66 and second.ids == [0] * 10 + [A] and second.vectors[0][0] == 0
    # 70 tokens, the last of them vectors behind a comma, which move with what follows it
    first, second = split(weigh(a(59) + ", a <toy>" + a(5)), CLIP, toy)
    assert len(first.ids) == 60 and first.vectors == []
    assert second.ids == [A, *[0] * 10, *[A] * 5] and second.vectors[0][0] == 1
    with pytest.raises(FastsdError, match="76 vectors"):
        split(weigh("x"), CLIP, {"x": torch.ones(76, 4)})


NAMES = [
    ("a toy on a table", ["toy"], ["a ", "toy", " on a table"]),
    ("Toy, toys, atoy, toy2, toy_x", ["toy"], ["", "toy", ", toys, atoy, toy2, toy_x"]),
    ("a<toy>b", ["<toy>"], ["a", "<toy>", "b"]),
    ("bad-hand-5, bad-hand", ["bad-hand", "bad-hand-5"], ["", "bad-hand-5", ", ", "bad-hand", ""]),
    ("my  style", ["My Style"], ["", "My Style", ""]),
    ("x.*y xzy", ["x.*y"], ["", "x.*y", " xzy"]),
    ("ſtyle", ["style"], ["", "style", ""]),  # a letter that only matches without regard to case
    ("toy", [], ["toy"]),
    ("toy", [" "], ["toy"]),
]


@pytest.mark.parametrize(("text", "names", "expected"), NAMES, ids=[text for text, _, _ in NAMES])
def test_names(text: str, names: list[str], expected: list[str]) -> None:
    found = [part for before, name in find_names(text, names) for part in (before, name) if part is not None]
    assert found == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([a(3), ",", "BREAK ", "<toy> ", "(", ":1.3)", "[", "]", "é x "]), max_size=120))
def test_every_chunk_fits(pieces: list[str]) -> None:
    chunks = split(weigh("".join(pieces)), DIGITS, {"<toy>": torch.ones(7, 4)})
    assert chunks and all(len(chunk.ids) == len(chunk.weights) <= 30 for chunk in chunks)
    for chunk in chunks:
        for start, vectors in chunk.vectors:
            assert chunk.ids[start : start + len(vectors)] == [0] * 7
