"""Single-file checkpoints in the original layout, loaded as models ready to run."""

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
from fastsd.parameters import PARAMETERS
from fastsd.weights.formats.open_file import read_tensors
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.edm_markers import with_markers
from fastsd.weights.layouts.family import CheckpointFamily, FileTextEncoder, find_family
from fastsd.weights.layouts.file_layouts import FileLayout, TextEncoderLayout
from fastsd.weights.layouts.ldm_names import OriginalKey, linear_projection, openclip_key, unet_key, unet_table, vae_key
from fastsd.weights.layouts.names import folder_keys, is_ignored
from fastsd.weights.load import fill

OPENCLIP_PAD = "!"
EMA_PREFIX = "model_ema."  # a second copy of the UNet: the exponential moving average of its weights in training
# Starts of keys, after a network's prefix, that hold none of its weights.
IGNORED = ("logit_scale", "attn_mask", "position_ids", "loss.", EMA_PREFIX)


@dataclass(frozen=True)
class FileNetwork:
    """One network of a single file.

    Attributes:
        name: its folder in the diffusers layout.
        module: the model, on the meta device.
        keys: the file's key, with prefix, of each key of the folder.
        entries: its tensors, by keys of the folder; a tensor that the model lacks keeps its own key.
    """

    name: str
    module: nn.Module
    keys: dict[str, OriginalKey]
    entries: dict[str, TensorEntry]

    def check_complete(self, path: Path) -> None:
        """Refuse a file that lacks a tensor; the message names the file's key."""
        for key, original in self.keys.items():
            if key not in self.entries:
                raise FastsdError(f"the key {original.key} is missing", path=path)


def read_file(path: Path, allow_pickle: bool = False) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors and metadata of a `.safetensors` file or, only if allowed, of a pickle.

    Raises:
        FastsdError: no file, malformed, or a pickle that is not allowed.
    """
    if not path.exists():
        raise FastsdError("no such model; give a folder that holds model_index.json, or a .safetensors file", path=path)
    if path.is_dir():
        raise FastsdError("a folder; a .safetensors file is expected", path=path)
    if not path.is_file():
        raise FastsdError("not a regular file", path=path)
    return read_tensors(path, allow_pickle)


def load_single_file(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    vae: Callable[[bool], Autoencoder] | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
) -> Components:
    """Load a checkpoint from one file.

    Args:
        path: a `.safetensors` file, or a `.ckpt` with `allow_pickle`.
        dtype, device: of all weights.
        vae: makes the autoencoder that replaces the file's own; its argument is whether the model is SDXL.
        prediction: "epsilon", "v_prediction" or "sample": what the network predicts, if the file does not say.
        allow_pickle: read pickles; only tensors and plain values are unpickled.
        ema: use the moving average of the UNet's weights (`model_ema.*`), which many files leave out.

    Raises:
        FastsdError: as `read_file` and `find_family`; a key missing, extra or of another shape; no prediction for SD 2.
    """
    path = Path(path)
    components, networks, family = outline_file(path, prediction, allow_pickle, ema)
    if family.vae is None and vae is None:
        raise FastsdError(f"no autoencoder in this file ({family.layout.vae_prefix}*); add one with {{vae}}", path=path)
    needed = [(name, module) for name, module in components.networks() if name != "vae" or vae is None]
    for name, _ in needed:  # all keys are checked before memory is allocated
        networks[name].check_complete(path)
    for name, module in needed:
        fill(module, dict(networks[name].entries), path, dtype, torch.device(device))
    if vae is not None:
        components.vae = vae(family.xl)
    return components


def outline_file(
    path: Path, prediction: str | None, allow_pickle: bool = False, ema: bool = False
) -> tuple[Components, dict[str, FileNetwork], CheckpointFamily]:
    """A single file as components on the meta device, its networks by folder name, and its family.

    Raises:
        FastsdError: as `read_file` and `find_family`; SD 2 without prediction; no averaged weights.
    """
    entries, metadata = read_file(path, allow_pickle)
    family = find_family(path, {key: entry.shape for key, entry in entries.items()}, metadata)
    family = with_markers(path, family, entries)
    if ema:
        entries |= ema_entries(path, family.layout, entries)
    prediction = _prediction(path, family, prediction)
    networks = {network.name: network for network in file_networks(family, entries)}
    unet, vae = networks["unet"].module, networks["vae"].module if "vae" in networks else _meta_vae(VAEConfig())
    encoders = [networks[text.folder].module for text in family.layout.texts]
    assert isinstance(unet, UNet) and isinstance(vae, AutoencoderKL)
    components = Components(
        unet=unet,
        vae=vae,
        text_encoders=tuple(encoder for encoder in encoders if isinstance(encoder, TextEncoder)),
        tokenizers=tuple(tokenizer_for(text) for text in family.layout.texts),
        scheduler=family.scheduler(prediction),
        sample_size=family.sample_size(prediction),
        name=path.stem,
        zeros_for_empty_prompt=family.layout.zeros_for_empty_prompt,
        aesthetic_score=family.layout.aesthetic_score,
        scaled_image=family.scaled_image,
        few_step=family.few_step,
    )
    return components, networks, family


def ema_entries(path: Path, layout: FileLayout, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The moving average of the UNet's weights, by the keys of the weights that it replaces.

    Training stores it under the parameters' names without their dots.

    Raises:
        FastsdError: there is none, or a weight has none.
    """
    if not any(key.startswith(EMA_PREFIX) for key in entries):
        raise FastsdError(f"no averaged weights ({EMA_PREFIX}*) in this file; leave out {{ema}}", path=path)
    averages = {}
    for key in entries:
        if key.startswith(layout.unet_prefix):
            name = EMA_PREFIX + key.removeprefix("model.").replace(".", "")
            if name not in entries:
                raise FastsdError(f"the key {name} is missing, which {{ema}} needs", path=path)
            averages[key] = entries[name]
    return averages


