"""Whether a file states that its model was distilled to few steps. File names are ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fastsd.config import SchedulerConfig, UNetConfig
from fastsd.few_step import KINDS, Detection
from fastsd.weights.adapters.locate import adapter_parts
from fastsd.weights.formats.pickle_file import is_pickle
from fastsd.weights.formats.safetensors_file import read_header

# In ModelSpec, models that are sampled differently have different architectures. Titles and training records (ss_*)
# are not read: they name the model's parent, or are free text, and say nothing about sampling.
_KEYS = ("fastsd.few_step", "modelspec.architecture", "modelspec.tags")
_WORDS = {"lcm": "lcm", "turbo": "turbo", "lightning": "lightning", "hyper": "hyper", "hypersd": "hyper"}


def detect_in_unet(config: UNetConfig) -> Detection | None:
    """A UNet with the guidance scale as an input is a latent consistency model (Luo et al. 2023, section 4.2)."""
    if config.time_cond_proj_dim:
        return Detection(KINDS["lcm"], "its UNet takes the guidance scale as an input")
    return None


def detect_in_scheduler(config: SchedulerConfig, xl: bool) -> Detection | None:
    """The few-step method that a folder's scheduler implies.

    The schedulers of Turbo and Lightning start Euler at the last timestep. Models with zero terminal signal-to-noise,
    most of which predict v, do the same but need the usual number of steps; they are excluded.
    """
    if config.sampler == "lcm":
        return Detection(KINDS["lcm"], "its scheduler is LCM's")
    trailing = config.timestep_spacing == "trailing" and not config.rescale_betas_zero_snr
    if not trailing or config.schedule != "default" or config.prediction_type == "v_prediction":
        return None
    if config.sampler == "euler_a" or (config.sampler == "euler" and not xl):
        return Detection(KINDS["turbo"], f"its scheduler is Turbo's: {config.sampler}, trailing")
    if config.sampler == "euler":
        name = "lightning-1" if config.prediction_type == "sample" else "lightning"
        return Detection(KINDS[name], "its scheduler is Lightning's: euler, trailing")
    return None


def detect_in_metadata(metadata: Mapping[str, str], owner: str = "its") -> Detection | None:
    """The few-step method that the metadata of a single file or an adapter states.

    Args:
        metadata: of the file.
        owner: whose metadata it is, for the reason.
    """
    for key in _KEYS:
        text = metadata.get(key, "").strip().lower()
        reason = f"{owner} metadata says so ({key})"
        if key == "fastsd.few_step" and text in KINDS:
            return Detection(KINDS[text], reason)
        if key == "modelspec.architecture":
            words = re.split(r"[^a-z]+", text)
        else:
            words = [re.sub(r"[^a-z]", "", tag) for tag in text.split(",")]
        for word in words:
            if word in _WORDS:
                return Detection(KINDS[_WORDS[word]], reason)
    return None


def detect_in_adapter(path: Path) -> Detection | None:
    """The few-step method that an adapter's metadata states; `path` as in `fastsd.weights.adapters.apply.Adapter`.

    Raises:
        FastsdError: malformed.
    """
    weights = adapter_parts(path)[0].weights
    metadata = {} if is_pickle(weights) else read_header(weights)[1]
    return detect_in_metadata(metadata, owner=f"{path.name}'s")
