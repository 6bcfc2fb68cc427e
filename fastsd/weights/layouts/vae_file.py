"""Autoencoders apart from their checkpoint: a file in any layout or a folder, Stable Diffusion's own kind or TAESD."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fastsd.config import TAESDConfig
from fastsd.errors import FastsdError
from fastsd.model.taesd import TAESD, Autoencoder, make_autoencoder
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.formats.safetensors_file import Entry
from fastsd.weights.layouts import configs, taesd_file
from fastsd.weights.layouts.family import find_vae
from fastsd.weights.layouts.ldm_names import VAE_PREFIX
from fastsd.weights.layouts.names import canonical
from fastsd.weights.layouts.single_file import IGNORED, read_file, vae_part
from fastsd.weights.load import fill, find_files, load_module, place_of, read_headers


def given_vae(
    vae: str | Path | Autoencoder,
    xl: bool,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> Autoencoder:
    """The autoencoder that a caller gives instead of a checkpoint's own; a path is loaded by `load_vae`."""
    return load_vae(vae, xl, dtype, device, allow_pickle) if isinstance(vae, str | Path) else vae


def load_vae(
    path: str | Path, xl: bool, dtype: torch.dtype, device: str | torch.device = "cpu", allow_pickle: bool = False
) -> Autoencoder:
    """An autoencoder by itself: a single file in the original or the diffusers layout, or a folder of the latter.

    Args:
        path: the file, or the folder with `config.json`. TAESD may be in two files, of which the decoder's is given.
        xl: take SDXL's latent scale where no config says it; the shapes are those of SD's.

    Raises:
        FastsdError: no autoencoder, or malformed.
    """
    path, device = Path(path), torch.device(device)
    if path.is_dir():
        config = configs.read_autoencoder(path / "config.json")
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        return load_module(lambda: make_autoencoder(config), files, dtype, device)
    entries = _read(path, allow_pickle)
    if taesd_file.is_taesd(entries):
        return taesd_file.load_taesd(path, entries, dtype, device, partial(_read, allow_pickle=allow_pickle))
    if any(key.startswith("encoder.down_blocks.") for key in entries):
        named = {canonical(key): entry for key, entry in entries.items()}
        with torch.device("meta"):
            module = AutoencoderKL(find_vae(path, _original_shapes(named), xl))
        return fill(module, named, path, dtype, device)
    if not any(key.startswith("encoder.down.") for key in entries):
        raise FastsdError(f"{path}: not an autoencoder: no key starts with encoder.down, and it is no TAESD")
    part = vae_part(find_vae(path, {key: entry.shape for key, entry in entries.items()}, xl), entries, "")
    part.check(path)
    assert isinstance(part.module, AutoencoderKL)
    return fill(part.module, dict(part.entries), path, dtype, device)


def load_preview(
    path: str | Path,
    latent_channels: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> TAESD:
    """TAESD's decoder alone, from whatever `load_vae` takes for TAESD.

    Args:
        path: the file or the folder.
        latent_channels: of the model whose latents it is to show.

    Raises:
        FastsdError: it is no TAESD, one for other latents, or malformed.
    """
    path, device = Path(path), torch.device(device)
    refusal = FastsdError(f"{path}: not TAESD, the tiny autoencoder, whose decoder draws previews")
    if path.is_dir():
        config = configs.read_autoencoder(path / "config.json")
        if not isinstance(config, TAESDConfig):
            raise refusal
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        with torch.device("meta"):
            module = TAESD(config, encodes=False)
        entries = {key: entry for key, entry in read_headers(files).items() if not key.startswith("encoder.")}
        fill(module, entries, place_of(files), dtype, device)
    else:
        read = partial(_read, allow_pickle=allow_pickle)
        entries = read(path)
        if not taesd_file.is_taesd(entries):
            raise refusal
        module = taesd_file.load_taesd(path, entries, dtype, device, read, encodes=False)
    check_latents(path, module, latent_channels)
    return module


def check_latents(path: str | Path, vae: Autoencoder, channels: int) -> None:
    """Refuse an autoencoder for models with other latents.

    Raises:
        FastsdError: its latents do not have `channels` channels.
    """
    own = vae.config.latent_channels
    if own != channels:
        raise FastsdError(f"{path}: its latents have {own} channels, this model's {channels}; it is of another family")


def _read(path: Path, allow_pickle: bool) -> dict[str, Entry]:
    """An autoencoder's tensors without prefix, out of a file of its own or a whole checkpoint."""
    entries, _ = read_file(path, allow_pickle)
    for prefix in (VAE_PREFIX, "vae."):
        inside = {key[len(prefix) :]: entry for key, entry in entries.items() if key.startswith(prefix)}
        if inside:
            entries = inside
            break
    return {key: entry for key, entry in entries.items() if not key.startswith(IGNORED)}


def _original_shapes(entries: dict[str, Entry]) -> dict[str, tuple[int, ...]]:
    """What `find_vae` looks at, out of an autoencoder in the diffusers layout."""
    new = {"encoder.down_blocks.": "encoder.down.", ".resnets.": ".block.", ".mid_block.attentions.0.": ".mid.attn_1."}
    shapes = {}
    for key, entry in entries.items():
        for old, original in new.items():
            key = key.replace(old, original)
        shapes[key] = entry.shape
    return shapes