def file_networks(family: CheckpointFamily, entries: dict[str, TensorEntry]) -> Iterator[FileNetwork]:
    """The networks of a single file, each with those of its tensors that the file holds."""
    layout = family.layout
    with torch.device("meta"):
        unet = UNet(family.unet)
        encoders = [TextEncoder(text.config) for text in family.texts]
    table = unet_table(family.unet)
    yield _network("unet", unet, {key: unet_key(table, key) for key in folder_keys(unet)}, entries, layout.unet_prefix)
    if family.vae is not None:
        yield vae_network(family.vae, entries, layout.vae_prefix)
    for text, encoder in zip(family.texts, encoders, strict=True):
        yield _text_network(text, encoder, entries)


def _text_network(text: FileTextEncoder, encoder: TextEncoder, entries: dict[str, TensorEntry]) -> FileNetwork:
    prefix, names = text.layout.prefix, folder_keys(encoder)
    if text.layout.openclip:
        linear = linear_projection(entries, prefix)
        keys = {key: openclip_key(key, linear) for key in names}
        kept = _without_unused(text, entries)
    else:
        flat = not any(key.startswith(f"{prefix}text_model.") for key in entries)
        keys = {key: OriginalKey(key.removeprefix("text_model.") if flat else key) for key in names}
        kept = {key: entry for key, entry in entries.items() if key != f"{prefix}text_projection.weight"}
    return _network(text.layout.folder, encoder, keys, kept, prefix)


def vae_network(config: VAEConfig, entries: dict[str, TensorEntry], prefix: str) -> FileNetwork:
    """The autoencoder of a file in which its keys start with `prefix`."""
    module = _meta_vae(config)
    return _network("vae", module, {key: vae_key(config, key) for key in folder_keys(module)}, entries, prefix)


def tokenizer_for(text: TextEncoderLayout) -> Tokenizer:
    """The tokenizer that a text encoder was trained with."""
    return Tokenizer(pad=OPENCLIP_PAD if text.openclip else EOS)


def _prediction(path: Path, family: CheckpointFamily, requested: str | None) -> str:
    if requested is not None:
        PARAMETERS["prediction"].check(requested)
    if requested is None and family.prediction is None:
        raise FastsdError(
            f"it is {family.name} and does not say what it predicts; add {{prediction}} v_prediction (the models "
            "for 768 pixels) or {prediction} epsilon (the base models for 512)",
            path=path,
        )
    return requested or family.prediction or ""


def _network(
    name: str, module: nn.Module, keys: dict[str, OriginalKey], entries: dict[str, TensorEntry], prefix: str
) -> FileNetwork:
    """Pair the folder's keys with the file's tensors. Others under the prefix keep their key, for `fill` to refuse."""
    full = {key: replace(original, key=prefix + original.key) for key, original in keys.items()}
    known = {original.key for original in full.values()}
    selected = {
        key: _select(entries[original.key], original) for key, original in full.items() if original.key in entries
    }
    for key, entry in entries.items():
        if key.startswith(prefix) and key not in known and not key[len(prefix) :].startswith(IGNORED):
            if not is_ignored(key):
                selected[key] = entry
    return FileNetwork(name, module, full, selected)


def _select(entry: TensorEntry, original: OriginalKey) -> TensorEntry:
    """The part of a stored tensor that a key means; all of it if its shape has no such part."""
    if original.third is not None and entry.shape and entry.shape[0] % 3 == 0:
        return entry.third(original.third)
    if original.transposed and len(entry.shape) == 2:
        return entry.transposed()
    return entry


def _meta_vae(config: VAEConfig) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(config)


def _without_unused(text: FileTextEncoder, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The entries without OpenCLIP's last layer and projection, which SD 2 does not use."""
    if not text.layout.truncated:
        return entries
    last = f"{text.layout.prefix}transformer.resblocks.{text.config.num_hidden_layers}."
    projections = [f"{text.layout.prefix}text_projection{end}" for end in ("", ".weight")]
    return {key: entry for key, entry in entries.items() if not key.startswith(last) and key not in projections}
