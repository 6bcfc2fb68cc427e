"""A small vocabulary in CLIP's format: every byte, one token for each word of the captions, start and end.

transformers' `CLIPTokenizer` and `fastsd.model.tokenizer.Tokenizer` both read it. Unknown words become several tokens,
down to single letters.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.model.tokenizer import BOS, EOS, Tokenizer

Merges = list[tuple[str, str]]


def byte_alphabet() -> list[str]:
    """GPT-2's byte alphabet: a printable character for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def build(words: list[str]) -> tuple[dict[str, int], Merges]:
    """Vocabulary and merges that make each of `words` (lower-case ASCII letters) one token.

    The merges assemble each word letter by letter from its start. Byte-pair encoding applies the earliest merge in the
    list first, so the longest words come first: a short word must not split a longer one that contains it ("an" would
    split "handwritten").
    """
    merges: Merges = []
    for word in sorted(set(words), key=lambda w: (-len(w), w)):
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def write(words: list[str], folder: str | Path, max_length: int) -> Tokenizer:
    """Write a `tokenizer/` folder for `words`, and return its tokenizer.

    Args:
        words: lower-case; each becomes one token.
        folder: created if it does not exist.
        max_length: tokens of a prompt, including start and end.

    Raises:
        FastsdError: the merges of other words prevent a word from becoming one token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = build(words)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    for name, text in (
        ("vocab.json", json.dumps(vocab, ensure_ascii=False)),
        ("merges.txt", "\n".join(lines) + "\n"),
        ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
        ("special_tokens_map.json", json.dumps(special, indent=2) + "\n"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(folder)
    for word in words:
        if tokenizer.tokens(word) != [word + "</w>"]:
            raise FastsdError(f"vocabulary: {word!r} becomes {tokenizer.tokens(word)}, which is not one token")
    return tokenizer
