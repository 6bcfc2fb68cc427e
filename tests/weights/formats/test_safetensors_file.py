"""100,000 damaged headers: a `FastsdError` or the right answer, and nothing that the safetensors library refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.weights.formats.safetensors_file import DTYPES, parse_header

EXAMPLES, HEADERS = 3_000, 50  # damaged headers per example, all from one valid header; some are the same
BYTES = 24  # random bytes per header
T = TypeVar("T")
WORDS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"-", b".", b"0", b"9", b" ", b"\n", b"\x00", b"\xff", b"\x7f"),
    *(b"null", b"true", b"NaN", b"Infinity", b"1e999", b"-0", b"1.0", b"1E1", b"18446744073709551616", b"9" * 30),
    *(b'"\\ud800"', b'"\\u0000"', b"\\u0041", b"\xed\xa0\x80", b"\xc3\xa9", b"\xef\xbb\xbf", b'"x":1,', b'"a":{},'),
    *(b'"dtype":"F16",', b'"shape":[],', b'"data_offsets":[0,0],', b'"F4"', b'"F8_E4M3"', b'"BOOL"', b'"I64"', b"[[]]"),
    *(
        b'"__metadata__":{"k":"v"},',
        b'"__metadata__":null,',
        b'"empty":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},',
    ),
]


class Choices:
    """Choices from random bytes, so that hypothesis can shrink a failing example; 0 after the last byte."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def below(self, count: int) -> int:
        """An integer from 0 to `count` - 1, at most 65535."""
        size = 1 if count <= 256 else 2
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little") % count

    def one_of(self, values: Sequence[T]) -> T:
        return values[self.below(len(values))]


def make(rng: Choices) -> tuple[bytes, int]:
    """A small valid header and the size of its data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if rng.below(2) else {}
    end = 0
    for i in range(rng.below(4)):
        kind = rng.one_of(["F32", "F16", "BF16", "I64", "U8"])
        shape = [rng.below(4) for _ in range(rng.below(4))]
        size = math.prod(shape) * DTYPES[kind].itemsize
        header[f"key{i}"] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header, separators=(",", ":") if rng.below(2) else None).encode(), end


def mutated(raw: bytes, rng: Choices) -> bytes:
    """Up to three changes: a byte; a word; a piece removed, doubled or moved; a number."""
    for _ in range(rng.one_of((1, 1, 1, 2, 3))):
        at = rng.below(len(raw) + 1)
        to = min(len(raw), at + rng.below(13))
        kind = rng.below(6)
        if kind == 0:
            raw = raw[:at] + bytes([rng.below(256)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at] + rng.one_of(WORDS) + raw[at + rng.below(2) :]
        elif kind == 2:
            raw = raw[:at] + raw[to:]
        elif kind == 3:
            raw = raw[:to] + raw[at:]
        elif kind == 4:
            other = rng.below(len(raw) + 1)
            raw = raw[:other] + raw[at:to] + raw[other:]
        else:
            digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
            if digits:
                i = rng.one_of(digits)
                raw = raw[:i] + str(rng.one_of((0, 1, 2, 4, 8, 16, -1, 2**63))).encode() + raw[i + 1 :]
    return raw


def accepted(raw: bytes, size: int) -> dict[str, tuple[str, list[int]]] | None:
    """What fastsd reads from a header; None if it refuses. Any other exception fails the test."""
    try:
        entries, _ = parse_header(Path("x.safetensors"), raw, 8 + len(raw) + size)
    except FastsdError as error:
        assert "\n" not in str(error) and str(error).startswith("x.safetensors: ")
        return None
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {key: (names[entry.dtype], list(entry.shape)) for key, entry in entries.items()}


@pytest.mark.heavy
def test_mutated_headers() -> None:
    """No exception but `FastsdError`; every accepted header means the same to the safetensors library."""
    seen: set[int] = set()
    accepted_count = 0

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.binary(min_size=BYTES * (HEADERS + 1), max_size=BYTES * (HEADERS + 1)))
    def check(data: bytes) -> None:
        nonlocal accepted_count
        base, size = make(Choices(data[:BYTES]))
        assert accepted(base, size) is not None
        for k in range(1, HEADERS + 1):
            raw = mutated(base, Choices(data[k * BYTES : (k + 1) * BYTES]))
            seen.add(hash(raw))
            ours = accepted(raw, size)
            if ours is None:
                continue
            accepted_count += 1
            file = len(raw).to_bytes(8, "little") + raw + bytes(size)
            theirs = {name: (value["dtype"], value["shape"]) for name, value in safetensors.deserialize(file)}
            assert ours == theirs, raw

    check()
    assert len(seen) >= 100_000
    assert accepted_count > len(seen) / 100, "too few mutations are accepted for a meaningful comparison"


@pytest.mark.parametrize("where", ["top", "entry", "metadata"])
def test_a_duplicate_key_is_refused(where: str) -> None:
    """The library silently takes the last one at the top and in metadata."""
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    raw = {
        "top": f'{{"a":{entry},"a":{entry}}}',
        "entry": f'{{"a":{entry[:-1]},"dtype":"F32"}}}}',
        "metadata": f'{{"__metadata__":{{"a":"1","a":"2"}},"b":{entry}}}',
    }[where].encode()
    with pytest.raises(FastsdError, match="'(a|dtype)' appears twice"):
        parse_header(Path("x"), raw, 8 + len(raw) + 4)
