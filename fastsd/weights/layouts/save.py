"""Writing a checkpoint folder in the diffusers layout, which diffusers can open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.components import Components
from fastsd.config import UNetConfig
from fastsd.errors import FastsdError
from fastsd.kernels.cpu import onednn
from fastsd.model.clip import TextEncoder
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.folder import FASTSD_FILE
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.scheduler import write_scheduler

# The parts of diffusers' pipeline names, by what the UNet reads beside the latent.
_PIPELINES = {"mask": "Inpaint", "image": "InstructPix2Pix", "depth": "Depth2Img"}


def save_folder(components: Components, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write every component of a model: SD 1, SD 2, SDXL base or refiner.

    Args:
        components: from `load_folder`, or built in training.
        path: a folder; created if it does not exist.
        dtype: of the stored weights.

    Raises:
        FastsdError: its autoencoder cannot encode.
    """
    root = Path(path)
    write_configs(components, root)
    linear = components.unet.config.use_linear_projection
    for name, module in components.networks():
        _save_module(module, root / weights_file(name), dtype, linear)


def weights_file(name: str) -> str:
    """The path of a network's weights in a folder."""
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    return f"{name}/{stem}.safetensors"


def write_configs(components: Components, root: Path) -> None:
    """Write everything in a folder except the weights. The networks may be on the meta device."""
    unet, vae = components.unet, components.vae
    if vae.encoder is None:
        raise FastsdError(
            "not written: the autoencoder is only TAESD's decoder, and a folder needs its encoder too", path=root
        )
    size = components.sample_size
    xl = components.xl
    refiner = xl and len(components.text_encoders) == 1
    index: dict[str, Any] = {
        "_class_name": _pipeline(unet.config, xl, refiner),
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    _write_json(root / "unet" / "config.json", unet_config.write_unet(unet.config, size))
    vae_json = configs.write_autoencoder(vae.config, size * vae.config.downscale)
    _write_json(root / "vae" / "config.json", vae_json)
    index["vae"] = ["diffusers", vae_json["_class_name"]]
    texts = [(name, module) for name, module in components.networks() if isinstance(module, TextEncoder)]
    for (name, encoder), tokenizer in zip(texts, components.tokenizers, strict=True):
        text_json = configs.write_clip(encoder.config)
        _write_json(root / name / "config.json", text_json)
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        tokenizer.save(root / tokenizer_name)
        index[name] = ["transformers", text_json["architectures"][0]]
        index[tokenizer_name] = ["transformers", "CLIPTokenizer"]
    scheduler = write_scheduler(components.scheduler)
    _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if xl:
        index["force_zeros_for_empty_prompt"] = components.zeros_for_empty_prompt
        if refiner:
            index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
            index["requires_aesthetics_score"] = components.aesthetic_score
    else:
        absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "image_encoder": [None, None]}
        index |= absent | {"requires_safety_checker": False}
    if components.scaled_image:
        index["is_cosxl_edit"] = True
    if unet.config.reads == "depth" and not xl:
        index["depth_estimator"] = [None, None]
    _write_json(root / "model_index.json", index)
    extras: dict[str, Any] = {}
    if components.defaults or components.known_words:
        extras = {"defaults": components.defaults, "known_words": sorted(components.known_words)}
    if components.few_step is not None:
        extras["few_step"] = components.few_step.kind.name
    if extras:
        _write_json(root / FASTSD_FILE, extras)


def _pipeline(unet: UNetConfig, xl: bool, refiner: bool) -> str:
    """The class of diffusers that runs the model; without one of its own, that of its family."""
    if not xl:
        return f"StableDiffusion{_PIPELINES.get(unet.reads or '', '')}Pipeline"
    if unet.reads in ("mask", "image"):
        return f"StableDiffusionXL{_PIPELINES[unet.reads]}Pipeline"
    return "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"


def _save_module(module: nn.Module, file: Path, dtype: torch.dtype, use_linear_projection: bool) -> None:
    tensors = {}
    for _, parameter, parts in sources(module):
        for part in parts:
            rows = onednn.dense(parameter.detach())[part.rows].to("cpu", dtype)
            tensors[part.key] = stored_form(part.key, rows, use_linear_projection).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(file.parent / "config.json", file)  # the library creates files that only their owner may read


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
