"""Checkpoint folders in the diffusers layout, loaded as models ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.few_step import KINDS, Detection
from fastsd.model.clip import TextEncoder
from fastsd.model.taesd import Autoencoder, make_autoencoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.weights.few_step import detect_in_scheduler, detect_in_unet
from fastsd.weights.formats.json_file import ConfigReader, read_json
from fastsd.weights.layouts import configs
from fastsd.weights.layouts.fit import check_fit, refuse_other_class
from fastsd.weights.layouts.scheduler import read_scheduler
from fastsd.weights.layouts.unet_config import read_unet
from fastsd.weights.load import error_path, fill, find_files, read_headers

FASTSD_FILE = "fastsd.json"  # what only fastsd reads: default settings, known words, the few-step method


def load_folder(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    vae: Callable[[bool], Autoencoder] | None = None,
) -> Components:
    """Load a folder that diffusers (or `save_folder`) wrote.

    Args:
        path: the folder with `model_index.json`.
        dtype: of all weights.
        device: of all weights; each tensor goes there straight from its file.
        vae: makes the autoencoder that replaces the folder's own; its argument is whether the model is SDXL.

    Raises:
        FastsdError: something is missing, malformed or does not fit; one line with file and key.
    """
    components, files = outline_folder(Path(path), dtype != torch.float32)
    for name, module in components.networks():
        if name != "vae" or vae is None:
            fill(module, read_headers(files[name]), error_path(files[name]), dtype, torch.device(device))
    if vae is not None:
        components.vae = vae(components.xl)
    return components


def outline_folder(root: Path, half: bool) -> tuple[Components, dict[str, list[Path]]]:
    """A folder as components on the meta device, and the files of each network's weights.

    Args:
        root: the folder with `model_index.json`.
        half: prefer the fp16 variant if both exist.

    Raises:
        FastsdError: something is missing, or a config is malformed.
    """
    check_model_folder(root)
    index = read_json(root / "model_index.json")
    refuse_other_class(root, index)
    unet_config, sample_size = read_unet(root / "unet" / "config.json")
    vae_config = configs.read_autoencoder(root / "vae" / "config.json")
    extras = _read_extras(root / FASTSD_FILE)
    files = {}
    clip_configs, tokenizers = [], []
    for suffix in ("", "_2"):
        if not (root / f"text_encoder{suffix}").is_dir():
            continue
        clip_configs.append(configs.read_clip(root / f"text_encoder{suffix}" / "config.json"))
        files[f"text_encoder{suffix}"] = find_files(root / f"text_encoder{suffix}", "model", half)
        tokenizers.append(Tokenizer(root / f"tokenizer{suffix}"))
    if not clip_configs:
        raise FastsdError("no text_encoder folder; a Stable Diffusion checkpoint has one or two", path=root)
    check_fit(root, unet_config, vae_config, clip_configs, index.get("requires_aesthetics_score") is True)
    for name in ("unet", "vae"):
        files[name] = find_files(root / name, "diffusion_pytorch_model", half)
    with torch.device("meta"):
        unet, vae = UNet(unet_config), make_autoencoder(vae_config)
        text_encoders = tuple(TextEncoder(config) for config in clip_configs)
    xl = unet_config.addition_time_embed_dim > 0
    as_stated = xl or unet_config.reads not in ("", "mask")
    scheduler = read_scheduler(root / "scheduler" / "scheduler_config.json", as_stated)
    few_step = detect_in_unet(unet_config) or detect_in_scheduler(scheduler, xl)
    if extras.get("few_step") in KINDS:
        few_step = Detection(KINDS[extras["few_step"]], f"its {FASTSD_FILE} says so")
    components = Components(
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tuple(tokenizers),
        scheduler=scheduler,
        sample_size=sample_size,
        name=root.resolve().name,
        zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt") is True,
        aesthetic_score=index.get("requires_aesthetics_score") is True,
        scaled_image=reads_scaled(index, scheduler),
        defaults=extras.get("defaults", {}),
        known_words=frozenset(extras.get("known_words", ())),
        few_step=few_step,
    )
    if set(files) != {name for name, _ in components.networks()}:
        raise FastsdError("its text encoders should be text_encoder/, and for SDXL text_encoder_2/ too", path=root)
    return components, files


def _read_extras(path: Path) -> dict[str, Any]:
    """What only fastsd reads, if the file is there.

    Raises:
        FastsdError: malformed, or a value of another type.
    """
    if not path.is_file():
        return {}
    r = ConfigReader(path)
    if not isinstance(r.data.get("defaults", {}), dict):
        raise r.error("defaults", "it should be an object")
    words = r.data.get("known_words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise r.error("known_words", "it should be a list of words")
    if not isinstance(r.data.get("few_step", ""), str):
        raise r.error("few_step", "it should be a text")
    return r.data


def reads_scaled(index: Mapping[str, Any], scheduler: SchedulerConfig) -> bool:
    """Whether a UNet that edits reads the image scaled: model_index.json says so, or it is trained as CosXL Edit.

    diffusers leaves that to its caller (`is_cosxl_edit`); ComfyUI goes by EDM's noise levels with v-prediction.
    """
    trained = scheduler.edm is not None and scheduler.prediction_type == "v_prediction"
    return trained or index.get("is_cosxl_edit") is True


def check_model_folder(root: Path) -> None:
    """Refuse what is not a checkpoint folder; the message says what it is."""
    if not root.exists():
        raise FastsdError("no such model; give a folder that holds model_index.json", path=root)
    if not root.is_dir():
        raise FastsdError("not a folder", path=root)
    if not any(root.iterdir()):
        raise FastsdError("the folder is empty; a model folder holds model_index.json, unet/, vae/, ...", path=root)
    if not (root / "model_index.json").is_file():
        raise FastsdError("no model_index.json in this folder, so it is not a model in the diffusers layout", path=root)
    for name in ("unet", "vae", "scheduler"):
        if not (root / name).is_dir():
            raise FastsdError(f"the folder {name}/ is missing; download the model again", path=root)
