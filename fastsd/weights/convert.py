"""Converting checkpoints between a diffusers folder and a single file, tensor by tensor, without loading a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.files import replace_whole
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.formats.safetensors_file import DTYPES, Entry
from fastsd.weights.layouts.family import Family, find_family
from fastsd.weights.layouts.folder import outline
from fastsd.weights.layouts.ldm_names import (
    UNET_PREFIX,
    VAE_PREFIX,
    Place,
    openclip_place,
    unet_place,
    unet_table,
    vae_place,
)
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.save import describe, weights_file
from fastsd.weights.layouts.single_file import outline_file, tokenizer
from fastsd.weights.load import place_of, read_finite, read_headers, refuse_rest, take

# What the original layout leaves to its readers' knowledge of the family; all families agree on it.
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: `pieces` one below the other, each read when it is its turn."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Callable[[], torch.Tensor], ...] = ()

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """What is converted: the networks on the meta device, and their tensors by network and key of a folder."""

    path: Path
    components: Components
    entries: dict[str, dict[str, Entry]]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    ema: bool = False,
) -> list[str]:
    """Write a checkpoint in the other layout, or in another precision.

    Memory is taken for one tensor at a time. The target appears when it is whole, or not at all. A checkpoint that was
    converted and converted back is the same to the bit; what does not fit the target's layout is refused.

    Args:
        source: a folder or a single file.
        target: a file that ends in `.safetensors`, or a folder.
        dtype: of the weights; None: each tensor keeps its own.
        prediction: what a single file's network predicts, where the file does not say.
        allow_pickle: read a `.ckpt`.
        overwrite: replace what is at `target`.
        ema: take the averaged weights of a single file's UNet.

    Returns:
        Notes, a line each: what the target does not say.

    Raises:
        FastsdError: the source cannot be read, or its model cannot be written so, or the target exists.
    """
    source, target = Path(source), Path(target)
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise FastsdError(f"{target}: it exists; --overwrite replaces it")
    if target.suffix.lower() in (".ckpt", ".pt", ".bin"):
        raise FastsdError(f"{target}: pickles are not written; give a file that ends in .safetensors, or a folder")
    if source.exists() and target.exists() and source.samefile(target):
        raise FastsdError(f"{target}: it is the source itself; give another target")
    checkpoint = _open(source, dtype, prediction, allow_pickle, ema)
    if target.suffix.lower() == ".safetensors":
        tensors, metadata, notes = _as_file(checkpoint, dtype)
        if target.is_dir():
            raise FastsdError(f"{target}: a folder stands there; give another name")
        with _replacing(target, folder=False) as temporary:
            write_safetensors(temporary, tensors, metadata)
        return notes
    if target.exists() and not (target / "model_index.json").is_file():
        raise FastsdError(f"{target}: it is no model folder, and is not replaced; give another target")
    with _replacing(target, folder=True) as temporary:
        describe(checkpoint.components, temporary)
        for name, _ in checkpoint.components.networks():
            write_safetensors(
                temporary / weights_file(name), list(_as_folder(checkpoint, name, dtype)), {"format": "pt"}
            )
    return []


def _open(path: Path, dtype: torch.dtype | None, prediction: str | None, allow_pickle: bool, ema: bool) -> Checkpoint:
    entries: dict[str, dict[str, Entry]] = {}
    if path.is_dir():
        if ema:
            raise FastsdError(f"{path}: a folder holds one UNet, averaged or not; leave out --ema (ema=True)")
        components, files = outline(path, half=dtype not in (None, torch.float32))
        where = {name: place_of(found) for name, found in files.items()}
        entries = {name: read_headers(found) for name, found in files.items()}
    else:
        components, found_parts, family = outline_file(path, prediction, allow_pickle, ema)
        if family.vae is None:
            raise FastsdError(f"{path}: no autoencoder in this file ({VAE_PREFIX}*); it cannot be converted alone")
        for part in found_parts.values():
            part.check(path)
            entries[part.name] = dict(part.entries)
        where = dict.fromkeys(entries, path)
    for name, module in components.networks():
        rest = dict(entries[name])
        entries[name] = {part.key: take(rest, part, where[name]) for _, _, found in sources(module) for part in found}
        refuse_rest(rest)
    return Checkpoint(path, components, entries)


def _as_folder(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """The tensors of one network as a folder stores them."""
    linear = checkpoint.components.unet.config.use_linear_projection
    for key, entry in checkpoint.entries[name].items():
        yield _tensor(key, (entry,), linear, dtype)


def _as_file(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[list[Tensor], dict[str, str], list[str]]:
    """The tensors and metadata of a single file, and notes on what it does not say."""
    components, path = checkpoint.components, checkpoint.path
    if not isinstance(components.vae, AutoencoderKL):
        raise FastsdError(f"{path}: its autoencoder is TAESD, which single files do not hold; give a folder to write")
    unet, linear = components.unet.config, components.unet.config.use_linear_projection
    table = unet_table(unet)
    tensors = []
    for name, _ in components.networks():
        prefix, openclip = _prefix(components, name)
        grouped: dict[str, list[tuple[Place, Entry]]] = {}
        for key, entry in checkpoint.entries[name].items():
            if name == "unet":
                place = unet_place(table, key)
            elif name == "vae":
                place = vae_place(components.vae.config, key)
            else:
                place = openclip_place(key) if openclip else Place(key)
            grouped.setdefault(prefix + place.key, []).append((place, entry))
        for key, places in grouped.items():
            places.sort(key=lambda item: item[0].third or 0)
            pieces = tuple(entry.transposed() if place.transposed else entry for place, entry in places)
            tensors.append(_tensor(key, pieces, linear, dtype, vae_attention=".attn_1." in key and name == "vae"))
    prediction, zero_snr = components.scheduler.prediction_type, components.scheduler.rescale_betas_zero_snr
    metadata = {"format": "pt", "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}
    if components.few_step is not None:
        metadata["fastsd.few_step"] = components.few_step.kind.name
    if prediction == "v_prediction":
        tensors.append(Tensor("v_pred", torch.float32, (0,)))
    if zero_snr:
        tensors.append(Tensor("ztsnr", torch.float32, (0,)))
    return tensors, metadata, _compare(path, components, {tensor.key: tensor.shape for tensor in tensors}, metadata)


def _prefix(components: Components, name: str) -> tuple[str, bool]:
    """Where a network's keys start in a single file, and whether it is a text encoder in OpenCLIP's layout."""
    if name in ("unet", "vae"):
        return (UNET_PREFIX if name == "unet" else VAE_PREFIX), False
    if not components.xl:
        openclip = components.text_encoders[0].config.hidden_act == "gelu"
        return f"cond_stage_model.{'model' if openclip else 'transformer'}.", openclip
    if name == "text_encoder":
        return "conditioner.embedders.0.transformer.", False
    return f"conditioner.embedders.{len(components.text_encoders) - 1}.model.", True


def _tensor(
    key: str, entries: tuple[Entry, ...], linear: bool, dtype: torch.dtype | None, vae_attention: bool = False
) -> Tensor:
    """What is written under `key`; matrices that the layout stores as 1 x 1 convolutions get their two dimensions."""
    wanted = dtype or entries[0].dtype
    if dtype is None and any(entry.dtype != wanted for entry in entries):
        raise FastsdError(
            f"{entries[0].path}: {key} is put together from tensors of several dtypes; say which, --dtype"
        )
    shape = entries[0].shape
    if len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    if len(shape) == 2:
        empty = torch.empty(shape, device="meta")
        as_map = vae_attention or len(stored_form(_layer_name(key), empty, linear).shape) == 4
        shape = (*shape, 1, 1) if as_map else shape
    rows = shape[0] * len(entries) if shape else 0
    full = (rows, *shape[1:]) if shape else shape
    return Tensor(key, wanted, full, tuple(partial(_read, entry, wanted) for entry in entries))


def _read(entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    return read_finite(entry, dtype).to(dtype)


def _layer_name(key: str) -> str:
    """A key with the original layout's names of 1 x 1 convolutions in the house's."""
    return key.replace(".skip_connection.", ".conv_shortcut.").replace(".nin_shortcut.", ".conv_shortcut.")


def _compare(
    path: Path, components: Components, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str]
) -> list[str]:
    """Refuse a model that its single file would not be read back as; note what the file only leaves unsaid.

    A single file holds no configs. So this reads the one that would be written, and compares.
    """
    family = find_family(path, shapes, metadata)
    assert family.vae is not None
    pairs: list[tuple[str, object, object]] = [
        ("UNet", components.unet.config, family.unet),
        ("autoencoder", components.vae.config, family.vae),
    ]
    pairs += [
        ("text encoder", encoder.config, text.config)
        for encoder, text in zip(components.text_encoders, family.texts, strict=True)
    ]
    quiet = ("force_upcast", "eos_is_largest_id", "eos_token_id")  # the end is the largest id of CLIP's vocabulary
    for what, have, would in pairs:
        for field, value in vars(have).items():
            if field not in quiet and value != getattr(would, field):
                raise FastsdError(
                    f"{path}: a single file cannot say that its {what} has {field} {value!r}; it would be read as "
                    f"{getattr(would, field)!r}"
                )
    prediction = components.scheduler.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise FastsdError(f"{path}: a single file cannot say that its network predicts {prediction!r}")
    standard = SchedulerConfig()
    for field in _SCHEDULE:
        if getattr(components.scheduler, field) != getattr(standard, field):
            raise FastsdError(
                f"{path}: a single file cannot say that {field} is {getattr(components.scheduler, field)!r}; every "
                f"family has {getattr(standard, field)!r}"
            )
    return list(_notes(components, family))


def _notes(components: Components, family: Family) -> Iterator[str]:
    """What a single file leaves unsaid, where that is not what its readers will assume."""
    assert family.vae is not None
    for i, (own, text) in enumerate(zip(components.tokenizers, family.texts, strict=True)):
        usual = tokenizer(text)
        if len(own) != len(usual) or own.pad_id != usual.pad_id:
            yield f"tokenizer {i + 1} is not its family's; a single file holds none, so the family's is taken"
    if components.vae.config.force_upcast != family.vae.force_upcast:
        yield "a single file does not say whether its autoencoder needs fp32; SDXL's is taken to need it"
    usual_scheduler = family.scheduler(components.scheduler.prediction_type)
    differing = [name for name, value in vars(components.scheduler).items() if value != getattr(usual_scheduler, name)]
    if components.sample_size != family.sample_size(components.scheduler.prediction_type):
        differing.append("sample_size")
    if differing:
        yield f"a single file does not say {', '.join(differing)}; {family.name}'s are taken"
    if components.defaults or components.known_words:
        yield "a single file holds no default settings and no list of known words; those are left out"


def write_safetensors(path: Path, tensors: list[Tensor], metadata: dict[str, str]) -> None:
    """Write a file tensor by tensor; it takes the memory of one."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key))  # so that all are aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        header[tensor.key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            for piece in tensor.pieces:
                file.write(piece().contiguous().view(-1).view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: wrote {file.tell()} bytes where the header says {8 + len(text) + end}")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(target: Path, folder: bool) -> Iterator[Path]:
    """`replace_whole`, whose errors name the file."""
    try:
        with replace_whole(target, folder) as new:
            yield new
    except OSError as error:
        raise FastsdError(f"{target}: cannot be written ({error.strerror})") from error
