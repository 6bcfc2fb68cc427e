"""Captions of emoji, from Unicode's names and CLDR's names and keywords.

CLDR names a sequence by a head and parts, "woman firefighter: medium skin tone". Every caption here is plain ASCII in
lower case, as a prompt is typed.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsd.errors import FastsdError
from fastsd.files import reason

FILES = {
    "annotations": "cldr-annotations-full/annotations/en/annotations.json",
    "annotationsDerived": "cldr-annotations-derived-full/annotationsDerived/en/annotations.json",
}
MAX_BYTES = 2**24  # of one of CLDR's files, which take half a megabyte
PEOPLE = ("woman", "man", "person", "boy", "girl", "adult", "child")
_LOOKS = {"bald": "a bald head", "beard": "a beard"}  # "with ..."; every other part is named as it is
_SMALL_WORDS = {"with", "and", "of", "in", "on", "for", "the", "a", "to", "without", "at", "from", "over"}
_MARKS = {"*": "asterisk", "#": "number sign"}  # of keycaps
_KEYWORD = re.compile(r"[a-z0-9][a-z0-9' -]*")


@dataclass(frozen=True)
class EmojiName:
    """A CLDR name taken apart.

    Attributes:
        head: "woman firefighter", "kiss".
        people: who is in it, "woman", "man", after the head's colon.
        looks: what else stands there: "medium skin tone", "red hair", "facing right".
    """

    head: str
    people: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Caption:
    """A caption, and its form: "name", "article", "emoji", "order", "front", "keywords", ..."""

    text: str
    form: str


def read_cldr(folder: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """CLDR's English names and keywords by the text of a symbol, from the two packages in `folder`.

    Raises:
        FastsdError: a file is missing, too large, or holds something else.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for key, name in FILES.items():
        path = folder / name
        try:
            if path.stat().st_size > MAX_BYTES:
                raise FastsdError("is too large for CLDR's annotations", argument="--cldr", path=path)
            symbols = json.loads(path.read_bytes())[key]["annotations"]
            for symbol, entry in symbols.items():
                found[symbol] = (str(entry["tts"][0]), tuple(str(word) for word in entry.get("default", ())))
        except OSError as error:
            raise FastsdError(
                f"{reason(error)}; npm install cldr-annotations-full cldr-annotations-derived-full makes it, "
                "in its folder node_modules",
                argument="--cldr",
                path=path,
            ) from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, FastsdError):
                raise
            raise FastsdError("holds no annotations of CLDR", argument="--cldr", path=path) from error
    return found


def plain(text: str) -> str:
    """`text` in lower-case ASCII without marks: "O’Hare & Sons" becomes "o'hare and sons"."""
    text = text.replace("’", "'").replace("&", " and ")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[\"“”()!?.:;<>/]", " ", text.replace(".", "")).split()).strip(" ,-'")


def take_apart(name: str) -> EmojiName:
    """The parts of a CLDR name."""
    head, _, rest = name.partition(":")
    parts = [_MARKS.get(part.strip(), plain(part)) for part in rest.split(",") if part.strip()]
    people = tuple(part for part in parts if part in PEOPLE)
    return EmojiName(plain(head), people, tuple(part for part in parts if part not in PEOPLE))


def fallback(text: str) -> str | None:
    """A name for a symbol that CLDR leaves out: Unicode's, or the code of a region's flag; None without either."""
    if len(text) == 1:
        name = unicodedata.name(text, "").lower()
        return name.replace("regional indicator symbol", "regional indicator") or None
    if "\U0001f3f4" in text and text.endswith("\U000e007f"):  # tags spell "usca"; without any, the flag is unknown
        code = "".join(chr(ord(tag) - 0xE0000) for tag in text.strip("\U0001f3f4\U000e007f"))
        return f"flag: {code[:2]} {code[2:]} region" if code else "flag: unknown region"
    return None


def captions(
    text: str, names: list[str], keywords: tuple[str, ...], others: Mapping[str, set[EmojiName]]
) -> list[Caption]:
    """The captions of one symbol, without doubles.

    Args:
        text: the symbol. names: CLDR's names of it, several where several flags look the same.
        keywords: CLDR's.
        others: for each keyword the names, without looks, that have it: three keywords are a caption where they mean
            this name alone.
    """
    found: dict[str, str] = {}
    for whole in names:
        name = take_apart(whole)
        if name.head in ("flag", "keycap"):
            pairs = _labelled(name)
        else:
            pairs = [*_forms(name), *_by_keywords(name, keywords, others)]
        for form, caption in pairs:
            found.setdefault(caption, form)
    if len(text) == 1:
        own = plain(unicodedata.name(text, ""))
        if own:
            found.setdefault(own, "unicode")
    return [Caption(caption, form) for caption, form in found.items()]


