"""Patterns of layer names against Python's `re`, and those that would keep `re` busy."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd.weights.adapters.layer_patterns import MAX_LENGTH, layer_matcher

NAME = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (NAME, True),
        ("attn1.to_out.0", True),
        ("tn1.to_out.0", False),  # only whole parts of a name
        ("attn1.to_out", False),
        (r"attn1\.to_out\.0", True),
        (f"^{NAME}$", True),
        ("^attn1.to_out.0", False),
        (r".*\.attn[12]\.to_(q|k|v|out\.0)", True),
        (r"(down|mid)_blocks\.\d+\..*?", True),
        (r"down_blocks\.\d{2,}\..*", False),
        (r"(?:up_blocks.*)?to_out.\w", True),
    ],
)
def test_patterns_as_peft_has_them(pattern: str, matches: bool) -> None:
    """PEFT 0.21, `get_pattern_key`: `re.match(rf"(.*\\.)?({key})$", name)`."""
    assert layer_matcher(pattern)(NAME) is matches
    assert (re.match(rf"(.*\.)?({pattern})$", NAME) is not None) is matches


ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$"])
PARTS = st.tuples(ATOMS, st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "{0,}", "*?"])).map(
    lambda part: part[0] + (part[1] if part[0] not in "^$" else "")
)
PATTERNS = st.recursive(
    st.lists(PARTS, min_size=1, max_size=4).map("".join),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("|".join), inner.map(lambda p: f"({p})"), inner.map(lambda p: f"(?:{p})?")
    ),
    max_leaves=4,
)


@given(pattern=PATTERNS, name=st.text("ab.", max_size=7))
def test_any_pattern_matches_as_in_re(pattern: str, name: str) -> None:
    assert layer_matcher(pattern)(name) == (re.match(rf"(.*\.)?({pattern})\Z", name) is not None)


@pytest.mark.parametrize("pattern", ["(.|a)" * 20 + "!", ".?" * 90 + "!", ".*" * 90 + "!", "a{0,200}" * 20 + "!"])
def test_patterns_that_branch_endlessly_take_no_time(pattern: str) -> None:
    """A backtracking matcher tries 2^20 ways or more."""
    assert not layer_matcher(pattern)("a" * MAX_LENGTH)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a+)+b", "repeats a group"),
        ("(a", "not closed"),
        ("a)*", "a bracket too many"),
        ("(a|b", "not closed"),
        ("[z-a]", "no regular expression"),
        ("[[a]]", "has '[[a]'"),
        (r"(a)\1", "where fastsd reads none"),
        ("(?=a)a", "where fastsd reads none"),
        ("a" * 201, "at most 200"),
        ("(" * 60 + ")" * 60, "more than 20 groups"),
    ],
)
def test_refused_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        layer_matcher(pattern)
    assert reason in str(caught.value)
