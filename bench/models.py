"""Full-size models with random weights, created in memory from their configs, and the same weights for the peers.

Weights are uniform with variance 1 / fan-in, so activations neither vanish nor overflow; the weights of norms are about
1. Speed does not depend on the values, unless they are zeros: products of zeros need less power, so a GPU runs them at
higher clocks.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.families import ModelFamily
from fastsd.components import Components
from fastsd.cuda.capture import CudaRecorder
from fastsd.graph import Graphs
from fastsd.kernels.cpu import onednn
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.weights.layouts import configs, unet_config
from fastsd.weights.layouts.names import sources, stored_form
from fastsd.weights.layouts.scheduler import write_scheduler


def random_components(family: ModelFamily, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Components:
    """A checkpoint of `family` with random weights, created in memory."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        unet, vae = UNet(family.unet), AutoencoderKL(family.vae)
        encoders = tuple(TextEncoder(config) for config in family.text)
    for module in (unet, vae, *encoders):
        _fill(module, dtype, device, generator)
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tuple(Tokenizer() for _ in encoders),
        scheduler=family.scheduler,
        sample_size=family.size // family.vae.downscale,
        name=f"{family.title}, random weights",
        zeros_for_empty_prompt=len(encoders) > 1,
    )


@torch.no_grad()
def _fill(module: nn.Module, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Initialise the weights of a module on the meta device, and prepare it for inference."""
    module.to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            bound = (3.0 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        else:
            parameter.uniform_(-0.1, 0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    module.eval().requires_grad_(False)


def pipeline_of(components: Components, device: torch.device, dtype: torch.dtype, captured: bool = True) -> Pipeline:
    """The pipeline as `from_pretrained` creates it: with CUDA graphs on a GPU, unless `captured` is False.

    A graph replays the kernels of its capture, so a run on another backend needs an eager pipeline.
    """
    graphs = Graphs(CudaRecorder(device)) if captured and device.type == "cuda" else None
    return Pipeline(components, device, dtype, graphs)


def vae_dtype(components: Components) -> torch.dtype:
    """The dtype in which the autoencoder computes, which is not always the UNet's (`autoencoder_dtype`)."""
    return next(components.vae.parameters()).dtype


def captured_step(unet: UNet, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """`UNet.denoise` as a CUDA graph, with the same arguments; None on a CPU."""
    if device.type != "cuda":
        return None
    graphs = Graphs(CudaRecorder(device))

    def flat(x: torch.Tensor, time: torch.Tensor, *key_values: torch.Tensor) -> torch.Tensor:
        return unet.denoise(x, time, key_values)

    return lambda x, time, key_values: graphs("step", flat, x, time, *key_values, weights=unet)


def captured_decode(vae: AutoencoderKL, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """`AutoencoderKL.decode` as a CUDA graph; None on a CPU."""
    if device.type != "cuda":
        return None
    graphs = Graphs(CudaRecorder(device))
    return lambda x: graphs("decode", vae.decode, x, weights=vae)


def stored_weights(module: nn.Module, use_linear_projection: bool) -> dict[str, torch.Tensor]:
    """The weights of `module` with the names and shapes of a diffusers folder; views where possible."""
    state = {}
    for _, parameter, parts in sources(module):
        dense = onednn.dense(parameter.detach())
        for part in parts:
            state[part.key] = stored_form(part.key, dense[part.rows], use_linear_projection)
    return state


def peer_unet(components: Components) -> Any:
    """diffusers' UNet with the same weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet = components.unet
    return _peer(UNet2DConditionModel, unet_config.write_unet(unet.config, components.sample_size), unet, components)


def peer_vae(components: Components) -> Any:
    """diffusers' autoencoder with the same weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as PeerAutoencoder

    vae = components.vae
    size = components.sample_size * vae.config.downscale
    return _peer(PeerAutoencoder, configs.write_vae(vae.config, size), vae, components)


def _peer(kind: Any, config: dict[str, Any], module: nn.Module, components: Components) -> Any:
    with torch.device("meta"), _quiet():
        peer = kind.from_config(config)
    weights = stored_weights(module, components.unet.config.use_linear_projection)
    peer.load_state_dict(weights, strict=True, assign=True)
    return peer.eval().requires_grad_(False)


def peer_text_encoder(encoder: TextEncoder) -> Any:
    """transformers' CLIP with the same weights."""
    import transformers

    config = configs.write_clip(encoder.config)
    kind = transformers.CLIPTextModelWithProjection if encoder.text_projection else transformers.CLIPTextModel
    with torch.device("meta"):
        peer = kind(transformers.CLIPTextConfig(**config))
    names = peer.state_dict().keys()
    weights = stored_weights(encoder, False)
    # Since 5.0, the names of transformers' encoder without a projection have no prefix "text_model".
    renamed = {k if k in names else k.removeprefix("text_model."): v for k, v in weights.items()}
    peer.load_state_dict(renamed, strict=True, assign=True)
    length = encoder.config.max_position_embeddings
    device = next(iter(weights.values())).device
    for module in peer.modules():
        if "position_ids" in dict(module.named_buffers(recurse=False)):
            module.register_buffer("position_ids", torch.arange(length, device=device)[None], persistent=False)
    return peer.eval().requires_grad_(False)


def peer_pipeline(components: Components) -> Any:
    """diffusers' text-to-image pipeline with the same weights and scheduler."""
    import diffusers
    import transformers

    scheduler_config = write_scheduler(components.scheduler)
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)
    encoders = [peer_text_encoder(encoder) for encoder in components.text_encoders]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        components.tokenizers[0].save(Path(folder))
        tokenizers = [transformers.CLIPTokenizer.from_pretrained(folder) for _ in encoders]
    parts: dict[str, Any] = {
        "unet": peer_unet(components),
        # In the UNet's dtype, as its users load it; where that overflows it widens the autoencoder itself.
        "vae": peer_vae(components).to(components.unet.conv_in.weight.dtype),
        "scheduler": scheduler,
        "text_encoder": encoders[0],
        "tokenizer": tokenizers[0],
    }
    with _quiet():
        if len(encoders) > 1:
            parts |= {"text_encoder_2": encoders[1], "tokenizer_2": tokenizers[1]}
            pipeline = diffusers.StableDiffusionXLPipeline(
                **parts, force_zeros_for_empty_prompt=components.zeros_for_empty_prompt, add_watermarker=False
            )
        else:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def channels_last(module: Any, on: bool) -> None:
    """Convert the convolution weights of a peer to channels-last or to contiguous memory."""
    layout = torch.channels_last if on else torch.contiguous_format
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


@contextmanager
def _quiet() -> Iterator[None]:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
