"""The stage `unet`: the UNet and the text encoder, trained together to denoise latents."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.components import Components
from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.sampling.schedule import alphas_cumprod
from fastsd.train import vocabulary
from fastsd.train.latents import CACHE, Latents, cached_latents, centre, load_latents
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage
from fastsd.weights import save_folder

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@dataclass(frozen=True)
class UNetSettings:
    """`empty`: share of samples without a caption, which guidance needs (Ho and Salimans 2022)."""

    model: UNetConfig
    text: CLIPConfig
    scheduler: SchedulerConfig
    fit: Fit
    empty: float = 0.12

    def check(self) -> None:
        """Raises FastsdError where the text encoder and the UNet do not fit together."""
        if self.text.hidden_size != self.model.cross_attention_dim:
            raise FastsdError(
                f"unet.text.hidden_size is {self.text.hidden_size}; it should be unet.model.cross_attention_dim,"
                f" {self.model.cross_attention_dim}"
            )


class UNetStage(Stage):
    """Trains `unet` and `text_encoder` on the latents of the run's autoencoder."""

    name = "unet"
    table = UNetSettings
    stream = "diffusion"
    settings: UNetSettings
    latents: Latents

    def build(self) -> None:
        job, text = self.job, self.settings.text
        job.tokenizer = vocabulary.write(*job.images.vocabulary(), job.out / "tokenizer", text.max_position_embeddings)
        text = replace(text, vocab_size=len(job.tokenizer), eos_token_id=job.tokenizer.eos_id)
        self.unet = UNet(self.settings.model).to(job.device)
        self.text_encoder = TextEncoder(text).to(job.device)
        # The network starts by predicting 0, the mean of every target.
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)
        self.trained = {"denoiser": nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})}
        job.modules |= {"unet": self.unet, "text_encoder": self.text_encoder}
        self.scheduler = self.settings.scheduler
        self.alpha_bars = torch.from_numpy(alphas_cumprod(self.scheduler).copy())

    def prepare(self) -> None:
        vae = self.job.modules["vae"]
        assert isinstance(vae, AutoencoderKL)
        self.latents = cached_latents(vae, self.job)

    @property
    def copies(self) -> int:
        return self.job.settings.data.passes

    def batch(self, part: Part) -> Batch:
        latents, random = self.latents, part.random
        normal = partial(torch.randn, generator=random.torch, **FLOATS)
        rows = self.rows(part)
        texts = [self.job.images.caption(int(row), latents.notes, random.numpy, self.settings.empty) for row in rows]
        index = torch.from_numpy(rows)
        x = latents.sample(index, random.torch)
        noise = normal(x.shape)
        # Timesteps are stratified over the part, which removes most of the noise from the loss.
        total = len(self.alpha_bars)
        fractions = (
            torch.arange(part.size, **FLOATS) + torch.rand(part.size, generator=random.torch, **FLOATS)
        ) / part.size
        t = (fractions * total).long().clamp_max(total - 1)
        return {"x": x, "noise": noise, "t": t, "texts": texts}

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """Mean squared error of the prediction, equal weight for all timesteps (Ho et al. 2020, equation 14).

        With v as the target, this weights the error of the denoised latent by SNR + 1 (Salimans and Ho 2022,
        section 4).
        """
        assert self.job.tokenizer is not None
        x, noise, t = batch["x"], batch["noise"], batch["t"]
        alpha_bar = self.alpha_bars[t].float()[:, None, None, None]
        noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        context = self.text_encoder(self.job.tokenizer(batch["texts"])).hidden
        prediction = self.unet(noisy, t.float(), context).float()
        error = (prediction - prediction_target(self.scheduler, x, noise, alpha_bar)).square().mean((1, 2, 3))
        # By noise level, since the timesteps rise over the part; nan where a part of one or two leaves a third empty.
        low, middle, high = (part.mean().item() for part in error.detach().tensor_split(3))
        return error.mean(), {"loss": error.mean().item(), "low": low, "middle": middle, "high": high}

    def export(self, folder: Path) -> bool:
        """Write the model as an fp16 checkpoint folder."""
        job, settings = self.job, self.job.settings
        if not (job.out / CACHE).is_file():
            raise FastsdError("nothing to export yet; the autoencoder is not trained", path=job.out)
        latents = load_latents(job.out / CACHE)
        source = job.modules["vae"]
        assert isinstance(source, AutoencoderKL) and job.tokenizer is not None
        with torch.device("cpu"):
            vae = AutoencoderKL(source.config)
        vae.load_state_dict(source.state_dict())
        centre(vae, latents.offset, latents.spread)
        height, width = job.images.side
        components = Components(
            unet=self.unet,
            vae=vae,
            text_encoders=(self.text_encoder,),
            tokenizers=(job.tokenizer,),
            scheduler=self.scheduler,
            sample_size=height // source.config.downscale,
            defaults={"width": width, "height": height, **asdict(settings.defaults)},
            known_words=frozenset(job.images.known_words),
        )
        save_folder(components, folder, torch.float16)
        _load_in_fp32_by_default(folder / "text_encoder" / "config.json")
        return True


def prediction_target(
    scheduler: SchedulerConfig, x: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """The noise, the clean latent, or v = sqrt(ab) noise - sqrt(1 - ab) x (Salimans and Ho 2022, appendix D)."""
    if scheduler.prediction_type == "epsilon":
        return noise
    if scheduler.prediction_type == "sample":
        return x
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x


def _load_in_fp32_by_default(config: Path) -> None:
    """Set fp32 as the default dtype in the config of a text encoder.

    Without a dtype in the config, transformers 5 loads the text encoder in the dtype of the file (fp16), while
    diffusers loads the UNet in fp32. A pipeline of two dtypes fails in its first matrix product.
    """
    content = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
