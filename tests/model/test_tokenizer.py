"""The tokenizer against transformers' CLIPTokenizer, and with broken vocabularies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.model.tokenizer import BOS, EOS, Tokenizer

BUNDLED = Tokenizer()

PIECES = [
    *"a photo of an astronaut riding horse highly detailed 8k trending on artstation it's I'LL they've won't".split(),
    *[
        "ÉCOLE",
        "naïve",
        "e\u0301",
        "ﬁ",
        "İstanbul",
        "ẞ",
        "Straße",
        "Ωmega",
        "ДОМ",
        "こんにちは",
        "漢字",
        "한국어",
        "한",
    ],
    *["العربية", "שלום", "हिन्दी", "ไทย", "𝒻𝒶𝓃𝒸𝓎", "１２３", "٣", "½", "Ⅷ", "x²", "\u0345", "ǅ", "𐐀", "ﷺ"],
    *["😀", "👩\u200d🚀", "🏳️\u200d🌈", "👍🏽", "❤️", "🇩🇪", "\U0001f9ff"],
    *[
        "!",
        "!!!",
        "?!",
        "...",
        "—",
        "(masterpiece:1.2)",
        "[[x]]",
        "#tag",
        "@you",
        "<lora:x:0.8>",
        "a,b;c",
        "'s",
        "''",
        "`",
        "\\",
    ],
    *[BOS, EOS, EOS.upper(), EOS + "x", "<|endoftext", "<|", "|>", "</w>", "Ġ", "Ã©", "!</w>"],
    *["\x00", "\x01\x02", "\x1b[31m", "\x7f", "\x85", "\u200b", "\u200e", "\ufeff", "\ufffd", "\uffff", "\U0010ffff"],
    *["\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "  ", " \t ", "\x1c"],
    *["2024", "3.14", "1e-5", "0x1F", "a1b2", "antidisestablishmentarianism", "z" * 200],
]


def strings(count: int, seed: int) -> list[str]:
    """Deterministic strings of every kind: empty, short, pieces joined with and without blanks, random code points."""
    rng = random.Random(seed)

    def code_point() -> str:
        while True:
            point = rng.choice([rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)])
            if not 0xD800 <= point <= 0xDFFF:
                return chr(point)

    texts = ["", " ", "\n", "a", BOS, EOS, "hi!", "!"]
    while len(texts) < count:
        kind = rng.randrange(4)
        if kind == 0:
            texts.append("".join(code_point() for _ in range(rng.randrange(1, 40))))
        elif kind == 1:
            texts.append("".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 15))))
        else:  # longer than 77 tokens about half of the time
            texts.append(rng.choice([" ", ", ", "  "]).join(rng.choice(PIECES) for _ in range(rng.randrange(1, 90))))
    return texts


STRINGS = strings(2000, seed=0)


def write_folder(folder: Path, pad: str = EOS, legacy: bool = True) -> Path:
    """Write the bundled vocabulary as a tokenizer folder like those of the published Stable Diffusion checkpoints."""
    BUNDLED.save(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    if legacy:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        roles = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
        special = {role: {"content": text, **flags} for role, text in roles.items()}
        config = {role: {"__type": "AddedToken", **token} for role, token in special.items()}
        settings = {"pad_token": pad, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
        (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    return folder


def theirs(folder: Path) -> Callable[[list[str]], torch.Tensor]:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return lambda prompts: (
        tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    )


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == torch.int64 and ours.shape == expected.shape
    wrong = (ours != expected).any(dim=1).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} of {len(ours)} differ, the first: {STRINGS[wrong[0]]!r}"


def test_ids_of_the_published_prompt() -> None:
    """The ids of CLIP's own tokenizer for the prompt in Stable Diffusion's README."""
    ids = BUNDLED("a photo of an astronaut riding a horse")[0].tolist()
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558] + [49407] * 68
    assert len(BUNDLED) == 49408


def test_the_strings_are_long_and_short_and_differ() -> None:
    lengths = [len(BUNDLED.tokens(text)) for text in STRINGS]
    assert sum(length > 75 for length in lengths) > 200 and sum(length < 20 for length in lengths) > 200
    assert len(set(STRINGS)) > 1950


def test_the_bundled_vocabulary_agrees_with_transformers(tmp_path: Path) -> None:
    assert_same(BUNDLED(STRINGS), theirs(write_folder(tmp_path))(STRINGS))


@pytest.mark.parametrize("pad", [EOS, "!"], ids=["sd1", "sd2"])
@pytest.mark.parametrize("layout", ["published", "tokenizer.json", "saved by fastsd", "vocabulary only"])
def test_a_folder_agrees_with_transformers(tmp_path: Path, pad: str, layout: str) -> None:
    folder = write_folder(tmp_path / "written", pad, legacy=layout != "vocabulary only")
    if layout == "tokenizer.json":
        from transformers import CLIPTokenizer

        CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
        assert (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").exists()
    elif layout == "saved by fastsd":
        Tokenizer(folder).save(tmp_path / "saved")
        folder = tmp_path / "saved"
    ours = Tokenizer(folder)
    if layout != "vocabulary only":
        assert ours.pad_id == (0 if pad == "!" else 49407)
    sample = STRINGS[:500]  # layouts differ in their settings, which every string uses
    assert_same(ours(sample), theirs(folder)(sample))


def test_added_tokens_agree_with_transformers(tmp_path: Path) -> None:
    """Tokens beyond the vocabulary, such as those of textual inversion, keep their ids and match in the text."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(write_folder(tmp_path / "plain"))
    tokenizer.add_tokens(["<cat-toy>", "<Style>"])
    tokenizer.save_pretrained(tmp_path / "extended")
    prompts = ["a <cat-toy> in <style>", "a<cat-toy>", "<STYLE> <Cat-Toy>"]
    ours = Tokenizer(tmp_path / "extended")
    assert len(ours) == 49410 and ours("a <cat-toy>")[0, 2] == 49408
    assert_same(ours(prompts), theirs(tmp_path / "extended")(prompts))
    ours.save(tmp_path / "saved")
    assert_same(Tokenizer(tmp_path / "saved")(prompts), ours(prompts))
    # The older form: added_tokens.json beside the vocabulary.
    folder = write_folder(tmp_path / "older")
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49408, "<Style>": 49409}))
    assert_same(Tokenizer(folder)(prompts), theirs(folder)(prompts))


