"""Filling a model with weights from files: no key missing or extra, each tensor read once, no second copy in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fastsd.errors import FastsdError
from fastsd.weights.formats.json_file import read_json
from fastsd.weights.formats.safetensors_file import TensorEntry, read_header
from fastsd.weights.formats.scaled import with_scales
from fastsd.weights.layouts.names import Source, canonical_key, is_ignored, same_matrix, sources

M = TypeVar("M", bound=nn.Module)

# The networks of a diffusers folder, and the start of their weight files' names.
STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}


def weight_file_names(stem: str, half: bool) -> list[str]:
    """The possible names of a network's weight file or of its index of shards, preferred ones first.

    Args:
        stem: `diffusion_pytorch_model` or `model`.
        half: prefer the fp16 variant if both exist.
    """
    names = []
    for variant in (".fp16", "") if half else ("", ".fp16"):
        names += [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
        names += [f"{stem}{variant}.safetensors.index.json"]
    return names


def find_files(folder: Path, stem: str, half: bool) -> list[Path]:
    """The weight files of one network: the first of `weight_file_names` in `folder`, for example `.../unet`.

    Raises:
        FastsdError: there are none.
    """
    for name in weight_file_names(stem, half):
        if (folder / name).is_file():
            return _shards(folder / name) if name.endswith(".json") else [folder / name]
    raise FastsdError(
        f"no weights; expected {stem}.safetensors (or .fp16.safetensors, or shards with an index)", path=folder
    )


def shard_names(index: Path) -> list[str]:
    """The names of the shards in an index; the shards are in the same folder.

    Raises:
        FastsdError: malformed, or a name that leads out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FastsdError("weight_map is missing; it should map each tensor to its file", path=index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise FastsdError(f"{name!r} is not the name of a file in the same folder", path=index)
    return names


def _shards(index: Path) -> list[Path]:
    files = [index.parent / name for name in shard_names(index)]
    for file in files:
        if not file.is_file():
            raise FastsdError(f"missing, though {index.name} names it", path=file)
    return files


def load_module(build: Callable[[], M], files: list[Path], dtype: torch.dtype, device: torch.device) -> M:
    """Build a model on the meta device and give it the weights in `files`.

    Args:
        build: makes the model; called under `torch.device("meta")`.
        files: safetensors files that together hold exactly the model's parameters.
        dtype, device: of the result.

    Raises:
        FastsdError: as `fill` does.
    """
    with torch.device("meta"):
        module = build()
    return fill(module, read_headers(files), error_path(files), dtype, device)


def error_path(files: list[Path]) -> Path:
    """The path that error messages name for a network: its one file, or the folder of its shards."""
    return files[0] if len(files) == 1 else files[0].parent


def fill(module: M, entries: dict[str, TensorEntry], where: Path, dtype: torch.dtype, device: torch.device) -> M:
    """Give a model on the meta device its weights.

    Peak memory is the weights in `dtype` plus a few copies of the largest single tensor.

    Args:
        module: its parameters are replaced.
        entries: by the names that `sources` gives, exactly those that the model needs.
        where: the file or folder, for messages.
        dtype, device: of the result.

    Raises:
        FastsdError: a key is missing, extra, has the wrong shape, or holds values that are not finite in `dtype`; the
            message names file, key and both shapes.
    """
    state = {}
    # One buffer for all tensors: allocating fresh memory takes longer than reading a tensor.
    buffer = torch.empty(max((entry.nbytes for entry in entries.values()), default=0), dtype=torch.uint8, device="cpu")
    for name, parameter, parts in sources(module):
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        target = torch.empty(parameter.shape, dtype=dtype, device=device, memory_format=layout)
        for part in parts:
            entry = pop_entry(entries, part, where)
            rows = target[part.rows]
            as_stored = rows.is_contiguous() and rows.dtype == entry.dtype and entry.strides is entry.scale is None
            if as_stored and rows.device.type == "cpu":
                read_finite(entry, dtype, rows.view(-1).view(torch.uint8))
            else:
                rows.copy_(read_finite(entry, dtype, buffer).reshape(part.shape))
        state[name] = target
    refuse_unused(entries)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def read_finite(entry: TensorEntry, dtype: torch.dtype, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor, in the file's dtype (8 bits as fp32), and check that its values are finite in `dtype` too.

    Args:
        entry: the tensor's place in the file.
        dtype: the dtype it will be converted to.
        buffer: uint8 memory to read it into; None: memory of its own.

    Raises:
        FastsdError: a value is not finite. A single such weight turns every image black.
    """
    tensor = entry.read(buffer)
    if tensor.numel() == 0:
        return tensor
    low, high = (float(bound) for bound in torch.aminmax(tensor))  # NaN if any value is
    largest = max(-low, high)
    if not largest < float("inf"):
        kind = "NaN" if largest != largest else "infinite"
        raise FastsdError(f"the key {entry.key} holds {kind} values; every image would be black", path=entry.path)
    if largest > torch.finfo(dtype).max:
        raise FastsdError(
            f"the key {entry.key} holds {largest:g}, but {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:g}; load it with dtype fp32 or bf16",
            path=entry.path,
        )
    return tensor


def read_headers(files: list[Path]) -> dict[str, TensorEntry]:
    """The tensors of one network, by the names that `sources` gives."""
    entries: dict[str, TensorEntry] = {}
    for path in files:
        for key, entry in with_scales(path, read_header(path)[0]).items():
            name = canonical_key(key)
            if name in entries:
                raise FastsdError(f"the key {key} appears twice (also in {entries[name].path.name})", path=path)
            if not is_ignored(key):
                entries[name] = entry
    return entries


def pop_entry(entries: dict[str, TensorEntry], part: Source, where: Path) -> TensorEntry:
    """Remove and return the entry that stores a source.

    Raises:
        FastsdError: it is missing, has another shape, or holds integers.
    """
    entry = entries.pop(part.key, None)
    if entry is None:
        raise FastsdError(f"the key {part.key} {list(part.shape)} is missing", path=where)
    if not same_matrix(entry.shape, part.shape):
        raise FastsdError(
            f"the key {entry.key} is {list(entry.shape)}; the config expects {list(part.shape)}", path=entry.path
        )
    if not entry.dtype.is_floating_point:
        raise FastsdError(
            f"the key {entry.key} is {entry.dtype}; it should be a floating-point tensor", path=entry.path
        )
    return entry


def refuse_unused(entries: dict[str, TensorEntry]) -> None:
    """Refuse the entries that no source has popped."""
    if entries:
        entry = min(entries.values(), key=lambda e: e.key)
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        raise FastsdError(
            f"the key {entry.key[:200]} {list(entry.shape)} matches no parameter of this model{more}", path=entry.path
        )
