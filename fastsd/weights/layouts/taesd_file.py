"""TAESD's files: decoder and encoder in one file or in two, with the author's or with diffusers' layer numbers.

The author's networks are sequences, so his keys are numbers: `3.conv.0.weight`, after `decoder.` or `encoder.` if both
are in one file. diffusers calls the sequence `layers` and omits the decoder's first layer, which has no weights, so
the numbers of its decoder are one less. The shapes of SD's TAESD and SDXL's are the same; nothing tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastsd.config import TAESDConfig
from fastsd.errors import FastsdError
from fastsd.model.taesd import TAESD
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.names import sources
from fastsd.weights.load import fill, pop_entry

Entries = dict[str, TensorEntry]

# Prefix; number of the layer; the rest of the key.
_KEY = re.compile(r"((?:(?:encoder|decoder)\.(?:layers\.)?)?)(\d{1,3})\.((?:conv\.\d\.)?(?:weight|bias))")
MAX_LEVELS, MAX_BLOCKS, MAX_WIDTH = 8, 16, 1024


def is_taesd(keys: Iterable[str]) -> bool:
    """Whether the keys are those of TAESD or of one half: no other network here has numbered blocks of convolutions."""
    matches = (_KEY.fullmatch(key) for key in keys)
    return any(match is not None and match[3] == "conv.0.weight" for match in matches)


def load_taesd(
    path: Path,
    entries: Entries,
    dtype: torch.dtype,
    device: torch.device,
    read: Callable[[Path], Entries],
    encodes: bool = True,
) -> TAESD:
    """Load TAESD from a file of both halves or of one; the other is then read from the file of the matching name.

    Args:
        path, entries: the file and its tensors, for which `is_taesd` is true.
        dtype, device: of the weights.
        read: returns another file's tensors.
        encodes: load the encoder too, if there is one.

    Raises:
        FastsdError: no decoder; a key missing, extra or of another shape; halves that do not fit together.
    """
    halves, extra = _halves(path, entries)
    for side, opposite in (("decoder", "encoder"), ("encoder", "decoder")):
        sibling = path.with_name(path.name.replace(opposite, side))
        if side not in halves and sibling != path and sibling.is_file() and (encodes or side == "decoder"):
            sibling_halves = _halves(sibling, read(sibling))[0]
            halves |= {side: sibling_halves[side]} if side in sibling_halves else {}
    if "decoder" not in halves:
        raise FastsdError("only TAESD's encoder; give the file of its decoder", path=path)
    if not encodes:
        halves.pop("encoder", None)
    with torch.device("meta"):
        module = TAESD(_config(halves["decoder"], halves.get("encoder")), encodes="encoder" in halves)
    needed = [source for _, _, parts in sources(module) for source in parts]
    for source in needed:
        half = halves[source.key.split(".")[0]]
        if source.key not in half.entries:
            raise FastsdError(f"the key {half.file_key(source.key)} {list(source.shape)} is missing", path=half.path)
    merged = {key: entry for half in halves.values() for key, entry in half.entries.items()} | extra
    unchecked = dict(merged)
    for source in needed:  # all shapes are checked before memory is allocated
        pop_entry(unchecked, source, path)
    return fill(module, merged, path, dtype, device)


@dataclass(frozen=True)
class _Half:
    """The encoder or the decoder in a file.

    Attributes:
        side: "encoder" or "decoder".
        prefix: what comes before the layer numbers in the file.
        entries: its tensors, by diffusers' keys.
    """

    path: Path
    side: str
    prefix: str
    entries: Entries

    @property
    def shift(self) -> int:
        """The difference between the file's layer numbers and diffusers'."""
        return 1 if self.side == "decoder" and not self.prefix.endswith("layers.") else 0

    def file_key(self, key: str) -> str:
        """The file's key for diffusers' `key`."""
        number, inner = key.removeprefix(f"{self.side}.layers.").split(".", 1)
        return f"{self.prefix}{int(number) + self.shift}.{inner}"

    def shape(self, number: int) -> tuple[int, ...]:
        """The shape of a convolution's weight.

        Raises:
            FastsdError: it is missing, or its size is impossible.
        """
        key = f"{self.side}.layers.{number}.weight"
        entry = self.entries.get(key)
        if entry is None:
            raise FastsdError(f"the key {self.file_key(key)} is missing", path=self.path)
        if len(entry.shape) != 4 or not all(0 < n <= MAX_WIDTH for n in entry.shape):
            raise FastsdError(f"the key {entry.key} is {list(entry.shape)}; no TAESD has such a layer", path=self.path)
        return entry.shape

    def layers(self) -> list[tuple[int, bool]]:
        """The number of each layer that holds weights, and whether it is a block."""
        blocks: dict[int, bool] = {}
        for key in self.entries:
            number, inner = key.removeprefix(f"{self.side}.layers.").split(".", 1)
            blocks[int(number)] = inner.startswith("conv.")
        return sorted(blocks.items())

    def blocks(self) -> tuple[int, ...]:
        """The count of blocks at each level. A convolution begins a level of the encoder and ends one of the decoder.

        Raises:
            FastsdError: more than any TAESD has.
        """
        counts = [0]
        for _, is_block in self.layers():
            if is_block:
                counts[-1] += 1
            else:
                counts.append(0)
        inner = counts[1:-1]  # no block comes before the first convolution or after the last
        if not 1 <= len(inner) <= MAX_LEVELS or max(counts) > MAX_BLOCKS:
            raise FastsdError(f"no TAESD {self.side} has {counts} blocks between its convolutions", path=self.path)
        return tuple(inner)


def _halves(path: Path, entries: Entries) -> tuple[dict[str, _Half], Entries]:
    """The halves that a file holds, by side, and the entries that belong to neither."""
    matches = {key: _KEY.fullmatch(key) for key in entries}
    unprefixed_side = "encoder" if "0.weight" in entries else "decoder"  # the decoder's layer 0 has no weights
    halves: dict[str, _Half] = {}
    extra: Entries = {}
    for key, match in matches.items():
        if match is None:
            extra[key] = entries[key]
            continue
        prefix = match[1]
        side = prefix.split(".")[0] or unprefixed_side
        half = halves.setdefault(side, _Half(path, side, prefix, {}))
        number = int(match[2]) - half.shift
        if prefix == half.prefix and number >= 0:
            half.entries[f"{side}.layers.{number}.{match[3]}"] = entries[key]
        else:
            extra[key] = entries[key]
    return halves, extra


def _config(decoder: _Half, encoder: _Half | None) -> TAESDConfig:
    """The config, from the shape of the first convolution and the counts of blocks."""
    (width, latent, *_), blocks = decoder.shape(0), decoder.blocks()
    config = TAESDConfig(
        latent_channels=latent,
        block_out_channels=(width,) * len(blocks),
        num_decoder_blocks=blocks,
        num_encoder_blocks=blocks[::-1] if encoder is None else encoder.blocks(),
    )
    if encoder is not None and len(config.num_encoder_blocks) != len(blocks):
        raise FastsdError(
            f"the encoder has {len(config.num_encoder_blocks)} levels, the decoder {len(blocks)}; "
            "they do not belong together",
            path=encoder.path,
        )
    return config
