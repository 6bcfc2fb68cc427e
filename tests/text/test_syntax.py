"""The prompt's language, against a table worked out by hand from the rules in docs/prompts.md."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.text.syntax import MAX_DEPTH, LoraTag, Span, by_step, take_loras, weigh

UP, DOWN = 1.1, 1 / 1.1

WEIGHTS = [
    # (text, sections of (piece, weight))
    ("a red cat", [[("a red cat", 1)]]),
    ("", [[]]),
    # one pair of brackets, with and without a number
    ("a (red) cat", [[("a ", 1), ("red", UP), (" cat", 1)]]),
    ("a [red] cat", [[("a ", 1), ("red", DOWN), (" cat", 1)]]),
    ("a (red:1.5) cat", [[("a ", 1), ("red", 1.5), (" cat", 1)]]),
    ("(red:.5)(blue:2.)(green:+3)", [[("red", 0.5), ("blue", 2), ("green", 3)]]),
    ("(red: 1.5 )", [[("red", 1.5)]]),  # blanks around the number
    ("(fog:-1)", [[("fog", -1)]]),
    ("(fog:0)", [[("fog", 0)]]),
    # nesting multiplies
    ("((red))", [[("red", UP * UP)]]),
    ("[[red]]", [[("red", DOWN * DOWN)]]),
    ("(a (red:2) cat:1.5)", [[("a ", 1.5), ("red", 3), (" cat", 1.5)]]),
    ("([red])", [[("red", 1 / 1.1 * 1.1)]]),
    # the number's bracket is the innermost one
    ("((red:2) cat)", [[("red", 2 * UP), (" cat", UP)]]),
    # neighbours of one weight are one piece, so that they are one text for the tokenizer
    ("(re)(d)", [[("red", UP)]]),
    ("(re:1)d", [[("red", 1)]]),
    # what is not closed reaches to the end; what was not opened is text
    ("a (red cat", [[("a ", 1), ("red cat", UP)]]),
    ("a [red cat", [[("a ", 1), ("red cat", DOWN)]]),
    ("a red) cat]", [[("a red) cat]", 1)]]),
    ("red:1.5) cat", [[("red:1.5) cat", 1)]]),
    # what is no number is text
    ("(red:)", [[("red:", UP)]]),
    ("(red:1.2.3)", [[("red:1.2.3", UP)]]),
    ("(red:blue)", [[("red:blue", UP)]]),
    ("(red:1e2)", [[("red:1e2", UP)]]),
    ("at 12:30", [[("at 12:30", 1)]]),
    # escapes
    (r"a \(red\) cat", [[("a (red) cat", 1)]]),
    (r"\[red\:1\]", [[("[red:1]", 1)]]),  # a backslash before anything else vanishes
    (r"(red\):1.5)", [[("red)", 1.5)]]),
    (r"a \\ b", [[("a \\ b", 1)]]),
    ("a \\", [[("a ", 1)]]),
    # BREAK
    ("a BREAK b", [[("a", 1)], [("b", 1)]]),
    ("a\nBREAK\nb", [[("a", 1)], [("b", 1)]]),
    ("BREAK a", [[], [("a", 1)]]),
    ("a BREAK BREAK b", [[("a", 1)], [], [("b", 1)]]),
    ("a BREAK", [[("a", 1)], []]),
    ("(a BREAK b:1.5) c", [[("a", 1.5)], [("b", 1.5), (" c", 1)]]),
    ("BREAKFAST break", [[("BREAKFAST break", 1)]]),
]


@pytest.mark.parametrize(("text", "expected"), WEIGHTS, ids=[text for text, _ in WEIGHTS])
def test_weights(text: str, expected: list[list[tuple[str, float]]]) -> None:
    found = weigh(text)
    assert [[span.text for span in section] for section in found] == [[t for t, _ in section] for section in expected]
    for section, wanted in zip(found, expected, strict=True):
        assert [span.weight for span in section] == pytest.approx([w for _, w in wanted], rel=1e-15)


SCHEDULES = [
    # (text, steps, the last step and text of each part)
    ("a cat", 4, [(4, "a cat")]),
    # a in the first k steps, b after them
    ("[a:b:2]", 5, [(2, "a"), (5, "b")]),
    ("x [a:b:0.5] y", 10, [(5, "x a y"), (10, "x b y")]),
    ("[a:b:0.5]", 5, [(2, "a"), (5, "b")]),  # 2.5 steps are 2
    ("[a:b:.25]", 20, [(5, "a"), (20, "b")]),
    ("[a:b:1]", 4, [(1, "a"), (4, "b")]),  # without a point: a step
    ("[a:b:1.0]", 4, [(4, "a")]),  # with one: all steps
    ("[a:b:12]", 20, [(12, "a"), (20, "b")]),
    ("[a:b:12]", 8, [(8, "a")]),
    ("[a:b:0]", 4, [(4, "b")]),
    ("[a:b:-3]", 4, [(4, "b")]),
    ("[a:b:1e999]", 4, [(4, "a")]),
    ("[a:b: 2 ]", 4, [(2, "a"), (4, "b")]),
    # one part only
    ("x[b:0.5]", 4, [(2, "x"), (4, "xb")]),
    ("x[:b:0.5]", 4, [(2, "x"), (4, "xb")]),
    ("x[a::0.5]", 4, [(2, "xa"), (4, "x")]),
    # nested
    ("[[a:b:1]:c:3]", 4, [(1, "a"), (3, "b"), (4, "c")]),
    ("[a:[b:c:3]:1]", 4, [(1, "a"), (3, "b"), (4, "c")]),
    ("[a|[b:c:2]]", 4, [(1, "a"), (2, "b"), (3, "a"), (4, "c")]),
    ("[[a|b]:c:2]", 4, [(1, "a"), (2, "b"), (4, "c")]),
    ("([a:b:2]:1.3)", 4, [(2, "(a:1.3)"), (4, "(b:1.3)")]),
    ("[(a:1.3):b:2]", 4, [(2, "(a:1.3)"), (4, "b")]),
    ("[([a|b]):c:2]", 4, [(1, "(a)"), (2, "(b)"), (4, "c")]),
    # alternation
    ("[a|b]", 4, [(1, "a"), (2, "b"), (3, "a"), (4, "b")]),
    ("[a|b|c] d", 4, [(1, "a d"), (2, "b d"), (3, "c d"), (4, "a d")]),
    ("[fe|]male", 3, [(1, "female"), (2, "male"), (3, "female")]),
    ("[a:x|b]", 2, [(1, "a:x"), (2, "b")]),
    # what is none of it stays as it is
    ("[a] b", 4, [(4, "[a] b")]),
    ("[a:b]", 4, [(4, "[a:b]")]),
    ("[a:b:c]", 4, [(4, "[a:b:c]")]),
    ("[a:b:c:2]", 4, [(4, "[a:b:c:2]")]),
    ("a | b : 2", 4, [(4, "a | b : 2")]),
    ("[a:b:2", 4, [(4, "[a:b:2")]),
    (r"\[a:b:2\]", 4, [(4, r"\[a:b:2\]")]),
    (r"[a\|b]", 4, [(4, r"[a\|b]")]),
    (r"[a\:x:b:2]", 4, [(2, r"a\:x"), (4, "b")]),
    # a bracket without a partner is text, also within another pair
    ("[a ( x|b] c", 2, [(1, "a ( x c"), (2, "b c")]),
    ("[a ) x|b]", 2, [(1, "a ) x"), (2, "b")]),
    ("(a [b) [c:d:1]", 2, [(1, "(a [b) c"), (2, "(a [b) d")]),
    ("[a|b:0.5]", 2, [(1, ""), (2, "a|b")]),  # a number at the end makes a schedule
]


@pytest.mark.parametrize(("text", "steps", "parts"), SCHEDULES, ids=[f"{t}-{n}" for t, n, _ in SCHEDULES])
def test_schedules(text: str, steps: int, parts: list[tuple[int, str]]) -> None:
    expected: list[str] = []
    for last, part in parts:
        expected += [part] * (last - len(expected))
    assert list(by_step(text, steps)) == expected


def test_loras_are_taken_out() -> None:
    text, tags = take_loras("a <lora:ink:0.8>cat<lora:two words> [<lora:x.y-z: -1 >:0.5]")
    assert text == "a cat [:0.5]"
    assert tags == (LoraTag("ink", 0.8, 0.8), LoraTag("two words", 1.0, 1.0), LoraTag("x.y-z", -1.0, -1.0))
    assert take_loras("a < b <lore:x> <lora") == ("a < b <lore:x> <lora", ())


@pytest.mark.parametrize(
    ("tag", "text", "unet"),
    [  # as A1111 reads them: by place, by name, and a name before a place
        ("0.5:0.8", 0.5, 0.8),
        ("te=0.5", 0.5, 0.5),
        ("unet=0.5", 1.0, 0.5),
        ("0.5:unet=0.8", 0.5, 0.8),
        ("unet=0.8:te=0.5", 0.5, 0.8),
        ("0.3:0.8:te=0.5", 0.5, 0.8),
        ("0:1", 0.0, 1.0),
    ],
)
def test_two_strengths_of_a_lora(tag: str, text: float, unet: float) -> None:
    assert take_loras(f"<lora:a:{tag}>")[1] == (LoraTag("a", text, unet),)


@pytest.mark.parametrize("tag", ["<lora:a:1:2:3>", "<lora:a:1:>", "<lora:a:te=>", "<lora:a:1:dyn=4>", "<lora:a:1:200>"])
def test_what_is_no_strength_of_a_lora(tag: str) -> None:
    with pytest.raises(FastsdError, match="<lora:name:text:unet>"):
        take_loras(tag)


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::1>", "<lora:a:>", "<lora:a:b>", "<lora:a:1e9>"])
def test_a_bad_tag_is_named(tag: str) -> None:
    with pytest.raises(FastsdError, match="<lora:name:weight>") as caught:
        take_loras(f"a {tag}")
    assert tag in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["(a:101)", "((a:11):11)", "(" * (MAX_DEPTH + 1), "[(" * MAX_DEPTH, "a" * 100_001, "(a:" + "9" * 400 + ")"]
)
def test_beyond_the_limits(text: str) -> None:
    with pytest.raises(FastsdError, match="prompt") as caught:
        weigh(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


PIECES = [
    "a",
    "b ",
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "0.5",
    ":1.2)",
    ":3]",
    "\\",
    "BREAK",
    "<lora:x:1>",
    ",",
    " ",
    "é",
    "\n",
]
texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60)


@settings(max_examples=400, deadline=None)
@given(texts, st.integers(1, 12))
def test_any_text_is_read(text: str, steps: int) -> None:
    """Never another exception than ours; each step's text is made of the prompt's characters, in their order."""
    try:
        found = by_step(take_loras(text)[0], steps)
    except FastsdError:
        return
    assert len(found) == steps
    for one in found:
        remaining = iter(text)
        assert all(character in remaining for character in one)
        try:
            sections = weigh(one)
        except FastsdError:
            continue
        assert all(a.weight != b.weight and a.text for section in sections for a, b in itertools.pairwise(section))


@given(st.text(st.characters(exclude_characters="()[]\\:<"), max_size=40).filter(lambda text: "BREAK" not in text))
def test_text_without_signs_is_itself(text: str) -> None:
    assert by_step(text, 3) == (text,) * 3
    assert weigh(text) == (((Span(text),) if text else ()),)


@given(st.text(max_size=40).filter(lambda text: "BREAK" not in text))
def test_escaped_text_is_itself(text: str) -> None:
    """A backslash before each sign makes any text come out as it was."""
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert by_step(escaped, 3) == (escaped,) * 3
    assert "".join(span.text for section in weigh(escaped) for span in section) == text
    assert all(span.weight == 1.0 for section in weigh(escaped) for span in section)


@given(st.integers(1, 50), st.integers(-5, 60), st.booleans())
def test_a_schedule_changes_after_its_step(steps: int, when: int, fraction: bool) -> None:
    number = f"{when / 50!r}" if fraction else str(when)
    found = by_step(f"[a:b:{number}]", steps)
    first = int(when / 50 * steps) if fraction else when
    first = max(0, min(first, steps))
    assert found == ("a",) * first + ("b",) * (steps - first)
