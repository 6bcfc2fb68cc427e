"""The nodes: a checkpoint, LoRAs and ControlNets for it, encode, sample, decode; upscalers.

What passes between them is ComfyUI's own where there is one: an IMAGE is `[B, H, W, 3]` fp32 from 0 to 1, a MASK is
`[B, H, W]`, 1 where it paints, a LATENT is `{"samples": [B, C, h, w]}` as the autoencoder has it, unscaled. So latents
of these nodes can go to ComfyUI's own, and back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

import fastsd
from fastsd.errors import FastsdError
from fastsd.image.comfy_graph import SCHEDULE_NAMES

log = logging.getLogger("fastsd")
CATEGORY = "fastsd"
OWN_VAE = "the checkpoint's"
PIXELS = "fastsd_pixels"  # the key under which a latent of ours keeps the pixels that it was encoded from
RULES = ("comfy", "fastsd", "a1111", "diffusers")
# KSampler's names, and two that ComfyUI lacks. The engine knows them as spellings of its own.
SAMPLERS = (
    *("euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast"),
    *("dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm"),
    *("lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_ancestral", "gradient_estimation"),
    *("er_sde", "seeds_2", "seeds_3", "sa_solver", "ddim", "uni_pc", "exp_heun_2_x0", "exp_heun_2_x0_sde"),
    *("tcd", "restart"),
)
SCHEDULES = ("normal", "karras", "exponential", "sgm_uniform", "simple", "ddim_uniform", "beta", "linear_quadratic",
             "kl_optimal", "align_your_steps")  # fmt: skip
MOST = 0xFFFFFFFFFFFFFFFF  # the largest seed of ComfyUI


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint, and the LoRAs that a branch of the graph puts on it."""

    pipe: fastsd.Pipeline
    adapters: tuple[fastsd.Adapter, ...] = ()


class LoadFastsd:
    """A checkpoint, from ComfyUI's folder of checkpoints."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("FASTSD",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "ckpt_name": (["digits (bundled)", *folder_paths.get_filename_list("checkpoints")],),
                "vae_name": ([OWN_VAE, *folder_paths.get_filename_list("vae")],),
                "dtype": (["auto", "fp16", "bf16", "fp32", "fp8"],),
            }
        }

    def load(self, ckpt_name: str, vae_name: str, dtype: str) -> tuple[Model]:
        bundled = ckpt_name.startswith("digits (")
        path = None if bundled else folder_paths.get_full_path("checkpoints", ckpt_name)
        vae = None if vae_name == OWN_VAE else folder_paths.get_full_path("vae", vae_name)
        device = comfy.model_management.get_torch_device()
        return (Model(fastsd.Pipeline.from_pretrained(path, device, dtype, vae=vae)),)


class FastsdLora:
    """A LoRA, DoRA or LyCORIS file on the checkpoint, from ComfyUI's folder of LoRAs. Several add up."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "apply", ("FASTSD",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = ("FLOAT", {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01})
        names = folder_paths.get_filename_list("loras")
        return {
            "required": {
                "model": ("FASTSD",),
                "lora_name": (names,),
                "strength_model": strength,
                "strength_clip": strength,
            }
        }

    def apply(self, model: Model, lora_name: str, strength_model: float, strength_clip: float) -> tuple[Model]:
        path = folder_paths.get_full_path("loras", lora_name)
        return (replace(model, adapters=(*model.adapters, fastsd.Adapter(path, strength_model, strength_clip))),)


