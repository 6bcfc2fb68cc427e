"""Which files of a repository are needed, out of the names of all that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from pathlib import Path, PurePosixPath

from fastsd.errors import FastsdError
from fastsd.weights.hub.hub_id import SUFFIX, HubId
from fastsd.weights.load import STEMS, candidates, shard_names

_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONFIGS = (
    "model_index.json",
    "fastsd.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in STEMS),
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in _TOKENIZER),
)

# Picks what is needed, the configs first; raises FastsdError where something is missing. An index means its shards too.
Choose = Callable[[Set[str]], list[str]]


def one_file(wanted: HubId) -> Choose:
    """The file that the id names."""

    def choose(names: Set[str]) -> list[str]:
        if wanted.inside not in names:
            raise FastsdError(f"{wanted}: no such file in that repository{_single_files(names)}")
        return [wanted.inside]

    return choose


def model_files(wanted: HubId, half: bool) -> Choose:
    """What `load_folder` reads: configs, tokenizers, and each network's weights as `find_files` chooses them."""

    def choose(names: Set[str]) -> list[str]:
        if "model_index.json" not in names:
            said = _single_files(names) or "; it holds no .safetensors file either"
            raise FastsdError(f"{wanted}: no model_index.json in that repository{said}")
        folders = {name.split("/")[0] for name in names if "/" in name}
        for part in ("unet", "vae", "scheduler"):
            if part not in folders:
                raise FastsdError(f"{wanted}: no {part}/ in that repository; it is no Stable Diffusion 1, 2 or XL")
        chosen = [name for name in _CONFIGS if name in names]
        for folder in ("tokenizer", "tokenizer_2"):
            whole = f"{folder}/tokenizer.json"
            parts = [f"{folder}/vocab.json", f"{folder}/merges.txt"]
            chosen += [whole] if whole in names else [name for name in parts if name in names]
        networks = [part for part in STEMS if part in folders]
        return chosen + [_weights(wanted, names, f"{part}/", STEMS[part], half) for part in networks]

    return choose


def network_files(wanted: HubId, half: bool, part: str) -> Choose:
    """A network's config and weights, at the repository's top or in its folder `part`."""

    def choose(names: Set[str]) -> list[str]:
        folder = "" if "config.json" in names else f"{part}/"
        if f"{folder}config.json" not in names:
            raise FastsdError(f"{wanted}: no config.json or {part}/ in that repository{_single_files(names)}")
        return [f"{folder}config.json", _weights(wanted, names, folder, STEMS["vae"], half)]

    return choose


def _weights(wanted: HubId, names: Set[str], folder: str, stem: str, half: bool) -> str:
    """The file of a component's weights, or the index of their shards."""
    for name in candidates(stem, half):
        if folder + name in names:
            return folder + name
    raise FastsdError(f"{wanted}: no {folder}{stem}{SUFFIX} in that repository; weights in other formats are not read")


def _single_files(names: Set[str]) -> str:
    """The models that a repository holds as single files, as the end of a message."""
    files = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)
    return f"; it holds {', '.join(files[:4])}{', ...' if len(files) > 4 else ''}" if files else ""


def with_shards(files: list[str], get: Callable[[str], Path]) -> Iterator[str]:
    """The files, each index of shards followed by the shards that it names; `get` gives a file's place."""
    for name in files:
        yield name
        if ".safetensors.index." in name:
            yield from (str(PurePosixPath(name).with_name(shard)) for shard in shard_names(get(name)))
