"""What A1111's clients expect back: `info`, and the objects of its lists."""

from __future__ import annotations

import json
import time
from typing import Any

from fastsd import __version__
from fastsd.sampling.samplers import SAMPLERS
from fastsd.server.catalogue import Listed
from fastsd.server.jobs import Finished


def make_info(finished: Finished, texts: list[dict[str, str]], model: Listed, notes: list[str]) -> str:
    """The answer's `info`: JSON as a text. Clients read nearly all of A1111's keys (`Processed.js`).

    texts: of each image, as they stand in its file.
    """
    each = finished.settings
    first = each[0] if each else {}
    sampler = first.get("sampler")
    info = {
        "prompt": first.get("prompt", ""),
        "all_prompts": [one.get("prompt", "") for one in each],
        "negative_prompt": first.get("negative_prompt", ""),
        "all_negative_prompts": [one.get("negative_prompt", "") for one in each],
        "seed": first.get("seed", -1),
        "all_seeds": [one.get("seed", -1) for one in each],
        "subseed": first.get("subseed", -1),
        "all_subseeds": [one.get("subseed", -1) for one in each],
        "subseed_strength": first.get("subseed_strength") or 0.0,
        "width": first.get("width", 0),
        "height": first.get("height", 0),
        "sampler_name": SAMPLERS[sampler].label if sampler in SAMPLERS else str(sampler or ""),
        "cfg_scale": first.get("guidance_scale", 1.0),
        "steps": first.get("num_inference_steps", 0),
        "batch_size": first.get("batch_size", 1),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": (model.sha256 or "")[:10],
        "sd_vae_name": (first.get("vae") or {}).get("name"),
        "sd_vae_hash": (first.get("vae") or {}).get("hash"),
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.get("strength", first.get("hires_strength")),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [one["parameters"] for one in texts],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": first.get("clip_skip", 1),
        "is_using_inpainting_conditioning": "mask" in first,
        "version": f"fastsd {__version__}",
        "notes": notes,
    }
    return json.dumps(info, ensure_ascii=False)


def sd_model(model: Listed) -> dict[str, Any]:
    """One of sd-models. The file's name, not where it lies."""
    digest = model.sha256
    return {
        "title": model.title,
        "model_name": model.name,
        "hash": digest[:10] if digest else None,
        "sha256": digest,
        "filename": model.file_name,
        "config": None,
    }


def memory(ram: dict[str, int], gpu: dict[str, float]) -> dict[str, Any]:
    """The object of /memory. `gpu`: bytes by their meaning, as of the last batch."""
    found: dict[str, Any] = {"ram": ram, "cuda": {"error": "no GPU was used yet"}}
    if "total" in gpu:
        used = gpu["total"] - gpu["free"]
        system = {"free": gpu["free"], "used": used, "total": gpu["total"]}
        found["cuda"] = {"system": system, "allocated": {"current": gpu.get("allocated", 0)}}
        found["cuda"]["reserved"] = {"current": gpu.get("reserved", 0)}
    return found
