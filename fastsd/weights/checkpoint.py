"""Checkpoints in every layout: a diffusers folder or a single file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fastsd.components import Components
from fastsd.errors import FastsdError, about
from fastsd.model.taesd import Autoencoder
from fastsd.parameters import PARAMETERS
from fastsd.weights.formats.pickle_file import is_pickle
from fastsd.weights.formats.safetensors_file import read_header
from fastsd.weights.layouts.folder import load_folder
from fastsd.weights.layouts.single_file import EMA_PREFIX, load_single_file
from fastsd.weights.layouts.vae_file import check_latents, resolve_vae
from fastsd.weights.load import STEMS, find_files


def load_checkpoint(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    vae: str | Path | Autoencoder | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
) -> Components:
    """Load a folder by `load_folder`, anything else by `load_single_file`.

    Args:
        path, dtype, device: as in those functions.
        vae: replaces the checkpoint's autoencoder: a path that `load_vae` reads, or a loaded autoencoder.
        prediction: "epsilon", "v_prediction" or "sample"; needed if the checkpoint does not say, or says it wrongly.
        allow_pickle: read pickles; only tensors and plain values are unpickled.
        ema: use the exponential moving average of a single file's UNet weights.

    Raises:
        FastsdError: something is missing, malformed or does not fit; one line with file and key.
    """
    if prediction is not None:
        PARAMETERS["prediction"].check(prediction)
    make_vae = None if vae is None else _vae_maker(vae, dtype, device, allow_pickle)
    if Path(path).is_dir():
        if ema:
            raise FastsdError("a folder holds only one set of UNet weights; leave out {ema}", path=path)
        components = load_folder(path, dtype, device, make_vae)
    else:
        components = load_single_file(path, dtype, device, make_vae, prediction, allow_pickle, ema)
    if isinstance(vae, str | Path):
        with about("vae"):
            check_latents(vae, components.vae, components.unet.config.out_channels)
    if prediction is not None:
        components.scheduler = replace(components.scheduler, prediction_type=prediction)
    return components


def _vae_maker(
    vae: str | Path | Autoencoder, dtype: torch.dtype, device: str | torch.device, allow_pickle: bool
) -> Callable[[bool], Autoencoder]:
    """A function that loads the replacing autoencoder, with errors about the argument `vae`."""

    def make(xl: bool) -> Autoencoder:
        with about("vae"):
            return resolve_vae(vae, xl, dtype=dtype, device=device, allow_pickle=allow_pickle)

    return make


def count_parameters(path: str | Path, dtype: torch.dtype) -> int:
    """The parameter count of a checkpoint, from its files' headers; for a pickle, the count if all values were fp32.

    Args:
        path: a folder or a single file.
        dtype: the dtype it will be loaded in, because a folder may hold files for several.

    Raises:
        FastsdError: a file is missing or malformed.
    """
    root = Path(path)
    if root.is_dir():
        half = dtype != torch.float32
        networks = [find_files(root / name, stem, half) for name, stem in STEMS.items() if (root / name).is_dir()]
        files = [file for network in networks for file in network]
    elif not root.is_file():
        return 0  # loading reports what is wrong
    elif is_pickle(root):
        return root.stat().st_size // torch.float32.itemsize
    else:
        files = [root]
    return sum(
        math.prod(entry.shape)
        for file in files
        for key, entry in read_header(file)[0].items()
        if not key.startswith(EMA_PREFIX)
    )
