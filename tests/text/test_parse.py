"""Prompts as values: any text parses, each distinct text once, and what a user should know is noted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.components import Components, TextualInversion
from fastsd.errors import FastsdError
from fastsd.text import parse
from fastsd.text.encode import encode_text
from fastsd.text.parse import parse_prompt, parse_prompts, parse_text
from tests.support import tiny


def notes(components: Components, text: str, syntax: str = "plain") -> list[str]:
    return list(parse.notes_on(components, parse_text(components, text, syntax)))


PIECES = [
    "a cat",
    ", ",
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    ":1.7)",
    ":-0.5)",
    ":0.5]",
    "\\",
    "BREAK",
    "<lora:x:1>",
    "toy",
    "é\n",
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.sampled_from(["plain", "a1111"]))
def test_any_prompt_is_parsed_and_encoded(embedded: Components, prompt: str, syntax: str) -> None:
    try:
        parsed = parse_prompt(embedded, prompt, 3, syntax)
    except FastsdError as error:
        assert "\n" not in str(error)
        return
    for text in set(parsed.texts):
        found = encode_text(embedded, text, 1, length=parsed.length)
        assert found.context.shape == (1, 77 * parsed.length, 32) and bool(found.context.isfinite().all())


@pytest.fixture(scope="module")
def embedded() -> Components:
    components = tiny.sd1()
    components.embeddings = {"toy": TextualInversion(("toy",), (torch.ones(9, 32),))}
    return components


def test_notes() -> None:
    components = tiny.sd1()
    components.known_words = frozenset({"a", "cat"})
    components.embeddings = {"toy": TextualInversion(("toy",), (torch.ones(1, 32),))}
    assert notes(components, "(a:1.2) cat BREAK toy", "a1111") == []
    assert "'dog'" in notes(components, "a [dog]", "a1111")[0]
    components.known_words = frozenset()
    assert notes(components, "a " * 80, "a1111") == []
    assert "left out: 'a a a a a '" in notes(components, "a " * 80)[0]
    assert "AND" in notes(components, "a AND b", "a1111")[0]


def test_a_text_of_too_many_chunks_is_refused() -> None:
    with pytest.raises(FastsdError, match="101 chunks"):
        parse_text(tiny.sd1(), "BREAK " * 100 + "a", "a1111")


def test_each_text_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images, steps and prompts share it."""
    read: list[str] = []
    weigh = parse.weigh
    monkeypatch.setattr(parse, "weigh", lambda text: read.append(text) or weigh(text))
    prompts = parse_prompts(tiny.sdxl(), ["[a|b] x"] * 3 + ["a x"], ["b x"] * 4, 6, "a1111", [True] * 4)
    assert sorted(read) == ["a x", "b x"]
    assert prompts.positive[0].texts[0] is prompts.positive[3].texts[5]
    assert prompts.positive[0].texts[1] is prompts.negative[0].texts[0]
