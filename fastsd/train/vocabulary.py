"""A small vocabulary in CLIP's format: every byte, one token for each word of the captions, start and end.

transformers' `CLIPTokenizer` and `fastsd.model.tokenizer.Tokenizer` both read it. Unknown words become several tokens,
down to single letters.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

from fastsd.errors import FastsdError
from fastsd.model.tokenizer import BOS, EOS, WORD, Tokenizer

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


def byte_alphabet() -> list[str]:
    """GPT-2's byte alphabet: a printable character for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def build(words: list[str]) -> tuple[Vocab, Merges]:
    """Vocabulary and merges that make each of `words` (lower-case ASCII letters) one token.

    The merges assemble each word letter by letter from its start. Byte-pair encoding applies the earliest merge in the
    list first, so the longest words come first: a short word must not split a longer one that contains it ("an" would
    split "handwritten").

    Raises:
        FastsdError: the merges of other words prevent a word from becoming one token.
    """
    merges: Merges = []
    for word in sorted(set(words), key=lambda w: (-len(w), w)):
        symbols = [*word[:-1], word[-1] + "</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
            if rank == len(ranks):
                raise FastsdError(f"vocabulary: {word!r} becomes {symbols}, which is not one token")
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return _vocab(merges), merges


def _vocab(merges: Merges) -> Vocab:
    """Ids in CLIP's order: bytes, bytes at the end of a word, what the merges make, start and end."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges), BOS, EOS]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def learn(texts: list[str], size: int) -> tuple[Vocab, Merges]:
    """Vocabulary and merges of at most `size` tokens by byte-pair encoding of `texts` (Sennrich et al. 2016).

    Raises:
        FastsdError: `size` has no room beside the bytes.
    """
    alphabet = byte_alphabet()
    if size < 2 * len(alphabet) + 2:
        raise FastsdError(f"data.vocabulary is {size}; it should be at least {2 * len(alphabet) + 2}")
    split = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    counts = Counter(word for text in texts for word, _ in words.pre_tokenize_str(text.lower()))
    merges = _frequent_pairs(dict(sorted(counts.items())), size - 2 * len(alphabet) - 2)
    return _vocab(merges), merges


def _frequent_pairs(counts: dict[str, int], limit: int) -> Merges:
    """At most `limit` merges, each of the pair that is then the most frequent, of at least two; of equal ones the first
    in the alphabet, so that the same texts give the same tokens."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in counts]
    number = list(counts.values())
    pairs: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)

    def note(index: int, sign: int) -> None:
        for pair in zip(words[index], words[index][1:]):
            pairs[pair] += sign * number[index]
            where[pair].add(index)

    for index in range(len(words)):
        note(index, 1)
    merges: Merges = []
    while len(merges) < limit and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        for index in sorted(where.pop(best)):
            note(index, -1)
            symbols, merged = words[index], []
            while symbols:
                both = len(symbols) > 1 and (symbols[0], symbols[1]) == best
                merged.append(best[0] + best[1] if both else symbols[0])
                symbols = symbols[2 if both else 1 :]
            words[index] = merged
            note(index, 1)
        del pairs[best]
    return merges


def write(vocab: Vocab, merges: Merges, folder: str | Path, max_length: int) -> Tokenizer:
    """Write a `tokenizer/` folder, and return its tokenizer.

    Args:
        folder: created if it does not exist.
        max_length: tokens of a prompt, including start and end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
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
    return Tokenizer(folder)
