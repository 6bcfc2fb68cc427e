"""Single-file checkpoints in the original layout, as a set of models ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fastsd.components import Components
from fastsd.config import VAEConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.taesd import Autoencoder
from fastsd.model.tokenizer import EOS, Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.formats.pickle_file import is_pickle, read_pickle
from fastsd.weights.formats.safetensors_file import Entry, read_header
from fastsd.weights.layouts.family import Family, TextPart, find_family
from fastsd.weights.layouts.ldm_names import (
    UNET_PREFIX,
    VAE_PREFIX,
    Place,
    openclip_place,
    unet_place,
    unet_table,
    vae_place,
)
from fastsd.weights.layouts.names import is_ignored, sources
from fastsd.weights.load import fill

PREDICTIONS = ("epsilon", "v_prediction", "sample")
OPENCLIP_PAD = "!"
# Keys inside a component that hold no weights of it.
AVERAGED = "model_ema."  # a second UNet: the training run's average of the first
IGNORED = ("logit_scale", "attn_mask", "position_ids", "loss.", AVERAGED)


@dataclass(frozen=True)
class Part:
    """One network of a single file: the model on the meta device, and its tensors by the house's keys."""

    name: str  # the folder it has in the diffusers layout
    module: nn.Module
    places: dict[str, Place]  # key of the house: place in the file, in full
    entries: dict[str, Entry]

    def check(self, path: Path) -> None:
        """Refuse a file that lacks a tensor, by the name that the file would give it."""
        for key, place in self.places.items():
            if key not in self.entries:
                raise FastsdError(f"{path}: the key {place.key} is missing")


def read_file(path: Path, allow_pickle: bool = False) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a `.safetensors` file or, only where that is allowed, of a pickle; and the file's metadata.

    Raises:
        FastsdError: no file, malformed, or a pickle that is not allowed.
    """
    if not path.exists():
        raise FastsdError(f"{path}: no such model; give a folder that holds model_index.json, or a .safetensors file")
    if path.is_dir():
        raise FastsdError(f"{path}: a folder; a .safetensors file is expected")
    if not path.is_file():
        raise FastsdError(f"{path}: not a regular file")
    if is_pickle(path):
        return read_pickle(path, allow_pickle), {}
    return read_header(path)


def load_single_file(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    vae: Callable[[bool], Autoencoder] | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
) -> Components:
    """Load a checkpoint that is one file.

    Args:
        path: a `.safetensors` file, or a `.ckpt` where `allow_pickle` is given.
        dtype, device: of all weights.
        vae: gives the autoencoder instead of the file's own; it is told whether the model is SDXL.
        prediction: "epsilon", "v_prediction" or "sample": what the network predicts, where the file does not say.
        allow_pickle: read pickles; nothing but tensors and plain values is unpickled.
        ema: take the UNet's weights as training averaged them (`model_ema.*`), which many files leave out.

    Raises:
        FastsdError: as `read_file` and `find_family`; a key missing, extra or of another shape; SD2 without prediction.
    """
    path = Path(path)
    components, found, family = outline_file(path, prediction, allow_pickle, ema)
    if family.vae is None and vae is None:
        raise FastsdError(f"{path}: no autoencoder in this file ({VAE_PREFIX}*); give one with --vae FILE")
    for part in found.values():
        if part.name != "vae" or vae is None:
            part.check(path)
    for name, module in components.networks():
        if name != "vae" or vae is None:
            fill(module, dict(found[name].entries), path, dtype, torch.device(device))
    if vae is not None:
        components.vae = vae(family.xl)
    return components


def outline_file(
    path: Path, prediction: str | None, allow_pickle: bool = False, ema: bool = False
) -> tuple[Components, dict[str, Part], Family]:
    """A single file with all networks on the meta device, and the tensors of each by the name of its folder.

    Raises:
        FastsdError: as `read_file` and `find_family`; SD2 without prediction; no averaged weights.
    """
    entries, metadata = read_file(path, allow_pickle)
    if ema:
        entries |= averaged(path, entries)
    family = find_family(path, {key: entry.shape for key, entry in entries.items()}, metadata)
    prediction = _prediction(path, family, prediction)
    found = {part.name: part for part in parts(family, entries)}
    unet, vae = found["unet"].module, found["vae"].module if "vae" in found else _meta_vae(VAEConfig())
    encoders = [found[text_folder(family, i)].module for i in range(len(family.texts))]
    assert isinstance(unet, UNet) and isinstance(vae, AutoencoderKL)
    components = Components(
        unet=unet,
        vae=vae,
        text_encoders=tuple(encoder for encoder in encoders if isinstance(encoder, TextEncoder)),
        tokenizers=tuple(tokenizer(text) for text in family.texts),
        scheduler=family.scheduler(prediction),
        sample_size=family.sample_size(prediction),
        name=path.stem,
        zeros_for_empty_prompt=family.xl and not family.refiner,
        aesthetic_score=family.refiner,
        few_step=family.few_step,
    )
    return components, found, family


def averaged(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The averaged weights of a file's UNet, by the keys of those that they stand for.

    Training keeps them under the parameters' names without their dots.

    Raises:
        FastsdError: there are none, or not for each weight.
    """
    if not any(key.startswith(AVERAGED) for key in entries):
        raise FastsdError(f"{path}: no averaged weights ({AVERAGED}*) in this file; leave out --ema (ema=True)")
    found = {}
    for key in entries:
        if key.startswith(UNET_PREFIX):
            name = AVERAGED + key.removeprefix("model.").replace(".", "")
            if name not in entries:
                raise FastsdError(f"{path}: the key {name} is missing; without it --ema (ema=True) cannot be followed")
            found[key] = entries[name]
    return found


