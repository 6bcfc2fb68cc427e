"""CLIP's tokenizer: text to the 77 ids that the text encoder reads.

Lower-cased byte-pair encoding (Sennrich et al. 2016) over bytes, with "</w>" at the end of each word, as in Radford
et al. 2021, section 2.4. The ids equal those of transformers' `CLIPTokenizer`, quirks included: added tokens, such as
the padding "!" of Stable Diffusion 2, match anywhere in the text, before it is split into words.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from fastsd.errors import FastsdError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77  # positions of the CLIP text encoders of Stable Diffusion
BUNDLED_MERGES = Path(__file__).parent.parent / "assets" / "clip_vocab" / "merges.txt.gz"

# Start and end; contractions; runs of letters; single digits; runs of everything else.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_LONGEST = 8192  # a model_max_length above it means "none" (transformers writes 10**30)

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


class Tokenizer:
    """Text to ids, with the bundled CLIP vocabulary or that of a checkpoint's folder.

    Args:
        vocab: None, the bundled vocabulary as Stable Diffusion 1 uses it; or a `tokenizer/` folder in the diffusers
            layout: `tokenizer.json`, or `vocab.json` and `merges.txt`. Padding token, length and added tokens come from
            `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, where these exist.
        pad: the padding token with the bundled vocabulary. OpenCLIP's encoders (SD2, SDXL's second) were trained with
            "!".

    Attributes:
        bos_id, eos_id, pad_id: ids of the start, end and padding tokens.
        max_length: the number of ids that a call returns for each prompt.

    `len(tokenizer)` is the number of ids, added ones included.

    Raises:
        FastsdError: a vocabulary is missing or malformed; the error has the file.
    """

    def __init__(self, vocab: Path | str | None = None, pad: str = EOS) -> None:
        if vocab is None:
            self._vocab, self._merges = _bundled()
            # As transformers reads the published Stable Diffusion 1 folders: the start token matches in upper case too,
            # the end token does not, since the padding's entry for the same token replaces its own.
            bos = AddedToken(BOS, normalized=True, special=True)
            eos = AddedToken(EOS, normalized=False, special=True)
            special: dict[str, AddedToken] = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": eos}
            if pad != EOS:
                special["pad_token"] = AddedToken(pad, normalized=False, special=True)
            added: dict[int, AddedToken] = {}
            self.max_length = MAX_LENGTH
            where = BUNDLED_MERGES
        else:
            where = Path(vocab)
            self._vocab, self._merges, listed = _read_vocabulary(where)
            special, added, self.max_length = _read_settings(where, listed)

        self._special = special
        self._added = added
        self._backend = _build(self._vocab, self._merges, special["unk_token"].content, where)
        for listed_id, token in sorted(added.items()):
            self._backend.add_tokens([token])
            token_id = self._backend.token_to_id(token.content)
            if token_id != listed_id:
                raise FastsdError(
                    f"added token {token.content!r:.60} has id {listed_id}; it should be {token_id}", path=where
                )
        self._backend.add_tokens([special[name] for name in _ROLES if special[name].content not in _contents(added)])
        self.bos_id, self.eos_id, self.pad_id = (self._id(name) for name in ("bos_token", "eos_token", "pad_token"))

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        """Ids of each prompt: start, tokens (as many as fit), end, padding.

        Args:
            prompts: a string, or B of them.

        Returns:
            int64 `[B, max_length]`; B is 1 for a single string.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise FastsdError(f"prompt must be a string or a list of strings, not {type(prompts).__name__}")
        room = self.max_length - 2
        ids = torch.full((len(prompts), self.max_length), self.pad_id, dtype=torch.int64, device="cpu")
        for row, prompt in zip(ids, prompts):
            content = [self.bos_id, *self._encode(prompt).ids[:room], self.eos_id]
            row[: len(content)] = torch.tensor(content, dtype=torch.int64, device="cpu")
        return ids

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def ids(self, text: str) -> list[int]:
        """The ids of the whole text, without start and end."""
        return list(self._encode(text).ids)

    @property
    def comma_id(self) -> int | None:
        """The id of a comma that stands as a word; None where the vocabulary has no such token."""
        return self._backend.token_to_id(",</w>")

    def tokens(self, prompt: str) -> list[str]:
        """The tokens of the whole prompt, without start and end: "a cat" gives ["a</w>", "cat</w>"].

        Bytes outside printable ASCII and Latin-1 are written in GPT-2's byte alphabet.
        """
        return list(self._encode(prompt).tokens)

    def truncated(self, prompt: str) -> str:
        """The end of the prompt that does not fit, as written; "" where all fits."""
        encoding = self._encode(prompt)
        room = self.max_length - 2
        return prompt[encoding.offsets[room][0] :] if len(encoding.ids) > room else ""

    def save(self, folder: Path | str) -> None:
        """Write the vocabulary as a `tokenizer/` folder for fastsd, transformers and diffusers.

        It writes or replaces vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # With every added token in the config, transformers reads flags and ids from there only.
        table = self._backend.get_added_tokens_decoder()
        special = {name: token.content for name, token in self._special.items()}
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
            "do_lower_case": True,
            "added_tokens_decoder": {str(i): _flags(token) for i, token in sorted(table.items())},
            **special,
        }
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        (folder / "vocab.json").write_text(json.dumps(self._vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        if not isinstance(prompt, str):
            raise FastsdError(f"prompt must be a string or a list of strings, not a list with {type(prompt).__name__}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # half of a surrogate pair: a command line that is not UTF-8
            raise FastsdError(f"prompt: character {error.start + 1} is not valid Unicode; give it as UTF-8") from None
        return self._backend.encode(prompt, add_special_tokens=False)

    def _id(self, name: str) -> int:
        token_id = self._backend.token_to_id(self._special[name].content)
        assert token_id is not None  # __init__ added all of them
        return token_id


def _build(vocab: Vocab, merges: Merges, unk_token: str, where: Path) -> tokenizers.Tokenizer:
    """The `tokenizers` pipeline of CLIP: NFC, white space to one blank, lower case; words; bytes; merges."""
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=unk_token, fuse_unk=False)
    except Exception as error:  # the library's own: a merge names a token that the vocabulary lacks
        raise FastsdError(f"vocabulary and merges do not fit together: {_one_line(error)}", path=where) from None
    backend = tokenizers.Tokenizer(bpe)
    untyped = cast(Any, backend)  # the library declares no types for these attributes
    untyped.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    untyped.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


@lru_cache(maxsize=1)
def _bundled() -> tuple[Vocab, Merges]:
    """The bundled CLIP vocabulary: 256 bytes, 256 bytes at a word's end, a token for each merge, start, end."""
    with gzip.open(BUNDLED_MERGES, "rt", encoding="utf-8") as lines:
        merges = _parse_merges(lines.read(), BUNDLED_MERGES)
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *(left + right for left, right in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order (GPT-2's `bytes_to_unicode`).

    Printable Latin-1 characters come first and stand for themselves; the other bytes are U+0100 and up, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def _read_vocabulary(folder: Path) -> tuple[Vocab, Merges, dict[int, AddedToken] | None]:
    """Vocabulary, merges, and the added tokens by id that tokenizer.json lists; None without that file."""
    if not folder.is_dir():
        raise FastsdError("no such tokenizer folder", path=folder)
    single = folder / "tokenizer.json"
    if not single.is_file():
        vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
        for file in (vocab_file, merges_file):
            if not file.is_file():
                raise FastsdError("missing; a tokenizer is vocab.json and merges.txt, or tokenizer.json", path=file)
        vocab = _check_vocab(_read_json(vocab_file), vocab_file)
        return vocab, _parse_merges(_read_text(merges_file), merges_file), None

    content = _read_json(single)
    model = content.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE":
        raise FastsdError(f"model type is {kind!r}; a CLIP tokenizer has 'BPE'", path=single)
    model = cast(dict[str, Any], model)
    merges, entries = model.get("merges"), content.get("added_tokens") or []
    if not isinstance(merges, list) or not isinstance(entries, list):
        raise FastsdError("model.merges and added_tokens must be lists", path=single)
    lines = [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in merges]
    listed: dict[int, AddedToken] = {}
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise FastsdError(f"added_tokens: an entry must have an integer id, unlike {entry!r:.60}", path=single)
        listed[entry["id"]] = _added_token(entry, "added_tokens", single)
    return _check_vocab(model.get("vocab"), single), _parse_merges("\n".join(lines), single), listed


def _read_settings(
    folder: Path, listed: dict[int, AddedToken] | None
) -> tuple[dict[str, AddedToken], dict[int, AddedToken], int]:
    """Special tokens by role, added tokens by id, and the length, with transformers' precedence.

    An `added_tokens_decoder` in tokenizer_config.json comes first. Without one, special_tokens_map.json precedes
    tokenizer_config.json, and the added tokens are those of added_tokens.json and of tokenizer.json (`listed`).
    """
    config_file, map_file, added_file = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    config = _read_json(config_file) if config_file.is_file() else {}
    named: dict[str, tuple[Any, Path]] = {key: (config.get(key), config_file) for key in _ROLES}
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in config:
        table = config["added_tokens_decoder"]
        if not isinstance(table, dict) or not all(key.isdecimal() for key in table):
            raise FastsdError("added_tokens_decoder must be an object from ids to tokens", path=config_file)
        added = {int(key): _added_token(entry, "added_tokens_decoder", config_file) for key, entry in table.items()}
    else:
        if map_file.is_file():
            special_map = _read_json(map_file)
            named.update({key: (special_map[key], map_file) for key in _ROLES if special_map.get(key) is not None})
        if added_file.is_file():
            roles = {entry.get("content") if isinstance(entry, dict) else entry for entry, _ in named.values()}
            for text, token_id in _check_vocab(_read_json(added_file), added_file).items():
                added[token_id] = AddedToken(text, normalized=text not in roles, special=text in roles)
        added.update(listed or {})

    known = _contents(added)
    special: dict[str, AddedToken] = {}
    for key, (entry, file) in named.items():
        token = AddedToken(BOS if key == "bos_token" else EOS, special=True, normalized=False)
        if entry is not None:
            token = _added_token(entry, key, file, special=True)
        special[key] = known.get(token.content, token)

    length = config.get("model_max_length", MAX_LENGTH)
    if not isinstance(length, (int, float)) or isinstance(length, bool) or not length >= 3:
        raise FastsdError(f"model_max_length must be a number from 3, not {length!r}", path=config_file)
    return special, added, int(length) if length <= _LONGEST else MAX_LENGTH


def _added_token(entry: Any, key: str, file: Path, special: bool | None = None) -> AddedToken:
    """An added token from JSON: a string, or an object with "content" and flags."""
    if isinstance(entry, str) and entry:
        return AddedToken(entry, special=True, normalized=False)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise FastsdError(f"{key} must be a token or an object with its 'content', not {entry!r:.60}", path=file)
    is_special = bool(entry.get("special", False)) if special is None else special
    return AddedToken(
        entry["content"],
        single_word=bool(entry.get("single_word", False)),
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        normalized=bool(entry.get("normalized", not is_special)),
        special=is_special,
    )


def _flags(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _contents(added: dict[int, AddedToken]) -> dict[str, AddedToken]:
    return {token.content: token for token in added.values()}


def _check_vocab(vocab: Any, file: Path) -> Vocab:
    if not isinstance(vocab, dict) or not vocab:
        raise FastsdError("the vocabulary must be an object from tokens to ids", path=file)
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise FastsdError(f"token {token!r:.60} has id {token_id!r:.60}; ids are whole numbers from 0", path=file)
    if len(set(vocab.values())) != len(vocab):
        raise FastsdError("two tokens have the same id", path=file)
    return vocab


def _parse_merges(text: str, file: Path) -> Merges:
    merges: Merges = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(pair):
            raise FastsdError(f"merge {number} must be two tokens with one blank between, not {line!r:.60}", path=file)
        merges.append((pair[0], pair[1]))
    return merges


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FastsdError(f"not valid JSON ({_one_line(error)})", path=file) from None
    if not isinstance(content, dict):
        raise FastsdError(f"must be a JSON object, not {type(content).__name__}", path=file)
    return content


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FastsdError(f"not UTF-8 text (byte {error.start})", path=file) from None
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=file) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
