"""Which files of a repository are needed, chosen from the names of all its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from pathlib import Path, PurePosixPath

from fastsd.errors import FastsdError
from fastsd.weights.hub.hub_id import SUFFIX, HubId
from fastsd.weights.load import STEMS, shard_names, weight_file_names

_STEMS = {"vae": STEMS["vae"], "controlnet": STEMS["vae"], "image_encoder": "model"}  # of networks beside a model
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONFIGS = (
    "model_index.json",
    "fastsd.json",
    "scheduler/scheduler_config.json",
    *(f"{network}/config.json" for network in STEMS),
    *(f"{folder}/{name}" for folder in ("tokenizer", "tokenizer_2") for name in _TOKENIZER),
)

# Given the names of a repository's files, returns those that are needed, configs first; raises FastsdError if one is
# missing. An index of shards stands for its shards too.
FileSelector = Callable[[Set[str]], list[str]]


def one_file(hub_id: HubId) -> FileSelector:
    """The file that the id names."""

    def select(names: Set[str]) -> list[str]:
        if hub_id.file not in names:
            raise FastsdError(f"no such file in that repository{_single_files(names)}", path=hub_id)
        return [hub_id.file]

    return select


def model_files(hub_id: HubId, half: bool) -> FileSelector:
    """What `load_folder` reads: configs, tokenizers, and each network's weights as `find_files` chooses them."""

    def select(names: Set[str]) -> list[str]:
        if "model_index.json" not in names:
            others = _single_files(names) or "; it holds no .safetensors file either"
            raise FastsdError(f"no model_index.json in that repository{others}", path=hub_id)
        folders = {name.split("/")[0] for name in names if "/" in name}
        for network in ("unet", "vae", "scheduler"):
            if network not in folders:
                raise FastsdError(
                    f"no {network}/ in that repository; it is not a Stable Diffusion 1, 2 or XL model", path=hub_id
                )
        selected = [name for name in _CONFIGS if name in names]
        for folder in ("tokenizer", "tokenizer_2"):
            combined = f"{folder}/tokenizer.json"
            parts = [f"{folder}/vocab.json", f"{folder}/merges.txt"]
            selected += [combined] if combined in names else [name for name in parts if name in names]
        networks = [network for network in STEMS if network in folders]
        return selected + [_weights(hub_id, names, f"{network}/", STEMS[network], half) for network in networks]

    return select


def network_files(hub_id: HubId, half: bool, network: str) -> FileSelector:
    """A network's config and weights, at the repository's top or in its folder `network`."""

    def select(names: Set[str]) -> list[str]:
        folder = "" if "config.json" in names else f"{network}/"
        if f"{folder}config.json" not in names:
            raise FastsdError(f"no config.json or {network}/ in that repository{_single_files(names)}", path=hub_id)
        return [f"{folder}config.json", _weights(hub_id, names, folder, _STEMS[network], half)]

    return select


def _weights(hub_id: HubId, names: Set[str], folder: str, stem: str, half: bool) -> str:
    """The file of a network's weights, or the index of their shards."""
    for name in weight_file_names(stem, half):
        if folder + name in names:
            return folder + name
    raise FastsdError(f"no {folder}{stem}{SUFFIX} in that repository; fastsd reads no other weights", path=hub_id)


def _single_files(names: Set[str]) -> str:
    """The single-file models at the top of a repository, as the end of a message."""
    files = sorted(name for name in names if name.endswith(SUFFIX) and "/" not in name)
    return f"; it holds {', '.join(files[:4])}{', ...' if len(files) > 4 else ''}" if files else ""


def with_shards(files: list[str], get: Callable[[str], Path]) -> Iterator[str]:
    """The files, each index of shards followed by the shards it names; `get` returns the path of a file."""
    for name in files:
        yield name
        if ".safetensors.index." in name:
            yield from (str(PurePosixPath(name).with_name(shard)) for shard in shard_names(get(name)))
