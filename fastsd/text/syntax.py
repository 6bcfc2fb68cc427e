"""The prompt syntax, as A1111 has it: weights, chunk breaks, schedules, alternation, LoRA tags.

`(word:1.2)` `(word)` `[word]` `BREAK`; `[a:b:0.5]` `[a:0.5]` `[a::0.5]`; `[a|b]`; `<lora:name:0.8>`. docs/prompts.md
states the rules. A prompt is read from the outside in: first tags are taken out, then schedules give each step its
text, then weights are read in that text. Malformed syntax is text. Nothing here knows models or tensors.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, field

from fastsd.errors import FastsdError

ROUND, SQUARE = 1.1, 1 / 1.1  # the factor of a pair of brackets without a number
MAX_WEIGHT = 100.0
MAX_DEPTH = 100  # brackets within brackets
MAX_CHARACTERS = 100_000

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"


@dataclass(frozen=True)
class Span:
    """A piece of text and its weight."""

    text: str
    weight: float = 1.0


# The text between two BREAKs; each BREAK ends a chunk.
Section = tuple[Span, ...]


@dataclass(frozen=True)
class LoraTag:
    """`<lora:name:text:unet>`: how strongly an adapter acts on the text encoders and on the UNet."""

    name: str
    text: float = 1.0
    unet: float = 1.0


def composed(text: str) -> str:
    """The text with each letter and its marks as one character where there is one (Unicode's form NFC)."""
    return unicodedata.normalize("NFC", text)


def check_length(prompt: str) -> None:
    """Refuse a text longer than `MAX_CHARACTERS` with a FastsdError."""
    if len(prompt) > MAX_CHARACTERS:
        raise FastsdError(f"{len(prompt)} characters; the longest that is read has {MAX_CHARACTERS}", argument="prompt")


def check_weight(text: str, weight: float) -> None:
    """Refuse a text whose weight is beyond `MAX_WEIGHT` with a FastsdError."""
    if not abs(weight) <= MAX_WEIGHT:
        raise FastsdError(
            f"the weight of {text[:40]!r} comes to {weight:g}; weights go from -100 to 100; for brackets that are "
            "part of a name write \\( and \\)",
            argument="prompt",
        )


def too_deep() -> FastsdError:
    """The error of more than `MAX_DEPTH` brackets within brackets."""
    return FastsdError(f"brackets are nested more than {MAX_DEPTH} deep; write \\( for a bracket", argument="prompt")


def take_loras(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its tags, and those of LoRAs in order.

    LoRAs are `<lora:name>`, `<lora:name:weight>` and `<lora:name:text:unet>`, and the same with `lyco`, which an
    extension of A1111 had for LyCORIS's files. As in A1111, `te=` and `unet=` name the two strengths, and the UNet's
    defaults to that of the text encoders. Any other `<word:name:number>` is taken out too, as A1111 does;
    `other_networks` finds those.

    Raises:
        FastsdError: a tag's name is empty, or a weight is not a number from -MAX_WEIGHT to MAX_WEIGHT; or the tag of
            a hypernetwork.
    """
    tags = []
    for found in _NETWORK.finditer(prompt):
        if found[1] == "hypernet":
            raise FastsdError(
                f"{found[0][:80]!r} is a hypernetwork, which fastsd does not read; take the tag out", argument="prompt"
            )
        if found[1] not in LORA_WORDS:
            continue
        name, *values = found[2].split(":")
        named = dict(value.split("=", 1) for value in values if "=" in value)
        placed = [value for value in values if "=" not in value]
        text = _weight(named.pop("te", placed[0] if placed else "1"))
        unet = _weight(named.pop("unet", placed[1])) if len(placed) > 1 else _weight(named.pop("unet", str(text)))
        if not name.strip() or named or len(placed) > 2 or text is None or unet is None:
            raise FastsdError(
                f"{found[0][:80]!r} should be <lora:name:weight> or <lora:name:text:unet> with weights from "
                "-100 to 100, as in <lora:lighthouse:0.8>",
                argument="prompt",
            )
        tags.append(LoraTag(name.strip(), text, unet))
    return _NETWORK.sub("", prompt), tuple(tags)


def other_networks(prompt: str) -> tuple[str, ...]:
    """The tags `<word:name:number>` of extra networks that are not known here, in order."""
    return tuple(found[0] for found in _NETWORK.finditer(prompt) if found[1] not in LORA_WORDS)


def _weight(number: str) -> float | None:
    """A tag's weight, or None where the text is not one."""
    value = float(number) if re.fullmatch(rf"\s*{_NUMBER}\s*", number) else math.nan
    return value if abs(value) <= MAX_WEIGHT else None


LORA_WORDS = ("lora", "lyco")
# A1111's extra networks (modules/extra_networks.py, `re_extra_net`); a LoRA's tag without a name is an error.
_NETWORK = re.compile(rf"<(lora|lyco|hypernet|\w+(?=:[^<>:]+:\s*{_NUMBER}\s*[:>])):([^<>]*)>")


def by_step(prompt: str, steps: int, before: int = 0) -> tuple[str, ...]:
    """The text of each step, `steps` of them, with schedules and alternations resolved.

    `[a:b:when]` is a in the first k steps and b after them; k is `when` if that has no decimal point, else `when *
    steps` rounded towards zero. `[b:when]` is nothing before, `[a::when]` nothing after. `[a|b|c]` is a in the first
    step, b in the second, c in the third, a in the fourth. The parts may be nested.

    Args:
        before: steps of a pass before this one, with which the numbers go on: k is `when - before`, or `(when - 1) *
            steps`.

    Raises:
        FastsdError: the text is too long, or its brackets are nested too deeply.
    """
    check_length(prompt)
    if "[" not in prompt:
        return (prompt,) * steps
    tree, changes = _read(prompt)
    return tuple(_at_step(tree, step, steps, before) for step in range(1, steps + 1)) if changes else (prompt,) * steps


@dataclass(frozen=True)
class _Schedule:
    before: list[_Item]
    after: list[_Item]
    number: str

    def at(self, step: int, steps: int, before: int) -> list[_Item]:
        number = float(self.number)
        when = (number - (before > 0)) * steps if "." in self.number else number - before
        return self.before if step <= int(max(0.0, min(when, steps))) else self.after


@dataclass(frozen=True)
class _Alternation:
    parts: list[list[_Item]]

    def at(self, step: int, steps: int, before: int) -> list[_Item]:
        return self.parts[(step - 1) % len(self.parts)]


# A text; a node; a bracketed group that holds nodes.
_Item = str | _Schedule | _Alternation | list


@dataclass
class _Open:
    """An open bracket. `marks`: positions in `items` of its separators, without those of inner groups."""

    bracket: str
    items: list[_Item] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def take(self, inner: _Open) -> None:
        """Treat the inner bracket as text."""
        self.items.append(inner.bracket)
        self.marks += [len(self.items) + mark for mark in inner.marks]
        self.items += inner.items

    def parts(self, marks: list[int]) -> list[list[_Item]]:
        """The items between the given separators."""
        starts = [0, *(mark + 1 for mark in marks)]
        return [self.items[start:end] for start, end in zip(starts, [*marks, len(self.items)])]


def _read(prompt: str) -> tuple[list[_Item], bool]:
    """The prompt as a tree, and whether anything in it changes over the steps.

    A closing bracket closes the nearest open one of its kind. Brackets opened in between are text, and so is a bracket
    without a partner.
    """
    stack = [_Open("")]
    changes = False
    for token in _TOKEN.findall(prompt):
        top = stack[-1]
        if token in "([":
            if len(stack) > MAX_DEPTH:
                raise too_deep()
            stack.append(_Open(token))
        elif token in "])":
            opening = "[" if token == "]" else "("
            at = next((i for i in range(len(stack) - 1, 0, -1) if stack[i].bracket == opening), 0)
            if not at:
                top.items.append(token)
                continue
            group, inner = stack[at], stack[at + 1 :]
            del stack[at:]
            for unclosed in inner:
                group.take(unclosed)
            item = _close(group) if token == "]" else [group.bracket, *group.items, token]
            changes = changes or not isinstance(item, list)
            stack[-1].items.append(item)
        else:
            if token in ":|":
                top.marks.append(len(top.items))
            top.items.append(token)
    root = stack[0]
    for unclosed in stack[1:]:
        root.take(unclosed)
    return root.items, changes


_TOKEN = re.compile(r"\\.|\\|[\[\]():|]|[^\\\[\]():|]+", re.S)


def _close(group: _Open) -> _Item:
    """The meaning of square brackets: a schedule if it ends in a number, an alternation if it has a bar, else text."""
    colons = [mark for mark in group.marks if group.items[mark] == ":"]
    if colons and len(colons) <= 2:
        *parts, last = group.parts(colons)
        number = _WHEN.fullmatch("".join(item if isinstance(item, str) else "[" for item in last))
        if number:
            return _Schedule([] if len(parts) == 1 else parts[0], parts[-1], number[1])
    bars = [mark for mark in group.marks if group.items[mark] == "|"]
    return _Alternation(group.parts(bars)) if bars else [group.bracket, *group.items, "]"]


_WHEN = re.compile(rf"\s*({_NUMBER}(?:[eE][+-]?[0-9]+)?)\s*")


def _at_step(tree: list[_Item], step: int, steps: int, before: int) -> str:
    done: list[str] = []
    todo: list[_Item] = list(reversed(tree))
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            done.append(item)
        else:
            todo += reversed(item if isinstance(item, list) else item.at(step, steps, before))
    return "".join(done)


def weigh(text: str) -> tuple[Section, ...]:
    """The weighted spans of one step's text, in sections that BREAK ends.

    `(a:1.2)` multiplies by the number, `(a)` by 1.1, `[a]` by 1 / 1.1; nested brackets multiply. An unclosed bracket
    reaches to the end of the text. A backslash escapes a bracket or a backslash. Neighbours of equal weight are one
    span.

    Raises:
        FastsdError: a weight beyond MAX_WEIGHT, a text that is too long, or brackets nested too deeply.
    """
    check_length(text)
    pieces: list[tuple[str | None, float]] = []  # None: BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for found in _PIECE.finditer(text):
        piece, number = found[0], found[1]
        if piece in opened:
            opened[piece].append(len(pieces))
            if sum(map(len, opened.values())) > MAX_DEPTH:
                raise too_deep()
        elif number is not None and opened["("]:
            multiply(opened["("].pop(), float(number))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        elif piece.startswith("\\"):
            pieces.append((piece[1:], 1.0))
        else:
            first, *rest = _BREAK.split(piece)
            pieces.append((first, 1.0))
            for part in rest:
                pieces += [(None, 1.0), (part, 1.0)]
    for factor, starts in ((ROUND, opened["("]), (SQUARE, opened["["])):
        for start in starts:
            multiply(start, factor)
    return _sections(pieces)


# An escaped bracket or backslash; a backslash before anything else, which is dropped; brackets; text.
_PIECE = re.compile(rf"\\[()\[\]\\]|\\|[(\[]|:\s*({_NUMBER})\s*\)|[)\]]|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


def _sections(pieces: list[tuple[str | None, float]]) -> tuple[Section, ...]:
    """Join neighbours of equal weight, and cut at BREAK (None)."""
    sections: list[list[Span]] = [[]]
    for text, weight in pieces:
        if text is None:
            sections.append([])
            continue
        check_weight(text, weight)
        if sections[-1] and sections[-1][-1].weight == weight:
            sections[-1][-1] = Span(sections[-1][-1].text + text, weight)
        elif text:
            sections[-1].append(Span(text, weight))
    return tuple(map(tuple, sections))
