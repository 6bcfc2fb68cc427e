"""TAESD's files: decoder and encoder in one or each in its own, numbered as the author or as diffusers numbers layers.

The author's networks are sequences, so his keys are numbers: `3.conv.0.weight`, behind `decoder.` or `encoder.` where
both are in one file. diffusers calls the sequence `layers` and leaves out the decoder's first layer, which has no
weights, so its decoder's numbers are one less. Shapes are the same for SD's TAESD and SDXL's; nothing tells them apart.
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
from fastsd.weights.formats.safetensors_file import Entry
from fastsd.weights.layouts.names import sources
from fastsd.weights.load import fill, take

Entries = dict[str, Entry]

_KEY = re.compile(r"((?:(?:encoder|decoder)\.(?:layers\.)?)?)(\d{1,3})\.((?:conv\.\d\.)?(?:weight|bias))")
MAX_LEVELS, MAX_BLOCKS, MAX_WIDTH = 8, 16, 1024


def is_taesd(keys: Iterable[str]) -> bool:
    """Whether keys are TAESD's, of either half: no other network here has numbered blocks of convolutions."""
    found = (_KEY.fullmatch(key) for key in keys)
    return any(match is not None and match[3] == "conv.0.weight" for match in found)


def load_taesd(
    path: Path,
    entries: Entries,
    dtype: torch.dtype,
    device: torch.device,
    read: Callable[[Path], Entries],
    encodes: bool = True,
) -> TAESD:
    """TAESD from a file of both halves or of one. The other is looked for beside it, under the name that says so.

    Args:
        path, entries: the file and its tensors, of which `is_taesd` holds.
        dtype, device: of the weights.
        read: gives another file's tensors.
        encodes: take the encoder too, where there is one.

    Raises:
        FastsdError: no decoder; a key missing, extra or of another shape; halves that do not fit together.
    """
    halves, extra = _halves(path, entries)
    for side, other in (("decoder", "encoder"), ("encoder", "decoder")):
        beside = path.with_name(path.name.replace(other, side))
        if side not in halves and beside != path and beside.is_file() and (encodes or side == "decoder"):
            more = _halves(beside, read(beside))[0]
            halves |= {side: more[side]} if side in more else {}
    if "decoder" not in halves:
        raise FastsdError(f"{path}: it is TAESD's encoder alone; give the file of its decoder")
    if not encodes:
        halves.pop("encoder", None)
    with torch.device("meta"):
        module = TAESD(_config(halves["decoder"], halves.get("encoder")), encodes="encoder" in halves)
    parts = [part for _, _, found in sources(module) for part in found]
    for part in parts:
        half = halves[part.key.split(".")[0]]
        if part.key not in half.entries:
            raise FastsdError(f"{half.path}: the key {half.called(part.key)} {list(part.shape)} is missing")
    merged = {key: entry for half in halves.values() for key, entry in half.entries.items()} | extra
    rest = dict(merged)
    for part in parts:  # all shapes before memory is taken for one
        take(rest, part, path)
    return fill(module, merged, path, dtype, device)


@dataclass(frozen=True)
class _Half:
    """Encoder or decoder in a file.

    Attributes:
        prefix: what the file puts before its numbers.
        entries: its tensors, by diffusers' keys.
    """

    path: Path
    side: str
    prefix: str
    entries: Entries

    @property
    def shift(self) -> int:
        """How much larger the file's numbers are."""
        return 1 if self.side == "decoder" and not self.prefix.endswith("layers.") else 0

    def called(self, key: str) -> str:
        """The file's name for diffusers' `key`."""
        number, inner = key.removeprefix(f"{self.side}.layers.").split(".", 1)
        return f"{self.prefix}{int(number) + self.shift}.{inner}"

    def shape(self, number: int) -> tuple[int, ...]:
        """Of a convolution's weight.

        Raises:
            FastsdError: it is not there, or none of a possible size.
        """
        key = f"{self.side}.layers.{number}.weight"
        entry = self.entries.get(key)
        if entry is None:
            raise FastsdError(f"{self.path}: the key {self.called(key)} is missing")
        if len(entry.shape) != 4 or not all(0 < n <= MAX_WIDTH for n in entry.shape):
            raise FastsdError(f"{self.path}: the key {entry.key} is {list(entry.shape)}; no TAESD has such a layer")
        return entry.shape

    def layers(self) -> list[tuple[int, bool]]:
        """The numbers of its layers that hold weights, and whether each is a block."""
        blocks: dict[int, bool] = {}
        for key in self.entries:
            number, inner = key.removeprefix(f"{self.side}.layers.").split(".", 1)
            blocks[int(number)] = inner.startswith("conv.")
        return sorted(blocks.items())

    def blocks(self) -> tuple[int, ...]:
        """How many there are at each level. A level begins with a convolution in an encoder, and ends with one in a
        decoder.

        Raises:
            FastsdError: more than any TAESD has.
        """
        counts = [0]
        for _, is_block in self.layers():
            if is_block:
                counts[-1] += 1
            else:
                counts.append(0)
        inner = counts[1:-1]  # nothing before the first convolution, nothing after the last
        if not 1 <= len(inner) <= MAX_LEVELS or max(counts) > MAX_BLOCKS:
            raise FastsdError(f"{self.path}: TAESD's {self.side} with {counts} blocks between convolutions; none has")
        return tuple(inner)


def _halves(path: Path, entries: Entries) -> tuple[dict[str, _Half], Entries]:
    """Encoder and decoder of a file, as far as they are there, and what belongs to neither."""
    matches = {key: _KEY.fullmatch(key) for key in entries}
    alone = "encoder" if "0.weight" in entries else "decoder"  # the decoder's layer 0 has no weights
    halves: dict[str, _Half] = {}
    extra: Entries = {}
    for key, match in matches.items():
        if match is None:
            extra[key] = entries[key]
            continue
        prefix = match[1]
        side = prefix.split(".")[0] or alone
        half = halves.setdefault(side, _Half(path, side, prefix, {}))
        number = int(match[2]) - half.shift
        if prefix == half.prefix and number >= 0:
            half.entries[f"{side}.layers.{number}.{match[3]}"] = entries[key]
        else:
            extra[key] = entries[key]
    return halves, extra


def _config(decoder: _Half, encoder: _Half | None) -> TAESDConfig:
    """What the shape of the first convolution and the numbers of the blocks say."""
    (width, latent, *_), blocks = decoder.shape(0), decoder.blocks()
    config = TAESDConfig(
        latent_channels=latent,
        block_out_channels=(width,) * len(blocks),
        num_decoder_blocks=blocks,
        num_encoder_blocks=blocks[::-1] if encoder is None else encoder.blocks(),
    )
    if encoder is not None and len(config.num_encoder_blocks) != len(blocks):
        raise FastsdError(
            f"{encoder.path}: the encoder has {len(config.num_encoder_blocks)} levels where the decoder has "
            f"{len(blocks)}; they do not belong together"
        )
    return config
