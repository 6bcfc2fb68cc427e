"""Stage 2: the UNet and the text encoder, trained together to denoise latents."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.train.autoencoder import Latents
from fastsd.train.captions import caption
from fastsd.train.loop import Loss, RandomStreams
from fastsd.train.settings import Diffusion

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class DiffusionModel(nn.Module):
    """The networks that the stage trains: `unet` and `text_encoder`."""

    def __init__(self, unet: UNetConfig, text: CLIPConfig):
        super().__init__()
        self.unet, self.text_encoder = UNet(unet), TextEncoder(text)
        # The network starts by predicting 0, the mean of every target.
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)


def prediction_target(
    scheduler: SchedulerConfig, x: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """The noise, the clean latent, or v = sqrt(ab) noise - sqrt(1 - ab) x (Salimans and Ho 2022, appendix D)."""
    if scheduler.prediction_type == "epsilon":
        return noise
    if scheduler.prediction_type == "sample":
        return x
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x


def denoising_loss(model: DiffusionModel, latents: Latents, tokenizer: Tokenizer, settings: Diffusion) -> Loss:
    """Mean squared error of the prediction, equal weight for all timesteps (Ho et al. 2020, equation 14).

    With v as the target, this weights the error of the denoised latent by SNR + 1 (Salimans and Ho 2022, section 4).
    Timesteps are stratified over the batch, which removes most of the noise from the loss. Every batch gets new
    captions.
    """
    scheduler = settings.scheduler
    alpha_bars = torch.from_numpy(alphas_cumprod(scheduler).copy())
    total = len(alpha_bars)
    labels, styles = latents.labels.numpy(), latents.styles.numpy()

    def random_caption(row: int, generator: np.random.Generator) -> str:
        thickness, slant, size = (int(end) for end in styles[row])
        return caption(
            int(labels[row]),
            (thickness, slant, size),
            generator,
            empty=settings.empty,
            unknown=settings.unknown,
            style_share=settings.style_word_share,
        )

    def loss(random: RandomStreams, batch: int) -> tuple[torch.Tensor, dict[str, float]]:
        normal = partial(torch.randn, generator=random.torch, **FLOATS)
        rows = random.numpy.integers(len(labels), size=batch)
        texts = [random_caption(row, random.numpy) for row in rows]
        index = torch.from_numpy(rows)
        x = latents.sample(index, normal(latents.mean[index].shape))
        noise = normal(x.shape)
        fractions = (torch.arange(batch, **FLOATS) + torch.rand(batch, generator=random.torch, **FLOATS)) / batch
        t = (fractions * total).long().clamp_max(total - 1)
        alpha_bar = alpha_bars[t].float()[:, None, None, None]
        noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        context = model.text_encoder(tokenizer(texts)).hidden
        prediction = model.unet(noisy, t.float(), context).float()
        error = (prediction - prediction_target(scheduler, x, noise, alpha_bar)).square().mean((1, 2, 3))
        # By noise level, since the timesteps rise over the batch; nan where a batch of one or two leaves a part empty.
        low, middle, high = (part.mean().item() for part in error.detach().tensor_split(3))
        return error.mean(), {"loss": error.mean().item(), "low": low, "middle": middle, "high": high}

    return loss