def parts(family: Family, entries: dict[str, Entry]) -> Iterator[Part]:
    """The networks of a single file, each with the tensors that are there, in the house's names."""
    with torch.device("meta"):
        unet = UNet(family.unet)
        encoders = [TextEncoder(text.config) for text in family.texts]
    table = unet_table(family.unet)
    places = {key: unet_place(table, key) for key in keys(unet)}
    yield _part("unet", unet, places, entries, UNET_PREFIX)
    if family.vae is not None:
        yield vae_part(family.vae, entries, VAE_PREFIX)
    for i, (text, encoder) in enumerate(zip(family.texts, encoders, strict=True)):
        name = text_folder(family, i)
        if text.openclip:
            places = {key: openclip_place(key) for key in keys(encoder)}
            yield _part(name, encoder, places, _without_last_layer(text, entries), text.prefix)
        else:
            flat = not any(key.startswith(f"{text.prefix}text_model.") for key in entries)
            places = {key: Place(key.removeprefix("text_model.") if flat else key) for key in keys(encoder)}
            kept = {key: entry for key, entry in entries.items() if key != f"{text.prefix}text_projection.weight"}
            yield _part(name, encoder, places, kept, text.prefix)


def keys(module: nn.Module) -> list[str]:
    """Every key that a folder stores of a model."""
    return [part.key for _, _, found in sources(module) for part in found]


def text_folder(family: Family, i: int) -> str:
    """The name that a text encoder's folder has in the diffusers layout."""
    return "text_encoder_2" if i or family.refiner else "text_encoder"


def tokenizer(text: TextPart) -> Tokenizer:
    """The one that a text encoder was trained with."""
    return Tokenizer(pad=OPENCLIP_PAD if text.openclip else EOS)


def _prediction(path: Path, family: Family, given: str | None) -> str:
    if given is not None and given not in PREDICTIONS:
        raise FastsdError(f"prediction: {given!r} should be {', '.join(PREDICTIONS)}")
    if given is None and family.prediction is None:
        raise FastsdError(
            f"{path}: it is {family.name}, and does not say what it predicts; give --prediction v_prediction (the "
            "models for 768 pixels) or --prediction epsilon (the base models for 512)"
        )
    return given or family.prediction or ""


def _part(name: str, module: nn.Module, places: dict[str, Place], entries: dict[str, Entry], prefix: str) -> Part:
    """Give each key of the house its tensor; what is left under the prefix keeps its name, for `fill` to refuse."""
    full = {key: replace(place, key=prefix + place.key) for key, place in places.items()}
    known = {place.key for place in full.values()}
    found = {key: _view(entries[place.key], place) for key, place in full.items() if place.key in entries}
    for key, entry in entries.items():
        if key.startswith(prefix) and key not in known and not key[len(prefix) :].startswith(IGNORED):
            if not is_ignored(key):
                found[key] = entry
    return Part(name, module, full, found)


def _view(entry: Entry, place: Place) -> Entry:
    """The part of a stored tensor that a place means; where its shape does not allow that, all of it."""
    if place.third is not None and entry.shape and entry.shape[0] % 3 == 0:
        return entry.third(place.third)
    if place.transposed and len(entry.shape) == 2:
        return entry.transposed()
    return entry


def vae_part(config: VAEConfig, entries: dict[str, Entry], prefix: str) -> Part:
    """The autoencoder out of a file where its keys start with `prefix`."""
    module = _meta_vae(config)
    return _part("vae", module, {key: vae_place(config, key) for key in keys(module)}, entries, prefix)


def _meta_vae(config: VAEConfig) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(config)


def _without_last_layer(text: TextPart, entries: dict[str, Entry]) -> dict[str, Entry]:
    """OpenCLIP's tensors without what SD2 does not use: the last layer and the projection."""
    if text.config.projection_dim:
        return entries
    last = f"{text.prefix}transformer.resblocks.{text.config.num_hidden_layers}."
    return {
        key: entry
        for key, entry in entries.items()
        if not key.startswith(last) and key != f"{text.prefix}text_projection"
    }
