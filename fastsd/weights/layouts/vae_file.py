"""Autoencoders outside a checkpoint: a file in any layout or a folder, Stable Diffusion's autoencoder or TAESD."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from fastsd.config import SD_VAE, SDXL_VAE, TAESDConfig
from fastsd.errors import FastsdError
from fastsd.model.taesd import TAESD, Autoencoder, make_autoencoder
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts import configs, taesd_file
from fastsd.weights.layouts.family import find_vae
from fastsd.weights.layouts.file_layouts import FILE_LAYOUTS
from fastsd.weights.layouts.names import canonical_key
from fastsd.weights.layouts.single_file import IGNORED, read_file, vae_network
from fastsd.weights.load import error_path, fill, find_files, load_module, read_headers


def resolve_vae(
    vae: str | Path | Autoencoder,
    xl: bool,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> Autoencoder:
    """The loaded autoencoder `vae`, or the one that `load_vae` loads from the path `vae`."""
    return load_vae(vae, xl, dtype, device, allow_pickle) if isinstance(vae, str | Path) else vae


def load_vae(
    path: str | Path, xl: bool, dtype: torch.dtype, device: str | torch.device = "cpu", allow_pickle: bool = False
) -> Autoencoder:
    """Load an autoencoder: a single file in the original or the diffusers layout, or a diffusers folder.

    Args:
        path: the file, or the folder with `config.json`. For a TAESD in two files, the decoder's.
        xl: use SDXL's latent scale, not SD's, if no config states it; the shapes are the same.

    Raises:
        FastsdError: not an autoencoder, or malformed.
    """
    path, device = Path(path), torch.device(device)
    if path.is_dir():
        config = configs.read_autoencoder(path / "config.json")
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        return load_module(lambda: make_autoencoder(config), files, dtype, device)
    entries = _read(path, allow_pickle)
    preset = SDXL_VAE if xl else SD_VAE
    if taesd_file.is_taesd(entries):
        return taesd_file.load_taesd(path, entries, dtype, device, partial(_read, allow_pickle=allow_pickle))
    if any(key.startswith("encoder.down_blocks.") for key in entries):
        entries = {canonical_key(key): entry for key, entry in entries.items()}
        with torch.device("meta"):
            module = AutoencoderKL(find_vae(path, _original_shapes(entries), preset))
        return fill(module, entries, path, dtype, device)
    if not any(key.startswith("encoder.down.") for key in entries):
        raise FastsdError("not an autoencoder: no key starts with encoder.down, and it is not TAESD", path=path)
    network = vae_network(find_vae(path, {key: entry.shape for key, entry in entries.items()}, preset), entries, "")
    network.check_complete(path)
    assert isinstance(network.module, AutoencoderKL)
    return fill(network.module, dict(network.entries), path, dtype, device)


def load_preview(
    path: str | Path,
    latent_channels: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> TAESD:
    """Load TAESD's decoder, without its encoder, from any file or folder of TAESD that `load_vae` reads.

    Args:
        path: the file or the folder.
        latent_channels: of the model whose latents it will decode.

    Raises:
        FastsdError: not TAESD, a TAESD for other latents, or malformed.
    """
    path, device = Path(path), torch.device(device)
    refusal = FastsdError("not TAESD, the tiny autoencoder that decodes previews", path=path)
    if path.is_dir():
        config = configs.read_autoencoder(path / "config.json")
        if not isinstance(config, TAESDConfig):
            raise refusal
        files = find_files(path, "diffusion_pytorch_model", dtype != torch.float32)
        with torch.device("meta"):
            module = TAESD(config, encodes=False)
        entries = {key: entry for key, entry in read_headers(files).items() if not key.startswith("encoder.")}
        fill(module, entries, error_path(files), dtype, device)
    else:
        read = partial(_read, allow_pickle=allow_pickle)
        entries = read(path)
        if not taesd_file.is_taesd(entries):
            raise refusal
        module = taesd_file.load_taesd(path, entries, dtype, device, read, encodes=False)
    check_latents(path, module, latent_channels)
    return module


def check_latents(path: str | Path, vae: Autoencoder, channels: int) -> None:
    """Refuse an autoencoder for other latents than the model's.

    Raises:
        FastsdError: its latents do not have `channels` channels.
    """
    vae_channels = vae.config.latent_channels
    if vae_channels != channels:
        raise FastsdError(
            f"its latents have {vae_channels} channels, this model's {channels}; it belongs to another family",
            path=path,
        )


def _read(path: Path, allow_pickle: bool) -> dict[str, TensorEntry]:
    """An autoencoder's tensors by keys without prefix, from a file of its own or from a whole checkpoint."""
    entries, _ = read_file(path, allow_pickle)
    for prefix in dict.fromkeys([*(layout.vae_prefix for layout in FILE_LAYOUTS), "vae."]):
        prefixed = {key[len(prefix) :]: entry for key, entry in entries.items() if key.startswith(prefix)}
        if prefixed:
            entries = prefixed
            break
    return {key: entry for key, entry in entries.items() if not key.startswith(IGNORED)}


def _original_shapes(entries: dict[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    """The shapes that `find_vae` reads, from an autoencoder in the diffusers layout."""
    renames = {
        "encoder.down_blocks.": "encoder.down.",
        ".resnets.": ".block.",
        ".mid_block.attentions.0.": ".mid.attn_1.",
    }
    shapes = {}
    for key, entry in entries.items():
        for name, original in renames.items():
            key = key.replace(name, original)
        shapes[key] = entry.shape
    return shapes
