"""The marker tensors by which single files say that they are EDM models: Playground 2.5's and CosXL's.

ComfyUI reads the same keys (comfy/supported_models.py, `SDXL.model_type`), and diffusers those of Playground
(`from_single_file`). Until they are read, such a file looks like SDXL and its images are noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastsd.config import EDMConfig
from fastsd.errors import FastsdError
from fastsd.weights.formats.safetensors_file import TensorEntry
from fastsd.weights.layouts.family import CheckpointFamily

MEAN, STD = "edm_mean", "edm_std"  # of Playground 2.5's latents, by channel
HIGHEST, LOWEST = "edm_vpred.sigma_max", "edm_vpred.sigma_min"  # CosXL's noise levels
MARKERS = (MEAN, STD, HIGHEST, LOWEST)
PLAYGROUND_SCALE = 0.5  # diffusers' PLAYGROUND_VAE_SCALING_FACTOR; the files do not hold it
MAX_NUMBERS = 64  # in a marker; one per channel of the latents
COSXL = EDMConfig(sigma_data=1.0, sigma_max=120.0)  # ComfyUI's `ModelSamplingContinuousEDM`


def with_markers(path: Path, family: CheckpointFamily, entries: Mapping[str, TensorEntry]) -> CheckpointFamily:
    """The family with what the markers say of its noise levels and its latents.

    Raises:
        FastsdError: one of a pair of markers is missing, or a value is none that it can have.
    """
    if MEAN in entries or STD in entries:
        mean, std = _numbers(path, entries, MEAN), _numbers(path, entries, STD)
        channels = family.unet.out_channels
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise FastsdError(f"{MEAN} and {STD} should hold {channels} numbers, and {STD} positive ones", path=path)
        vae = family.vae
        if vae is not None:
            vae = replace(vae, scaling_factor=PLAYGROUND_SCALE, latents_mean=mean, latents_std=std)
        reason = f"the file holds the marker keys {MEAN} and {STD}"
        return replace(family, vae=vae, edm=EDMConfig(), prediction="epsilon", prediction_reason=reason)
    if HIGHEST in entries or LOWEST in entries:
        highest = _numbers(path, entries, HIGHEST)[0]
        lowest = _numbers(path, entries, LOWEST)[0] if LOWEST in entries else COSXL.sigma_min
        if not 0 < lowest < highest:
            raise FastsdError(f"{HIGHEST} is {highest:g}; it should be above {lowest:g}, the lowest level", path=path)
        reason = f"the file holds the marker key {HIGHEST}"
        edm = replace(COSXL, sigma_min=lowest, sigma_max=highest)
        edits = family.unet.reads == "image"  # ComfyUI: a CosXL that edits reads the image scaled
        return replace(family, edm=edm, prediction="v_prediction", prediction_reason=reason, scaled_image=edits)
    return family


def _numbers(path: Path, entries: Mapping[str, TensorEntry], key: str) -> tuple[float, ...]:
    if key not in entries:
        raise FastsdError(f"the key {key} is missing, though another marker of EDM models is there", path=path)
    few = 1 <= math.prod(entries[key].shape) <= MAX_NUMBERS
    values = tuple(entries[key].read().double().flatten().tolist()) if few else ()
    if not few or not all(abs(value) < 1e6 for value in values):
        raise FastsdError(f"the key {key} does not hold a few finite numbers", path=path)
    return values
