"""PEFT's patterns of layer names, matched in a time that a hostile file cannot stretch.

A pattern is a regular expression (PEFT's `get_pattern_key`). Python's `re` tries one way after another: each group of
`(.|a)(.|a)...` doubles its time. Here each part of a pattern maps the set of positions that the parts before it can
reach to those that it can reach, so the time is at most the product of the lengths of pattern and name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

MAX_LENGTH = 200  # characters of a pattern, and of a name that it can match; real names have up to 90
MAX_GROUPS = 20

Positions = set[int]  # between the characters of a name
Step = Callable[[str, Positions], Positions]

_PLAIN = re.compile(r"(?:[\w.-]|\\\.)+")  # a name, as PEFT writes most patterns; its dots stand for any character
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:|\{[0-9]{1,3}(?:,[0-9]{0,3})?\}|.", re.DOTALL)
# Tokens that stand for one character.
_ONE = re.compile(r"\\[dDwWsS\W_]|\[\^?(?:\\[dDwWsS\W_]|[^\[\]\\&~|])+\]|[^\\()|*+?{}\[\]^$]", re.DOTALL)
_REPEATS = {"*": (0, MAX_LENGTH), "+": (1, MAX_LENGTH), "?": (0, 1)}


@functools.lru_cache(4096)
def layer_matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a pattern matches all of a layer's name, or all that follows one of the name's dots.

    Groups, alternatives, classes, `^`, `$` and repeated characters are understood; a group may be optional, but not
    repeated.

    Raises:
        ValueError: too long, not a regular expression, or one with other parts.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {len(pattern)} characters; at most {MAX_LENGTH} are read")
    if _PLAIN.fullmatch(pattern):
        return functools.partial(_matches_plainly, re.compile(pattern), len(pattern.replace("\\", "")))
    if pattern.count("(") > MAX_GROUPS:
        raise ValueError(f"has more than {MAX_GROUPS} groups")
    tokens = _TOKEN.findall(pattern)[::-1]
    try:
        step = _alternatives(tokens)
    except re.error as error:  # a class such as [z-a]
        raise ValueError(f"is no regular expression ({error})") from error
    if tokens:
        raise ValueError("has a bracket too many")
    return functools.partial(_matches, step)


def _matches_plainly(pattern: re.Pattern[str], length: int, name: str) -> bool:
    start = len(name) - length
    return start >= 0 and (start == 0 or name[start - 1] == ".") and pattern.match(name, start) is not None


def _matches(step: Step, name: str) -> bool:
    if len(name) > MAX_LENGTH:
        return False
    return len(name) in step(name, {0, *(i + 1 for i, character in enumerate(name) if character == ".")})


def _alternatives(tokens: list[str]) -> Step:
    """The branches up to a closing bracket or the end; takes its tokens from the end of the list."""
    branches = [_sequence(tokens)]
    while tokens and tokens[-1] == "|":
        tokens.pop()
        branches.append(_sequence(tokens))
    return lambda name, at: set().union(*(branch(name, at) for branch in branches))


def _sequence(tokens: list[str]) -> Step:
    steps: list[Step] = []
    while tokens and tokens[-1] not in ("|", ")"):
        steps.append(_part(tokens))
    return lambda name, at: functools.reduce(lambda reached, step: step(name, reached), steps, at)


def _part(tokens: list[str]) -> Step:
    token = tokens.pop()
    if token == "^":
        return lambda name, at: at & {0}
    if token == "$":
        return lambda name, at: at & {len(name)}
    if token in ("(", "(?:"):
        group = _alternatives(tokens)
        if not tokens or tokens.pop() != ")":
            raise ValueError("has a bracket that is not closed")
        repeats = _repeats(tokens)
        if repeats not in ((1, 1), (0, 1)):
            raise ValueError("repeats a group")
        return group if repeats == (1, 1) else lambda name, at: at | group(name, at)
    if not _ONE.fullmatch(token):
        raise ValueError(f"has {token!r} where fastsd reads none")
    return functools.partial(_repeated, re.compile(token), *_repeats(tokens))


def _repeats(tokens: list[str]) -> tuple[int, int]:
    """The least and the largest number of times that what stands before may occur."""
    token = tokens[-1] if tokens else ""
    if token not in _REPEATS and not re.fullmatch(r"\{.+\}", token):
        return 1, 1
    tokens.pop()
    if tokens and tokens[-1] == "?":
        tokens.pop()  # lazy: the same where a whole name is matched
    if token in _REPEATS:
        return _REPEATS[token]
    least, comma, most = token[1:-1].partition(",")
    return int(least), min(int(most or MAX_LENGTH) if comma else int(least), MAX_LENGTH)


def _repeated(one: re.Pattern[str], least: int, most: int, name: str, at: Positions) -> Positions:
    """The positions after `least` to `most` characters that are all like `one`."""
    reached: Positions = set()
    for count in range(most + 1):
        if count >= least:
            at = at - reached  # from the others it went on earlier
            reached |= at
        if not at:
            break
        at = {i + 1 for i in at if i < len(name) and one.fullmatch(name[i])}
    return reached
