"""The emoji data set: images with captions, and captions that are held out.

What is held out has parts that occur elsewhere. Most of it is whole images: a woman firefighter with medium skin tone,
whose trade is seen in other skin tones, and whose skin tone is seen in other trades. The rest is one caption of an
image that is seen under others, in an order of words that is seen of other emoji.
"""

from __future__ import annotations

import json
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastsd.data.emoji_font import Bitmap, read_bitmaps, render
from fastsd.data.emoji_names import FILES, Caption, EmojiName, captions, fallback, plain, ranked, read_cldr, take_apart
from fastsd.errors import FastsdError
from fastsd.files import fingerprint, reason, replace_whole

WHOLE_SHARE = 0.8  # of the held-out captions: those of whole images
LEAST_VARIANTS = 3  # images of a head of which one may be held out
MAX_SIDE = 1024
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class Emoji:
    """One image and its captions: `text`, the symbol; `names`, CLDR's; `bitmap` as in the font."""

    text: str
    names: tuple[str, ...]
    bitmap: Bitmap
    captions: tuple[Caption, ...]
    held_out: dict[str, str] = field(default_factory=dict)  # caption to "parts" or "order"

    @property
    def file_name(self) -> str:
        """ "1f469-1f3fd-200d-1f692.png"."""
        return "-".join(f"{ord(character):x}" for character in self.text) + ".png"


def describe(bitmaps: list[Bitmap], cldr: dict[str, tuple[str, tuple[str, ...]]]) -> list[Emoji]:
    """The emoji of a font with all their captions; a caption that would mean two images belongs to neither.

    Every emoji keeps a caption: where nothing else is left, its name with the code points.
    """
    named = []
    for bitmap in bitmaps:
        known = [text for text in bitmap.texts if text in cldr]
        text = (known or list(bitmap.texts) or [""])[0]
        names = [cldr[other][0] for other in known] or [fallback(text) or ""]
        if text and names[0]:
            keywords = tuple(word for other in known for word in cldr[other][1])
            named.append((text, names, keywords, bitmap))
    others: dict[str, set[EmojiName]] = defaultdict(set)
    for _, names, keywords, _ in named:
        for word in keywords:
            others[plain(word)] |= {replace(take_apart(name), looks=()) for name in names}
    all_ = [(text, names, bitmap, captions(text, names, words, others)) for text, names, words, bitmap in named]
    meanings: dict[str, set[bytes]] = defaultdict(set)
    for _, _, bitmap, found in all_:
        for caption in found:
            meanings[caption.text].add(bitmap.png)
    emoji = []
    for text, names, bitmap, found in all_:
        clear = [caption for caption in found if len(meanings[caption.text]) == 1]
        codes = " ".join(f"u+{ord(character):x}" for character in text)
        clear = clear or [Caption(f"{plain(names[0])} {codes}", "name")]
        emoji.append(Emoji(text, tuple(names), bitmap, tuple(clear)))
    return emoji


def hold_out(emoji: list[Emoji], share: float, seed: int) -> list[Emoji]:
    """The same emoji, with `share` of all captions held out, or as many as there are to hold out."""
    budget = round(share * sum(len(one.captions) for one in emoji))
    groups: dict[EmojiName, list[Emoji]] = defaultdict(list)
    for one in emoji:
        name = take_apart(one.names[0])
        if name.head not in ("flag", "keycap"):
            groups[replace(name, looks=())].append(one)
    heads = defaultdict(set)  # of each look
    for own, ones in groups.items():
        for one in ones:
            for look in take_apart(one.names[0]).looks:
                heads[look].add(own)
    held: dict[str, dict[str, str]] = {}
    left = round(WHOLE_SHARE * budget)
    for own in sorted(groups, key=lambda name: ranked(seed, name.head, *name.people)):
        variants = [one for one in groups[own] if take_apart(one.names[0]).looks]
        chosen = min(variants, key=lambda one: ranked(seed, one.text), default=None)
        if left <= 0 or chosen is None or len(groups[own]) < LEAST_VARIANTS:
            continue
        if all(len(heads[look]) > 1 for look in take_apart(chosen.names[0]).looks):
            held[chosen.text] = {caption.text: "parts" for caption in chosen.captions}
            left -= len(chosen.captions)
    left = budget - sum(len(texts) for texts in held.values())
    for one in sorted(emoji, key=lambda one: ranked(seed, "order", one.text)):
        order = [caption.text for caption in one.captions if caption.form == "order"]
        if left > 0 and order and one.text not in held and len(one.captions) > len(order):
            held[one.text] = dict.fromkeys(order, "order")
            left -= len(order)
    return [replace(one, held_out=held.get(one.text, {})) for one in emoji]


