"""Writing a checkpoint folder in the diffusers layout, which diffusers opens as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.kernels import onednn
from fastsd.weights import configs
from fastsd.weights.folder import OWN_FILE, Components
from fastsd.weights.names import sources, stored_form


def save_folder(components: Components, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write every component of a model: SD1, SD2, SDXL base or refiner.

    Args:
        components: as `load_folder` gives them, or built in training.
        path: a folder; made where it does not exist.
        dtype: of the stored weights.
    """
    root = Path(path)
    unet, vae = components.unet, components.vae
    size = components.sample_size
    linear = unet.config.use_linear_projection
    _save_module(unet, root / "unet", "diffusion_pytorch_model", configs.write_unet(unet.config, size), dtype, linear)
    vae_json = configs.write_vae(vae.config, size * vae.config.downscale)
    _save_module(vae, root / "vae", "diffusion_pytorch_model", vae_json, dtype, linear)
    xl, refiner = unet.add_embedding is not None, len(components.text_encoders) == 1
    kind = "StableDiffusionPipeline"
    if xl:
        kind = "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"
    index: dict[str, Any] = {
        "_class_name": kind,
        "_diffusers_version": "0.30.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for i, (encoder, tokenizer) in enumerate(zip(components.text_encoders, components.tokenizers, strict=True)):
        suffix = "_2" if i or (xl and refiner) else ""  # SDXL's refiner has the second alone
        text_json = configs.write_clip(encoder.config)
        _save_module(encoder, root / f"text_encoder{suffix}", "model", text_json, dtype, linear)
        tokenizer.save(root / f"tokenizer{suffix}")
        index[f"text_encoder{suffix}"] = ["transformers", text_json["architectures"][0]]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    scheduler = configs.write_scheduler(components.scheduler)
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
    _write_json(root / "model_index.json", index)
    if components.defaults or components.known_words:
        own = {"defaults": components.defaults, "known_words": sorted(components.known_words)}
        _write_json(root / OWN_FILE, own)


def _save_module(
    module: nn.Module, folder: Path, stem: str, config: dict[str, Any], dtype: torch.dtype, use_linear_projection: bool
) -> None:
    tensors = {}
    for _, parameter, parts in sources(module):
        for part in parts:
            rows = onednn.dense(parameter.detach())[part.rows].to("cpu", dtype)
            tensors[part.key] = stored_form(part.key, rows, use_linear_projection).contiguous()
    _write_json(folder / "config.json", config)
    file = folder / f"{stem}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", file)  # the library makes files that only their owner may read


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
