"""The two halves of diffusers' autoencoder, answered by ours.

The autoencoder itself stays diffusers': slices, tiles, the moments of a latent, and when it is cast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.diffusers.twin import Twin
from fastsd.diffusers.unet import plain_config
from fastsd.model.vae import VAEDecoder, VAEEncoder
from fastsd.weights.layouts.configs import read_vae
from fastsd.weights.layouts.names import canonical_key


class HalfTwin(Twin):
    """Answers the `encoder` or the `decoder` of an `AutoencoderKL`."""

    def __init__(self, vae: Any, half: str, name: str):
        given = plain_config(vae.config) | dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True)
        config = read_vae(Path(f"{name}.config"), given)
        kind = VAEEncoder if half == "encoder" else VAEDecoder
        super().__init__(getattr(vae, half), f"{name}.{half}", lambda: kind(config))

    def canonical(self, path: str) -> str:
        return canonical_key(f"{path}.").rstrip(".")

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        if arguments.get("latent_embeds") is not None:
            return "latent_embeds is given"
        for module in self.host.modules():
            processor = getattr(module, "processor", None)
            if processor is not None and type(processor).__name__ not in PLAIN_VAE_ATTENTION:
                return f"its attention is {type(processor).__name__}"
        return None

    def compute(self, net: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
        return net(arguments["sample"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


PLAIN_VAE_ATTENTION = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")
