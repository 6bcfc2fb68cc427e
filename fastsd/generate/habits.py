"""Names of diffusers that fastsd does not have, each with what stands for it here, as data.

What fastsd has under diffusers' name with diffusers' meaning is a parameter or a method. The rest is in these tables,
each with the line that says what to use. docs/python.md shows each with an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastsd.errors import FastsdError, nearest_or_all

_CONTROL = "give controls=[fastsd.Control(net, image, weight, start, end)], with net from pipe.load_controlnet(path)"
_ENCODE = "the call encodes its prompt; features made elsewhere are prompt_embeds"
_IP = "give image_prompts=[fastsd.ImagePrompt(adapter, images, scale)], with adapter from pipe.load_ip_adapter(path)"
_ENSEMBLE = "give from_pretrained a refiner and the call refiner_switch, the share of the noise levels done before it"

# Arguments of the calls of diffusers' Stable Diffusion pipelines that fastsd does not take.
CALL: dict[str, str] = {
    "image_embeds": _IP,
    "ip_adapter_image": _IP,
    "ip_adapter_image_embeds": _IP,
    "prompt_2": "both text encoders read the prompt",
    "negative_prompt_2": "both text encoders read negative_prompt",
    "original_inference_steps": "num_inference_steps is the number of steps that run; the schedule's length is its own",
    "denoising_end": _ENSEMBLE,
    "denoising_start": _ENSEMBLE,
    "cross_attention_kwargs": "a LoRA has its strength in pipe.set_adapters([fastsd.Adapter(path, unet, text)])",
    "masked_image_latents": "give image and mask_image",
    "controlnet_conditioning_scale": f"it is a control's weight: {_CONTROL}",
    "control_guidance_start": f"it is a control's start: {_CONTROL}",
    "control_guidance_end": f"it is a control's end: {_CONTROL}",
    "control_image": _CONTROL,
    "adapter_conditioning_scale": f"it is a control's weight: {_CONTROL}",
    "adapter_conditioning_factor": f"it is a control's end: {_CONTROL}",
    "guess_mode": "not supported; without guidance (guidance_scale=1) the control alone steers",
    "padding_mask_crop": "give inpaint_only_masked=True, and inpaint_padding, its pixels",
    "callback": "use callback_on_step_end, or pipe.stream, which gives each step with its preview",
    "callback_steps": "use callback_on_step_end, or pipe.stream, which gives each step with its preview",
}

# Arguments of diffusers' `from_pretrained`: what changes nothing here, and what to use for any other value.
LOAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "variant": (("fp16", "bf16", None), "the files that suit dtype are taken"),
    "use_safetensors": ((True, None), "pickles are read with allow_pickle=True"),
    "low_cpu_mem_usage": ((True, False, None), ""),
    "safety_checker": ((None,), "there is none here; check the images after the call"),
    "requires_safety_checker": ((False, None), "there is none here; check the images after the call"),
    "feature_extractor": ((None,), "there is no safety checker here, so nothing reads it"),
    "image_encoder": ((None,), _IP),
    "local_files_only": ((False, None), "set HF_HUB_OFFLINE=1 in the environment"),
    "cache_dir": ((None,), "set HF_HUB_CACHE in the environment"),
    "token": ((None,), "set HF_TOKEN in the environment"),
    "force_download": ((False, None), "remove the model from the hub's cache"),
    "proxies": ((None,), "set HTTPS_PROXY in the environment"),
    "mirror": ((None,), "set HF_ENDPOINT in the environment"),
    "subfolder": ((None,), "give the path of the folder itself"),
    "device_map": ((None,), "give device='cuda' or 'cpu'; a model is on one device"),
    "max_memory": ((None,), "a model is on one device, and is refused where it does not fit"),
    "offload_folder": ((None,), "a model is on one device, and is refused where it does not fit"),
    "custom_pipeline": ((None,), "pipelines of other code do not run here"),
    "custom_revision": ((None,), "revision names the model's"),
    "trust_remote_code": ((False, None), "code of the hub does not run here"),
    "quantization_config": ((None,), "weights are fp32, fp16 or bf16: give dtype"),
    "scheduler": ((None,), "give the call a sampler, by its name or diffusers' class name"),
    "controlnet": ((None,), _CONTROL),
    **dict.fromkeys(
        ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        ((None,), "give the path of a folder that has it"),
    ),
    "add_watermarker": ((False, None), "images get no watermark here"),
}

_KEPT = "a call keeps it from its first step to its last: it is an argument"
_COUNT = "a callback gets its step, and num_inference_steps is the call's; pipe.stream gives step.index and step.total"
_FIXED = "nothing to set: attention never holds all its scores"
_LORA = "use pipe.set_adapters([fastsd.Adapter(path, unet, text)]), which replaces those before; [] removes all"
_MEMORY = "a model is on one device; dtype='fp16', vae_tiling=True and batch_size=1 take less memory"
_PART = "the networks are in pipe.components"
_SAVE = "python -m fastsd convert writes checkpoints (docs/checkpoints.md)"

# Methods and attributes of diffusers' pipelines that a fastsd.Pipeline does not have.
ATTRIBUTES: dict[str, str] = {
    "enable_xformers_memory_efficient_attention": _FIXED,
    "disable_xformers_memory_efficient_attention": _FIXED,
    "set_use_memory_efficient_attention_xformers": _FIXED,
    "enable_attention_slicing": _FIXED,
    "disable_attention_slicing": _FIXED,
    "set_attention_slice": _FIXED,
    "fuse_qkv_projections": "nothing to set: q, k and v are one product",
    "unfuse_qkv_projections": "nothing to set: q, k and v are one product",
    "enable_model_cpu_offload": _MEMORY,
    "enable_sequential_cpu_offload": _MEMORY,
    "enable_group_offload": _MEMORY,
    "maybe_free_model_hooks": _MEMORY,
    "remove_all_hooks": _MEMORY,
    "reset_device_map": _MEMORY,
    "hf_device_map": _MEMORY,
    "enable_freeu": "give the call freeu=(b1, b2, s1, s2)",
    "disable_freeu": "give the call no freeu",
    "set_pag_applied_layers": "give the call pag_layers, names with commas between them",
    "enable_vae_tiling": "give the call vae_tiling=True; large images are tiled anyway",
    "disable_vae_tiling": "give the call vae_tiling=False",
    "enable_vae_slicing": "nothing to set: images are decoded one at a time",
    "disable_vae_slicing": "nothing to set: images are decoded one at a time",
    "upcast_vae": "nothing to set: an autoencoder that overflows in fp16 runs in bf16, or fp32 where that is missing",
    "load_lora_weights": _LORA,
    "unload_lora_weights": _LORA,
    "fuse_lora": f"nothing to set: adapters are in the weights; {_LORA}",
    "unfuse_lora": _LORA,
    "enable_lora": _LORA,
    "disable_lora": _LORA,
    "delete_adapters": _LORA,
    "set_lora_device": _LORA,
    "enable_lora_hotswap": _LORA,
    "lora_state_dict": _LORA,
    "load_lora_into_unet": _LORA,
    "load_lora_into_text_encoder": _LORA,
    "get_active_adapters": "they are pipe.adapters.active",
    "get_list_adapters": "they are pipe.adapters.active",
    "fused_loras": "they are pipe.adapters.active",
    "num_fused_loras": "they are pipe.adapters.active",
    "lora_scale": _LORA,
    "write_lora_layers": _SAVE,
    "save_lora_weights": _SAVE,
    "load_textual_inversion": "use pipe.load_embedding(path, token)",
    "unload_textual_inversion": "remove its name from pipe.components.embeddings",
    "maybe_convert_prompt": "a prompt uses embeddings by their names",
    "unload_ip_adapter": _IP,
    "set_ip_adapter_scale": _IP,
    "set_progress_bar_config": "a call shows no progress; pipe.stream gives each step",
    "progress_bar": "a call shows no progress; pipe.stream gives each step",
    "from_single_file": "from_pretrained reads single files",
    "from_pipe": "one pipeline does text to image, image to image, inpainting and controls, by the call's arguments",
    "from_config": "use from_pretrained",
    "download": "from_pretrained downloads a hub id",
    "save_pretrained": _SAVE,
    "save_config": _SAVE,
    "push_to_hub": _SAVE,
    "scheduler": "give the call a sampler and a schedule; the checkpoint's own is pipe.components.scheduler",
    "safety_checker": "there is none here; check the images after the call",
    "feature_extractor": "there is no safety checker here, so nothing reads it",
    "watermark": "images get no watermark here",
    "unet": _PART,
    "vae": _PART,
    "text_encoder": _PART,
    "text_encoder_2": _PART,
    "tokenizer": _PART,
    "tokenizer_2": _PART,
    "controlnet": _CONTROL,
    "config": "the networks have theirs: pipe.components.unet.config",
    "encode_prompt": _ENCODE,
    "register_modules": _PART,
    "guidance_scale": _KEPT,
    "_guidance_scale": _KEPT,
    "guidance_rescale": _KEPT,
    "_guidance_rescale": _KEPT,
    "image_guidance_scale": _KEPT,
    "_image_guidance_scale": _KEPT,
    "clip_skip": _KEPT,
    "_clip_skip": _KEPT,
    "do_classifier_free_guidance": "it is guidance_scale > 1",
    "cross_attention_kwargs": _LORA,
    "_cross_attention_kwargs": _LORA,
    "denoising_end": _ENSEMBLE,
    "denoising_start": _ENSEMBLE,
    "num_timesteps": _COUNT,
    "_num_timesteps": _COUNT,
    "interrupt": "a callback sets pipe._interrupt = True; a caller of pipe.stream leaves its loop",
    "_execution_device": "it is pipe.device",
    "vae_scale_factor": "it is pipe.components.vae.config.downscale",
    "image_processor": "images are PIL images; output_type gives arrays and tensors",
    "mask_processor": "images are PIL images; output_type gives arrays and tensors",
    "numpy_to_pil": "output_type='pil' gives PIL images",
    "decode_latents": "use pipe.decode(latents), scaled latents [n, h, w, C]",
    "cuda": "use pipe.to('cuda')",
    "cpu": "use pipe.to('cpu')",
    "half": "use pipe.to(torch.float16)",
    "float": "use pipe.to(torch.float32)",
    "eval": "nothing to set: a pipeline does not train",
}


class AbsentAttribute:
    """An attribute that says, when it is read or set, what to use; `hasattr` is False."""

    def __init__(self, name: str, line: str):
        self.name, self.line = name, line

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError(f"fastsd.Pipeline has no {self.name}: {self.line}")

    def __set__(self, instance: object, value: object) -> None:
        if not (value is None and self.name in ("safety_checker", "feature_extractor", "watermark")):
            raise AttributeError(f"fastsd.Pipeline has no {self.name} to set: {self.line}")


class DiffusersNames:
    """The base of `Pipeline` with what it does not have."""


for _name, _line in ATTRIBUTES.items():
    setattr(DiffusersNames, _name, AbsentAttribute(_name, _line))


def without_habits(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that diffusers' calls take and fastsd's does not, which may only be None.

    Raises:
        FastsdError: it says what to use.
    """
    for name, value in arguments.items():
        if value is not None and name in CALL:
            raise FastsdError(CALL[name], argument=name)
    return {name: value for name, value in arguments.items() if name not in CALL}


def loading_habits(arguments: Mapping[str, Any], dtype: str | torch.dtype, known: list[str]) -> dict[str, Any]:
    """The arguments of `Pipeline.from_pretrained` that diffusers' names stand for.

    Args:
        arguments: that `from_pretrained` does not have.
        dtype: its own argument.
        known: those that it has.

    Raises:
        FastsdError: it says what to use, or the nearest name, or all.
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "torch_dtype":
            if value is not None and dtype not in ("auto", value):
                raise FastsdError(f"given with dtype {dtype}; leave one out", argument=name, value=value)
            found |= {} if value is None else {"dtype": value}
        elif name == "use_safetensors" and value is False:
            found["allow_pickle"] = True
        elif name not in LOAD:
            raise FastsdError(f"no such argument{nearest_or_all(name, known, (*LOAD, 'torch_dtype'))}", argument=name)
        elif not any(value is one or value == one for one in LOAD[name][0] if type(value) is type(one)):
            raise FastsdError(LOAD[name][1], argument=name)
    return found
