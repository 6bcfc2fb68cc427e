"""The vocabulary: one token for each known word, the same ids as transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastsd.errors import FastsdError
from fastsd.model.tokenizer import Tokenizer, _byte_alphabet
from fastsd.train import vocabulary
from fastsd.train.captions import KNOWN_WORDS, WORDS, caption


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.write(*vocabulary.build(WORDS), folder, 32)
    return folder


def test_known_words_are_one_token_and_others_are_several(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    for word in KNOWN_WORDS:
        assert tokenizer.tokens(word.upper()) == [word + "</w>"]
    assert len(tokenizer.tokens("zebra")) > 1
    assert tokenizer("eight").shape == (1, 32)


def test_ids_match_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(str(folder)), Tokenizer(folder)
    generator = np.random.default_rng(0)
    prompts = [caption(i % 10, (1, -1, 1), generator, empty=0.1, unknown=0.5, style_share=0.5) for i in range(300)]
    prompts += ["", "An Eight!!", "naïve 東京 🙂", "8 8 8 " * 30, "eightandahandwrittenthin,3", "thickthin's"]
    expected = theirs(prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    assert ours(prompts).tolist() == expected.tolist()


def test_the_alphabet_matches_the_tokenizer() -> None:
    assert vocabulary.byte_alphabet() == _byte_alphabet()


def test_words_that_split_each_other_are_refused() -> None:
    # The merge (a, b), which starts "abcab", applies inside "cabca" before that word's own merge (c, a).
    with pytest.raises(FastsdError, match="not one token"):
        vocabulary.build(["abcab", "cabca"])


def test_frequent_words_of_the_captions_become_one_token(tmp_path: Path) -> None:
    texts = ["a red heart", "Red Heart", "red apple", "a heart, red", "an apple!", "a cat's heart", "héart"] * 3
    vocab, merges = vocabulary.learn(texts, 540)
    assert len(vocab) == len(merges) + 514 <= 540 and vocabulary.learn(list(reversed(texts)), 540) == (vocab, merges)
    tokenizer = vocabulary.write(vocab, merges, tmp_path, 16)
    assert tokenizer.tokens("RED heart") == ["red</w>", "heart</w>"] and len(tokenizer) == len(vocab)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    texts += ["zebra 42, naïve 東京"]
    expected = theirs(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert tokenizer(texts).tolist() == expected.tolist()
    with pytest.raises(FastsdError, match="vocabulary is 300; it should be at least 514"):
        vocabulary.learn(texts, 300)
