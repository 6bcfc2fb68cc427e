"""Whether a file says that its model was distilled to draw in a few steps. A file's name says nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fastsd.config import SchedulerConfig, UNetConfig
from fastsd.few_step import KINDS, Detection
from fastsd.weights.formats.safetensors_file import read_header

# ModelSpec: the architecture differs where inference does. Titles and training records (ss_*) name what a model was
# made from or is called, which says nothing of how to sample it.
_KEYS = ("fastsd.few_step", "modelspec.architecture", "modelspec.tags")
_WORDS = {"lcm": "lcm", "turbo": "turbo", "lightning": "lightning", "hyper": "hyper", "hypersd": "hyper"}


def detect_in_unet(config: UNetConfig) -> Detection | None:
    """A UNet that takes the guidance scale as an input is a latent consistency model (Luo et al. 2023, section 4.2)."""
    if config.time_cond_proj_dim:
        return Detection(KINDS["lcm"], "its UNet takes the guidance scale as an input")
    return None


def detect_in_scheduler(config: SchedulerConfig, xl: bool) -> Detection | None:
    """What the scheduler of a folder says.

    Turbo's and Lightning's have Euler start at the last timestep. Models with zero terminal signal-to-noise do so too,
    and most of them predict v; they want as many steps as any other.
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


def detect_in_metadata(metadata: Mapping[str, str]) -> Detection | None:
    """What the metadata of a single file or an adapter say."""
    for key in _KEYS:
        text = metadata.get(key, "").strip().lower()
        if key == "fastsd.few_step" and text in KINDS:
            return Detection(KINDS[text], f"its metadata say so ({key})")
        if key == "modelspec.architecture":
            found = re.split(r"[^a-z]+", text)
        else:
            found = [re.sub(r"[^a-z]", "", tag) for tag in text.split(",")]
        for word in found:
            if word in _WORDS:
                return Detection(KINDS[_WORDS[word]], f"its metadata say so ({key})")
    return None


def detect_in_adapter(path: Path) -> Detection | None:
    """What an adapter's metadata say of the model that it makes; `path` as in `fastsd.weights.adapters.apply.Adapter`.

    Raises:
        FastsdError: malformed.
    """
    said = detect_in_metadata(read_header(path / "adapter_model.safetensors" if path.is_dir() else path)[1])
    return said and Detection(said.kind, said.why.replace("its", f"{path.name}'s", 1))