def write(
    out: Path,
    *,
    font: Path,
    licence: Path,
    cldr: Path,
    side: int,
    held_out: float,
    seed: int,
    overwrite: bool,
) -> dict[str, int]:
    """Write the data set to `out`: train/ and held_out/ with images and metadata.jsonl, dataset.json, the licences.

    Returns:
        The counts, by what they count.

    Raises:
        FastsdError: a file is missing or unreadable, a number is out of range, `out` exists.
    """
    if not 8 <= side <= MAX_SIDE:
        raise FastsdError(f"it should be 8 to {MAX_SIDE}", argument="--side", value=side)
    if not 0 <= held_out <= 0.5:
        raise FastsdError("it should be 0 to 0.5", argument="--held-out", value=held_out)
    if out.exists() and not overwrite:
        raise FastsdError("the folder exists; --overwrite replaces it", argument="--out", path=out)
    if out.exists() and not (out / "dataset.json").is_file():
        raise FastsdError("the folder exists and holds no data set; choose another", argument="--out", path=out)
    emoji = hold_out(describe(read_bitmaps(font), read_cldr(cldr)), held_out, seed)
    if not emoji:
        raise FastsdError("none of its bitmaps has a name", argument="--font", path=font)
    licences = {"LICENSE.font.txt": _read(licence, "--font-licence")}
    for name, file in zip(("LICENSE.cldr.txt", "LICENSE.cldr-derived.txt"), FILES.values()):
        licences[name] = _read(cldr / file.split("/")[0] / "LICENSE", "--cldr")
    counts = {
        "images": len(emoji),
        "training captions": sum(len(one.captions) - len(one.held_out) for one in emoji),
        "held-out captions of new parts": sum(kind == "parts" for one in emoji for kind in one.held_out.values()),
        "held-out captions of a new order": sum(kind == "order" for one in emoji for kind in one.held_out.values()),
        "held-out images": sum(len(one.captions) == len(one.held_out) for one in emoji),
    }
    record = {
        "font": {"file": font.name, "sha256": fingerprint(_read(font, "--font"))},
        "cldr": {file: fingerprint(_read(cldr / file, "--cldr")) for file in FILES.values()},
        "unicode": unicodedata.unidata_version,
        "side": side,
        "held_out": held_out,
        "seed": seed,
        "counts": counts,
    }
    try:
        with replace_whole(out, folder=True) as new:
            _write_split(new / TRAIN, [(one, _seen(one)) for one in emoji], side)
            _write_split(new / HELD_OUT, [(one, list(one.held_out)) for one in emoji], side)
            for name, text in licences.items():
                (new / name).write_bytes(text)
            (new / "dataset.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FastsdError(reason(error), argument="--out", path=out) from error
    return counts


def _seen(one: Emoji) -> list[str]:
    return [caption.text for caption in one.captions if caption.text not in one.held_out]


def _write_split(folder: Path, rows: list[tuple[Emoji, list[str]]], side: int) -> None:
    """Images that have captions here, and metadata.jsonl: a line for each with its file's name and its captions."""
    folder.mkdir()
    lines = []
    for one, texts in rows:
        if texts:
            render(one.bitmap.png, side).save(folder / one.file_name, optimize=True)
            row = {"file_name": one.file_name, "text": texts, "emoji": one.text, "name": one.names[0]}
            kinds = sorted({one.held_out[text] for text in texts if text in one.held_out})
            lines.append(json.dumps(row | ({"held_out": kinds[0]} if kinds else {}), ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _read(path: Path, argument: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FastsdError(reason(error), argument=argument, path=path) from error