class FastsdControlNet:
    """A ControlNet or a T2I-Adapter with its image. `before` takes another one; they add up."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("FASTSD_CONTROL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("FASTSD",),
                "control_net_name": (folder_paths.get_filename_list("controlnet"),),
                "image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.0, **share}),
                "end_percent": ("FLOAT", {"default": 1.0, **share}),
            },
            "optional": {"before": ("FASTSD_CONTROL",)},
        }

    def load(
        self, model: Model, control_net_name: str, image: torch.Tensor, strength: float, start_percent: float,
        end_percent: float, before: tuple[fastsd.Control, ...] = (),
    ) -> tuple[tuple[fastsd.Control, ...]]:  # fmt: skip
        net = model.pipe.load_controlnet(folder_paths.get_full_path("controlnet", control_net_name))
        control = fastsd.Control(net, single_image(image, "image"), strength, start_percent, end_percent)
        return ((*before, control),)


class FastsdEncode:
    """Images to latents. With a mask, sampling paints where it is white and keeps the rest."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("FASTSD",), "pixels": ("IMAGE",)}, "optional": {"mask": ("MASK",)}}

    def encode(self, model: Model, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[dict[str, Any]]:
        vae = model.pipe.components.vae
        factor = vae.config.downscale
        height, width = (side // factor * factor for side in pixels.shape[1:3])
        top, left = ((have - use) // 2 for have, use in zip(pixels.shape[1:3], (height, width)))
        kept = pixels[:, top : top + height, left : left + width, :3]  # the middle, as ComfyUI's own node takes it
        weight = next(vae.parameters())
        with torch.inference_mode():
            means = [vae.encode((2 * image[None] - 1).to(weight)).mean for image in kept]
        latent = {"samples": torch.cat(means).permute(0, 3, 1, 2).float().cpu(), PIXELS: kept}
        if mask is not None:
            latent["noise_mask"] = mask.reshape(-1, *mask.shape[-2:])[:, top : top + height, left : left + width]
        return (latent,)


class FastsdSample:
    """The whole of sampling: two texts, a latent to begin from, a latent that comes out."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "sample", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"multiline": True, "dynamicPrompts": True})
        return {
            "required": {
                "model": ("FASTSD",),
                "positive": text,
                "negative": text,
                "seed": ("INT", {"default": 0, "min": 0, "max": MOST, "control_after_generate": True}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
                "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "sampler_name": (list(SAMPLERS),),
                "scheduler": (list(SCHEDULES),),
                "latent_image": ("LATENT",),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
                "rules": (list(RULES),),
                "preview_every": ("INT", {"default": 5, "min": 0, "max": 1000}),
            },
            "optional": {"control": ("FASTSD_CONTROL",)},
        }

    def sample(
        self, model: Model, positive: str, negative: str, seed: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, latent_image: dict[str, Any], denoise: float, rules: str, preview_every: int,
        control: tuple[fastsd.Control, ...] = (),
    ) -> tuple[dict[str, Any]]:  # fmt: skip
        pipe = model.pipe
        if model.adapters != tuple(pipe.adapters.active):
            for note in pipe.set_adapters(list(model.adapters)):
                log.warning(note)
        settings = {
            "negative_prompt": negative,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": cfg,
            "sampler": sampler_name,
            "schedule": schedule_of(scheduler, rules),
            "like": None if rules == "fastsd" else rules,
            "controls": list(control),
            "output_type": "latent",
        }
        calls = list(calls_of(pipe, latent_image, denoise, rules))
        parts, bar, done = [], comfy.utils.ProgressBar(len(calls) * steps), 0
        for call in calls:
            for step in pipe.stream(positive, **settings, **call):
                comfy.model_management.throw_exception_if_processing_interrupted()
                shown = preview_every and step.result is None and step.index % preview_every == 0
                at = done + round(steps * step.index / max(step.total, 1))
                bar.update_absolute(at, len(calls) * steps, ("JPEG", step.preview(), 512) if shown else None)
            assert step.result is not None
            for note in step.result.notes:
                log.warning(note)
            done += steps
            parts.append(step.result.images)
        scaled = torch.cat(parts).permute(0, 2, 3, 1)
        samples = pipe._engine.codec.unscale(scaled).permute(0, 3, 1, 2).contiguous().cpu()
        return ({"samples": samples},)


def schedule_of(scheduler: str, rules: str) -> str:
    """The engine's name. "normal", the menu's first, is the spacing, which samplers without a schedule have too."""
    return SCHEDULE_NAMES.get(scheduler, scheduler) if rules in ("comfy", "fastsd") else scheduler


class FastsdDecode:
    """Latents to images."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "decode", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("FASTSD",), "samples": ("LATENT",), "tiled": ("BOOLEAN", {"default": False})}}

    def decode(self, model: Model, samples: dict[str, Any], tiled: bool) -> tuple[torch.Tensor]:
        return (decoded(model.pipe, samples["samples"], tiled),)


class LoadFastsdUpscaler:
    """A network of ESRGAN's kind, from ComfyUI's folder of upscale models.

    Most of them are `.pth` files, which are pickles: `allow_pickle` reads nothing of one but tensors and plain values.
    """

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("FASTSD_UPSCALER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": (folder_paths.get_filename_list("upscale_models"),),
                "dtype": (["auto", "fp16", "bf16", "fp32"],),
                "allow_pickle": ("BOOLEAN", {"default": False}),
            }
        }

    def load(self, model_name: str, dtype: str, allow_pickle: bool) -> tuple[fastsd.Upscaler]:
        path = folder_paths.get_full_path("upscale_models", model_name)
        device = comfy.model_management.get_torch_device()
        return (fastsd.Upscaler.from_file(path, device, dtype, allow_pickle),)


class FastsdUpscale:
    """Images enlarged by an upscaler, in tiles: by `scale_by`, or by the network's own factor where that is 0."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "upscale", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "upscaler": ("FASTSD_UPSCALER",),
                "image": ("IMAGE",),
                "scale_by": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 16.0, "step": 0.25}),
            }
        }

    def upscale(self, upscaler: fastsd.Upscaler, image: torch.Tensor, scale_by: float) -> tuple[torch.Tensor]:
        bar, large = comfy.utils.ProgressBar(len(image)), []

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(total * len(large) + done, total * len(image))

        for one in image:
            large.append(np.asarray(upscaler(single_image(one[None], "image"), scale_by or None, progress=progress)))
        for note in upscaler.take_notes():
            log.warning(note)
        return (torch.from_numpy(np.stack(large).astype(np.float32) / 255),)


def decoded(pipe: fastsd.Pipeline, samples: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    """Unscaled latents `[B, C, h, w]` as an IMAGE."""
    channels = pipe.components.vae.config.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise FastsdError(f"latents of shape {list(samples.shape)}; this checkpoint's are [B, {channels}, h, w]")
    scaled = pipe._engine.codec.scale(samples.to(pipe.device, torch.float32).permute(0, 2, 3, 1))
    images = pipe._decode_float(scaled, tiled)
    return torch.from_numpy(np.stack(images)) / 255


def calls_of(pipe: fastsd.Pipeline, latent: dict[str, Any], denoise: float, rules: str) -> list[dict[str, Any]]:
    """The calls of the engine that a latent stands for: one for an empty latent, else one for each of its images."""
    samples = latent["samples"]
    factor = pipe.components.vae.config.downscale
    height, width = (side * factor for side in samples.shape[-2:])
    if PIXELS not in latent and not samples.any():
        return [{"width": width, "height": height, "num_images_per_prompt": len(samples)}]
    pixels = latent.get(PIXELS)
    if pixels is None:
        log.warning("the latent is another node's: it is decoded and encoded again; fastsd's Encode avoids that")
        pixels = decoded(pipe, samples)
    masks = latent.get("noise_mask")
    calls = []
    for k, image in enumerate(pixels):
        call: dict[str, Any] = {"image": single_image(image[None], "pixels"), "strength": denoise}
        if masks is not None:
            flat = masks.reshape(-1, *masks.shape[-2:])
            call["mask_image"] = as_mask(flat[k % len(flat)], (width, height))
        if len(pixels) > 1 and rules in ("comfy", "diffusers"):  # noise is drawn for the batch
            call |= {"noise_index": k, "noise_count": len(pixels)}
        calls.append(call)
    return calls


def single_image(image: torch.Tensor, name: str) -> Image.Image:
    """An IMAGE of one image as Pillow's, rounded."""
    if image.shape[0] != 1:
        raise FastsdError(f"{name} holds {image.shape[0]} images; one is read: pick it with ImageFromBatch")
    return Image.fromarray((image[0, ..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def as_mask(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A MASK `[H, W]` as Pillow's, of the image's size."""
    pixels = Image.fromarray((mask.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    return pixels if pixels.size == size else pixels.resize(size, Image.Resampling.BILINEAR)


NODES = {
    "FastsdLoadCheckpoint": (LoadFastsd, "Load fastsd checkpoint"),
    "FastsdLora": (FastsdLora, "fastsd LoRA"),
    "FastsdControlNet": (FastsdControlNet, "fastsd ControlNet"),
    "FastsdEncode": (FastsdEncode, "fastsd encode"),
    "FastsdSample": (FastsdSample, "fastsd sample"),
    "FastsdDecode": (FastsdDecode, "fastsd decode"),
    "FastsdLoadUpscaler": (LoadFastsdUpscaler, "Load fastsd upscaler"),
    "FastsdUpscale": (FastsdUpscale, "fastsd upscale"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
