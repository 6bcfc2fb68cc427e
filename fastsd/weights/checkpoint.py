"""A checkpoint in any layout: a diffusers folder or a single file."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.model.taesd import Autoencoder
from fastsd.weights.formats.pickle_file import is_pickle
from fastsd.weights.formats.safetensors_file import read_header
from fastsd.weights.layouts.folder import load_folder
from fastsd.weights.layouts.single_file import AVERAGED, PREDICTIONS, load_single_file
from fastsd.weights.layouts.vae_file import check_latents, given_vae
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
    """Load a folder as `load_folder` does, anything else as `load_single_file` does.

    Args:
        path, dtype, device: as there.
        vae: an autoencoder to take instead of the checkpoint's own: what `load_vae` reads, or one that is loaded.
        prediction: "epsilon", "v_prediction" or "sample", where the checkpoint does not say or says it wrongly.
        allow_pickle: read pickles; nothing but tensors and plain values is unpickled.
        ema: take the averaged weights of a single file's UNet.

    Raises:
        FastsdError: something is missing, malformed or does not fit; one line with file and key.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise FastsdError(f"prediction: {prediction!r} should be {', '.join(PREDICTIONS)}")
    other = None if vae is None else partial(given_vae, vae, dtype=dtype, device=device, allow_pickle=allow_pickle)
    if Path(path).is_dir():
        if ema:
            raise FastsdError(f"{path}: a folder holds one UNet, averaged or not; leave out --ema (ema=True)")
        components = load_folder(path, dtype, device, other)
    else:
        components = load_single_file(path, dtype, device, other, prediction, allow_pickle, ema)
    if isinstance(vae, str | Path):
        check_latents(vae, components.vae, components.unet.config.out_channels)
    if prediction is not None:
        components.scheduler = replace(components.scheduler, prediction_type=prediction)
    return components


def count_numbers(path: str | Path, dtype: torch.dtype) -> int:
    """How many numbers the weights of a checkpoint are, from its files' headers; of a pickle, at least how many.

    Args:
        path: a folder or a single file.
        dtype: that it will be loaded in; folders may hold files for each.

    Raises:
        FastsdError: a file is missing or malformed.
    """
    root = Path(path)
    if root.is_dir():
        half = dtype != torch.float32
        found = [find_files(root / part, stem, half) for part, stem in STEMS.items() if (root / part).is_dir()]
        files = [file for files in found for file in files]
    elif not root.is_file():
        return 0  # what it is instead, loading says
    elif is_pickle(root):
        return root.stat().st_size // torch.float32.itemsize
    else:
        files = [root]
    return sum(
        math.prod(entry.shape)
        for file in files
        for key, entry in read_header(file)[0].items()
        if not key.startswith(AVERAGED)
    )