def _labelled(name: EmojiName) -> list[tuple[str, str]]:
    """Captions of "flag: Norway" and "keycap: 1"."""
    what = ", ".join(name.looks)
    if name.head == "flag":
        return [
            ("name", f"flag of {what}"),
            ("article", f"the flag of {what}"),
            ("front", f"{what} flag"),
            ("emoji", f"flag emoji of {what}"),
            ("order", f"{what}, flag"),
        ]
    return [("name", f"keycap {what}"), ("article", f"a keycap with {what}"), ("front", f"{what} keycap")]


def _forms(name: EmojiName) -> list[tuple[str, str]]:
    """Captions of a head with and without looks."""
    whole = with_people(name)
    pairs = [("name", ", ".join((whole, *name.looks))), ("emoji", f"emoji of {_with_looks(whole, name.looks)}")]
    if _takes_article(name.head):
        pairs.append(("article", f"{_article(whole)} {_with_looks(whole, name.looks)}"))
    other = _other_gender(whole)
    if other:
        pairs.append(("gender", _with_looks(other, name.looks)))
    if name.looks:
        pairs += [("with", _with_looks(whole, name.looks)), ("front", f"{', '.join(name.looks)} {whole}")]
    else:
        order = _other_order(whole)
        pairs += [("order", order)] if order else []
    return pairs


def with_people(name: EmojiName) -> str:
    """ "kiss of woman and man"."""
    return f"{name.head} of {_listed(name.people)}" if name.people else name.head


def _with_looks(whole: str, looks: tuple[str, ...]) -> str:
    """ "man walking with light skin tone facing right"."""
    has = [_LOOKS.get(look, look) for look in looks if not look.startswith("facing")]
    faces = [look for look in looks if look.startswith("facing")]
    return " ".join([whole, *(["with " + _listed(has)] if has else []), *faces])


def _listed(words: tuple[str, ...] | list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def _takes_article(head: str) -> bool:
    first, last = head.split(" ")[0], head.split(" ")[-1]
    many = first in ("people", "men", "women", "two") or (last.endswith("s") and not last.endswith("ss"))
    return not many and " and " not in head


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _other_gender(whole: str) -> str | None:
    """ "female firefighter" for "woman firefighter"; None where the second word is no trade."""
    words = whole.split(" ")
    if words[0] not in ("woman", "man") or len(words) < 2 or words[1].endswith("ing") or words[1] in _SMALL_WORDS:
        return None
    return " ".join(["female" if words[0] == "woman" else "male", *words[1:]])


def _other_order(whole: str) -> str | None:
    """ "heart, red" for "red heart", "sunglasses, smiling face" for "smiling face with sunglasses"; None for others."""
    words = whole.split(" ")
    if 2 <= len(words) <= 3 and not _SMALL_WORDS & set(words):
        return f"{words[-1]}, {' '.join(words[:-1])}"
    first, joint, second = whole.partition(" with ")
    return f"{second}, {first}" if joint and " with " not in second else None


def _by_keywords(
    name: EmojiName, keywords: tuple[str, ...], others: Mapping[str, set[EmojiName]]
) -> list[tuple[str, str]]:
    """The name with two keywords, twice, and three keywords that mean this name alone."""
    whole, taken = with_people(name), set(with_people(name).split(" "))
    words = sorted({plain(word) for word in keywords} - taken - set(name.looks), key=lambda word: ranked(whole, word))
    words = [word for word in words if _KEYWORD.fullmatch(word) and not word.endswith("skin tone")]
    pairs = [("keywords", ", ".join((_with_looks(whole, name.looks), *words[k : k + 2]))) for k in (0, 2) if words[k:]]
    own = EmojiName(name.head, name.people)
    for k in range(max(len(words) - 2, 0)):
        three = words[k : k + 3]
        if set.intersection(*(others.get(word, set()) for word in three)) == {own}:
            pairs.append(("keywords alone", ", ".join((*three, *name.looks))))
            break
    return pairs


def ranked(*words: object) -> str:
    """A text to sort by that looks random, and is the same everywhere."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()
