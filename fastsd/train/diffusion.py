"""Stage 2: the UNet and the text encoder, trained together to denoise latents."""

from __future__ import annotations

import torch
from torch import nn

from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig
from fastsd.model.clip import TextEncoder
from fastsd.model.tokenizer import Tokenizer
from fastsd.model.unet import UNet
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.train.autoencoder import Latents
from fastsd.train.captions import caption
from fastsd.train.loop import Chance, Loss
from fastsd.train.settings import Diffusion


class Denoiser(nn.Module):
    """What the stage trains: `unet` and `text_encoder`."""

    def __init__(self, unet: UNetConfig, text: CLIPConfig):
        super().__init__()
        self.unet, self.text_encoder = UNet(unet), TextEncoder(text)
        # The network begins by predicting 0, the mean of every target.
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)


def target(scheduler: SchedulerConfig, x: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """What the network should say: the noise, the image, or v = sqrt(ab) noise - sqrt(1 - ab) x (Salimans and Ho
    2022, appendix D)."""
    if scheduler.prediction_type == "epsilon":
        return noise
    if scheduler.prediction_type == "sample":
        return x
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x


def denoising_loss(model: Denoiser, latents: Latents, tokenizer: Tokenizer, stage: Diffusion) -> Loss:
    """Mean squared error of the prediction, all timesteps alike (Ho et al. 2020, equation 14).

    With v as the target this weighs the error of the denoised image by SNR + 1 (Salimans and Ho 2022, section 4).
    Timesteps are stratified over the batch, which takes most of the noise out of the loss. Captions are drawn anew
    every time.
    """
    scheduler = stage.scheduler
    levels = torch.from_numpy(alphas_cumprod(scheduler).copy())
    total = len(levels)
    labels, styles = latents.labels.numpy(), latents.styles.numpy()

    def loss(chance: Chance, batch: int) -> tuple[torch.Tensor, dict[str, float]]:
        rows = chance.numpy.integers(len(labels), size=batch)
        texts = [
            caption(
                int(labels[row]),
                tuple(int(end) for end in styles[row]),  # type: ignore[arg-type]
                chance.numpy,
                empty=stage.empty,
                unknown=stage.unknown,
                style_share=stage.style_word_share,
            )
            for row in rows
        ]
        index = torch.from_numpy(rows)
        x = latents.sample(index, torch.randn(latents.mean[index].shape, generator=chance.torch))
        noise = torch.randn(x.shape, generator=chance.torch)
        places = (torch.arange(batch) + torch.rand(batch, generator=chance.torch)) / batch
        t = (places * total).long().clamp_max(total - 1)
        alpha_bar = levels[t].float()[:, None, None, None]
        noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        context = model.text_encoder(tokenizer(texts)).hidden
        prediction = model.unet(noisy, t.float(), context).float()
        error = (prediction - target(scheduler, x, noise, alpha_bar)).square().mean((1, 2, 3))
        # By noise level, since the timesteps rise over the batch; empty (nan) in a batch of one or two.
        low, middle, high = (part.mean().item() for part in error.detach().tensor_split(3))
        return error.mean(), {"loss": error.mean().item(), "low": low, "middle": middle, "high": high}

    return loss
