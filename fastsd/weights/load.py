"""Filling a model with weights from safetensors files: strictly, each tensor read once, nothing held twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import read_json
from fastsd.weights.formats.safetensors_file import Entry, read_header
from fastsd.weights.layouts.names import Source, canonical, is_ignored, same_matrix, sources

M = TypeVar("M", bound=nn.Module)

# The networks of a diffusers folder, and what the names of their weights' files begin with.
STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def candidates(stem: str, half: bool) -> list[str]:
    """The names that a component's weights may have, the preferred ones first: of a file, or of an index of shards.

    Args:
        stem: `diffusion_pytorch_model` or `model`.
        half: prefer the fp16 variant where both are there.
    """
    names = []
    for variant in (".fp16", "") if half else ("", ".fp16"):
        names += [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
        names += [f"{stem}{variant}.safetensors.index.json"]
    return names


def find_files(folder: Path, stem: str, half: bool) -> list[Path]:
    """The weight files of one component: the first of `candidates` in `folder`, for example `.../unet`.

    Raises:
        FastsdError: there are none.
    """
    for name in candidates(stem, half):
        if (folder / name).is_file():
            return _shards(folder / name) if name.endswith(".json") else [folder / name]
    raise FastsdError(
        f"{folder}: no weights; expected {stem}.safetensors (or .fp16.safetensors, or shards with an index)"
    )


def shard_names(index: Path) -> list[str]:
    """The names of the files, beside the index, that an index names.

    Raises:
        FastsdError: it is malformed, or names what is not beside it.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise FastsdError(f"{index}: weight_map is missing; it should map each tensor to its file")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise FastsdError(f"{index}: {name!r} is not the name of a file beside it")
    return files


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not file.is_file():
            raise FastsdError(f"{file}: missing; {index.name} names it")
    return files


def load_module(build: Callable[[], M], files: list[Path], dtype: torch.dtype, device: torch.device) -> M:
    """Build a model on the meta device and give it the weights in `files`.

    Args:
        build: makes the model; it is called under `torch.device("meta")`.
        files: safetensors files that together hold every parameter, and nothing else.
        dtype, device: of the result.

    Raises:
        FastsdError: as `fill` does.
    """
    with torch.device("meta"):
        module = build()
    return fill(module, read_headers(files), place_of(files), dtype, device)


def place_of(files: list[Path]) -> Path:
    """What messages call a network's files: the one, or the folder that they are in."""
    return files[0] if len(files) == 1 else files[0].parent


def fill(module: M, entries: dict[str, Entry], where: Path, dtype: torch.dtype, device: torch.device) -> M:
    """Give a model on the meta device its weights.

    Peak memory is the weights in `dtype` plus a few copies of the largest single tensor.

    Args:
        module: its parameters are replaced.
        entries: by the names that `sources` gives; every one is used, and none is missing.
        where: the file or folder, for messages.
        dtype, device: of the result.

    Raises:
        FastsdError: a key is missing, extra, of another shape, or holds values that are not finite in `dtype`; the
            message names file, key and both shapes.
    """
    state = {}
    # One buffer for all tensors: memory that was never touched takes longer to get than a tensor to read.
    buffer = torch.empty(max((entry.nbytes for entry in entries.values()), default=0), dtype=torch.uint8)
    for name, parameter, parts in sources(module):
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        target = torch.empty(parameter.shape, dtype=dtype, device=device, memory_format=layout)
        for part in parts:
            entry = take(entries, part, where)
            rows = target[part.rows]
            as_stored = rows.is_contiguous() and rows.dtype == entry.dtype and entry.strides is None
            if as_stored and rows.device.type == "cpu":
                read_finite(entry, dtype, rows.view(-1).view(torch.uint8))
            else:
                rows.copy_(read_finite(entry, dtype, buffer).reshape(part.shape))
        state[name] = target
    refuse_rest(entries)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def read_finite(entry: Entry, dtype: torch.dtype, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of a file, whose values must be finite, in `dtype` too.

    Args:
        entry: of the file.
        dtype: that it will be used in.
        buffer: bytes to read it into; None: memory of its own.

    Raises:
        FastsdError: they are not; one weight of them makes every picture black.
    """
    tensor = entry.read(buffer)
    if tensor.numel() == 0:
        return tensor
    low, high = (float(bound) for bound in torch.aminmax(tensor))  # NaN if any value is
    largest = max(-low, high)
    if not largest < float("inf"):
        kind = "NaN" if largest != largest else "infinite"
        raise FastsdError(f"{entry.path}: the key {entry.key} holds {kind} values; fetch the file again")
    if largest > torch.finfo(dtype).max:
        raise FastsdError(
            f"{entry.path}: the key {entry.key} holds {largest:g}, beyond {str(dtype).removeprefix('torch.')}'s "
            f"{torch.finfo(dtype).max:g}; load it with dtype fp32 or bf16"
        )
    return tensor


def read_headers(files: list[Path]) -> dict[str, Entry]:
    """The tensors of one component, by the names that `sources` gives."""
    entries: dict[str, Entry] = {}
    for path in files:
        for key, entry in read_header(path)[0].items():
            name = canonical(key)
            if name in entries:
                raise FastsdError(f"{path}: the key {key} stands twice (also in {entries[name].path.name})")
            if not is_ignored(key):
                entries[name] = entry
    return entries


def take(entries: dict[str, Entry], part: Source, where: Path) -> Entry:
    """The entry that a source is stored in, out of `entries`.

    Raises:
        FastsdError: it is missing, of another shape, or holds whole numbers.
    """
    entry = entries.pop(part.key, None)
    if entry is None:
        raise FastsdError(f"{where}: the key {part.key} {list(part.shape)} is missing")
    if not same_matrix(entry.shape, part.shape):
        raise FastsdError(
            f"{entry.path}: the key {entry.key} is {list(entry.shape)}; the config wants {list(part.shape)}"
        )
    if not entry.dtype.is_floating_point:
        raise FastsdError(f"{entry.path}: the key {entry.key} is {entry.dtype}; it should be a floating-point tensor")
    return entry


def refuse_rest(entries: dict[str, Entry]) -> None:
    """Refuse what is left when every source was taken."""
    if entries:
        entry = min(entries.values(), key=lambda e: e.key)
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        raise FastsdError(
            f"{entry.path}: the key {entry.key[:200]} {list(entry.shape)} belongs to no parameter of this model{more}"
        )