def test_model_max_length_sets_the_length(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for written, expected in ((16, 16), (10**30, 77)):  # transformers writes 10**30 for none
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": written}))
        ids = Tokenizer(folder)("word " * 100)
        assert ids.shape == (1, expected) and ids[0, -1] == 49407 and ids[0, -2] != 49407


def test_a_list_gives_the_rows_of_its_prompts() -> None:
    prompts = ["one", "two words", ""]
    batch = BUNDLED(prompts)
    assert batch.shape == (3, 77) and torch.equal(batch, torch.cat([BUNDLED(prompt) for prompt in prompts]))
    assert BUNDLED([]).shape == (0, 77)


def test_tokens_are_text() -> None:
    assert BUNDLED.tokens("A cat, Sleeping!") == ["a</w>", "cat</w>", ",</w>", "sleeping</w>", "!</w>"]


def test_truncated_is_the_end_of_the_prompt() -> None:
    assert BUNDLED.truncated("word " * 75) == ""
    assert BUNDLED.truncated("Word " * 75 + "Überrest  HERE") == "Überrest  HERE"
    for text in STRINGS:
        rest = BUNDLED.truncated(text)
        assert text.endswith(rest)
        assert bool(rest) == (len(BUNDLED.tokens(text)) > 75)
    # The part that fits has the same ids alone.
    text = "word " * 74 + "cat dog"
    assert torch.equal(BUNDLED(text.removesuffix(BUNDLED.truncated(text))), BUNDLED(text))


@pytest.mark.parametrize("prompt", [7, None, ["a", 7], b"a", "a \ud800", ["ok", "\udcff"]])
def test_bad_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(FastsdError, match="^prompt") as caught:
        BUNDLED(prompt)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("vocab.json", None, "missing"),
        ("merges.txt", None, "missing"),
        ("vocab.json", "{", "not valid JSON"),
        ("vocab.json", "[" * 100_000, "not valid JSON"),
        ("vocab.json", "[]", "JSON object"),
        ("vocab.json", "{}", "from tokens to ids"),
        ("vocab.json", '{"a": "b"}', "ids are whole numbers"),
        ("vocab.json", '{"a": -1}', "ids are whole numbers"),
        ("vocab.json", '{"a": 1.5}', "ids are whole numbers"),
        ("vocab.json", '{"a": 99999999999999}', "ids are whole numbers"),
        ("vocab.json", '{"a": 1, "b": 1}', "same id"),
        ("vocab.json", '{"a": 1, "b": 0}', "do not fit together"),
        ("vocab.json", b"\xff\xfe", "not UTF-8"),
        ("merges.txt", "a b c\n", "merge 1 must be two tokens"),
        ("merges.txt", "#version: 0.2\na\n", "merge 2 must be two tokens"),
        ("merges.txt", "qqqq zzzz\n", "do not fit together"),
        ("tokenizer_config.json", "nonsense", "not valid JSON"),
        ("tokenizer_config.json", '{"pad_token": 3}', "pad_token"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": 2}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": "<new>"}}', "has id 5"),
        ("special_tokens_map.json", '{"eos_token": {"content": 7}}', "eos_token"),
        ("added_tokens.json", '{"<new>": 7}', "has id 7"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "'BPE'"),
        ("tokenizer.json", '{"model": []}', "'BPE'"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}}}', "model.merges"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [3]}}', "merge"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [{}]}', "added_tokens"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": 3}', "added_tokens"),
    ],
)
def test_bad_folders_are_refused(tmp_path: Path, file: str, content: str | bytes | None, reason: str) -> None:
    folder = write_folder(tmp_path, legacy=False)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FastsdError, match=reason) as caught:
        Tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    if "fit together" not in reason and "has id" not in reason:
        assert file in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such tokenizer folder"):
        Tokenizer(tmp_path / "nothing")
