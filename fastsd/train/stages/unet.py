"""The stage `unet`: the UNet and the text encoder, trained together to denoise latents."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastsd.components import Components
from fastsd.config import CLIPConfig, SchedulerConfig, UNetConfig
from fastsd.errors import FastsdError
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.train import vocabulary
from fastsd.train.grids import rows_of_images
from fastsd.train.latents import CACHE, Latents, cached_latents, centre, load_latents
from fastsd.train.noising import (
    SDES,
    NoiseLevels,
    min_snr_weight,
    noised,
    offset_noise,
    prediction_target,
    stratified,
)
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage, TrainingJob
from fastsd.train.tables import check_choice
from fastsd.weights import save_folder

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
SHOWN = 12  # images of a sample grid


@dataclass(frozen=True)
class UNetSettings:
    """The objective is that of `scheduler.prediction_type`, or with `sde` score matching in continuous time."""

    model: UNetConfig
    scheduler: SchedulerConfig
    fit: Fit
    text: CLIPConfig | None = None  # of a text encoder that is trained with the UNet
    text_from: str = ""  # or a checkpoint whose text encoder and tokenizer are taken as they are: a file, a folder ...
    empty: float = 0.12  # share of samples without a caption, which guidance needs (Ho and Salimans 2022)
    sde: str = ""  # "vp" or "ve": score matching on that SDE (Song et al. 2021)
    sigma_min: float = 0.01  # of the VE SDE
    sigma_max: float = 50.0
    min_snr: float = 0.0  # gamma of min-SNR weighting (Hang et al. 2023), usually 5; 0: none
    noise_offset: float = 0.0  # usually 0.05 to 0.1; 0: none
    recompute: bool = False  # keep less in memory and compute the UNet's blocks twice (gradient checkpointing)

    def check(self) -> None:
        """Raises FastsdError where values do not go together."""
        check_choice("unet.sde", self.sde, SDES, None)
        if not 0 < self.sigma_min < self.sigma_max:
            raise FastsdError("unet.sigma_min and unet.sigma_max should be above 0, and the first below the second")
        NoiseLevels(self.scheduler, self.sde, self.sigma_min, self.sigma_max)
        if (self.text is None) == (not self.text_from):
            raise FastsdError(
                "one of the two is needed: the table unet.text for a new text encoder, or unet.text_from, a checkpoint"
                " whose text encoder stays as it is"
            )
        if self.text is not None:
            self.check_width("unet.text.hidden_size", self.text)

    def check_width(self, name: str, text: CLIPConfig) -> None:
        """Raises FastsdError where the UNet does not read what the text encoder writes."""
        width = self.model.cross_attention_dim
        if text.hidden_size != width:
            raise FastsdError(f"{name} is {text.hidden_size}; it should be unet.model.cross_attention_dim, {width}")


class UNetStage(Stage):
    """Trains `unet` and `text_encoder` on the latents of the run's autoencoder."""

    name = "unet"
    table = UNetSettings
    stream = "diffusion"
    shardable = True
    settings: UNetSettings
    latents: Latents

    def build(self) -> None:
        job = self.job
        if "vae" not in job.modules:
            raise FastsdError("the stage unet needs an autoencoder; put the stage vae before it")
        self.unet = UNet(self.settings.model).to(job.device)
        self.unet.recompute_blocks(self.settings.recompute)
        self.text_encoder = self._text_encoder(job).to(job.device)
        # The network starts by predicting 0, the mean of every target.
        for parameter in self.unet.conv_out.parameters():
            nn.init.zeros_(parameter)
        networks: dict[str, nn.Module] = {"unet": self.unet}
        if self.settings.text is not None:
            networks["text_encoder"] = self.text_encoder
        self.trained = {"denoiser": nn.ModuleDict(networks)}
        job.modules |= {"unet": self.unet, "text_encoder": self.text_encoder}
        settings = self.settings
        self.levels = NoiseLevels(settings.scheduler, settings.sde, settings.sigma_min, settings.sigma_max)
        self.scheduler = self.levels.scheduler

    def _text_encoder(self, job: TrainingJob) -> TextEncoder:
        """A new text encoder with a vocabulary learnt from the captions; or a checkpoint's, frozen. Sets the job's
        tokenizer."""
        text = self.settings.text
        if text is not None:
            length = text.max_position_embeddings
            job.tokenizer = vocabulary.write(*job.images.vocabulary(), job.out / "tokenizer", length)
            return TextEncoder(replace(text, vocab_size=len(job.tokenizer), eos_token_id=job.tokenizer.eos_id))
        source = self.settings.text_from
        given = Pipeline.from_pretrained(source, device="cpu", dtype="fp32", graphs=False).components
        if given.xl:
            raise FastsdError(
                "it is of SDXL's family, whose two text encoders this stage does not join",
                argument="unet.text_from", value=source,
            )  # fmt: skip
        (encoder,), (job.tokenizer,) = given.text_encoders, given.tokenizers
        self.settings.check_width(f"the width of the text encoder of {source}", encoder.config)
        # In training mode, no weight is packed for inference.
        return encoder.requires_grad_(False).train()

    def _context(self, ids: torch.Tensor) -> torch.Tensor:
        """The text `[B, L, D]` that the UNet reads. A frozen encoder runs in fp32: the fused ops of inference on a CPU
        take weights of one dtype with the input."""
        if self.settings.text is not None:
            return self.text_encoder(ids).hidden
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return self.text_encoder(ids).hidden

    def prepare(self) -> None:
        vae = self.job.modules["vae"]
        assert isinstance(vae, AutoencoderKL)
        self.latents = cached_latents(vae, self.job)

    @property
    def copies(self) -> int:
        return self.job.settings.data.passes

    def batch(self, part: Part) -> Batch:
        latents, random = self.latents, part.random
        rows = self.rows(part)
        texts = [self.job.images.caption(int(row), latents.notes, random.numpy, self.settings.empty) for row in rows]
        index = torch.from_numpy(rows)
        x = latents.sample(index, random.torch)
        noise = torch.randn(x.shape, generator=random.torch, **FLOATS)
        # Times are stratified over the part, which removes most of the noise from the loss.
        time, alpha_bar = self.levels.at(stratified(part.size, random.torch))
        noise = offset_noise(noise, self.settings.noise_offset, random.torch)
        assert self.job.tokenizer is not None
        batch = {"x": x, "noise": noise, "time": time, "alpha_bar": alpha_bar, "ids": self.job.tokenizer(texts)}
        return {name: tensor.to(self.job.device) for name, tensor in batch.items()} | {"texts": texts}

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """Mean squared error of the prediction, of equal weight for all times without min-SNR (Ho et al. 2020, eq. 14).

        With v as the target, this weights the error of the denoised latent by SNR + 1 (Salimans and Ho 2022,
        section 4). The figures are of errors without weights.
        """
        x, noise = batch["x"], batch["noise"]
        alpha_bar = batch["alpha_bar"][:, None, None, None]
        context = self._context(batch["ids"])
        prediction = self.unet(noised(x, noise, alpha_bar), batch["time"], context).float()
        error = (prediction - prediction_target(self.scheduler, x, noise, alpha_bar)).square().mean((1, 2, 3))
        # By noise level, since the timesteps rise over the part; nan where a part of one or two leaves a third empty.
        low, middle, high = (part.mean().item() for part in error.detach().tensor_split(3))
        total = error.mean()
        if self.settings.min_snr:
            total = (error * min_snr_weight(self.scheduler, batch["alpha_bar"], self.settings.min_snr)).mean()
        return total, {"loss": error.mean().item(), "low": low, "middle": middle, "high": high}

    def components(self, latents: Latents) -> Components:
        """The model as the pipeline takes it: copies in fp32 on the CPU."""
        job, source = self.job, self.job.modules["vae"]
        assert isinstance(source, AutoencoderKL) and job.tokenizer is not None
        vae, unet, encoder = copy.deepcopy((source, self.unet, self.text_encoder))
        for network in (vae, unet, encoder):
            network.cpu().eval()
        centre(vae, latents.offset, latents.spread)
        height, width = job.images.side
        return Components(
            unet=unet,
            vae=vae,
            text_encoders=(encoder,),
            tokenizers=(job.tokenizer,),
            scheduler=self.scheduler,
            sample_size=height // source.config.downscale,
            defaults={"width": width, "height": height, **asdict(job.settings.defaults)},
            known_words=frozenset(job.images.known_words),
        )

    def grid(self) -> Image.Image:
        """Images of captions of the data, at the model's default settings."""
        random = np.random.default_rng(0)
        rows = np.linspace(0, len(self.latents) - 1, SHOWN).astype(np.int64)
        texts = [self.job.images.caption(int(row), self.latents.notes, random, 0.0) for row in rows]
        pipe = Pipeline(self.components(self.latents), torch.device("cpu"), torch.float32)
        made = [pipe(text or " ", seed=seed).images[0] for seed, text in enumerate(texts)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in made])).float() / 127.5 - 1
        return rows_of_images(list(pixels.split(SHOWN // 2)))

    def export(self, folder: Path) -> bool:
        """Write the model as an fp16 checkpoint folder."""
        path = self.job.out / CACHE
        if not path.is_file():
            raise FastsdError("nothing to export yet; the autoencoder is not trained", path=self.job.out)
        save_folder(self.components(load_latents(path)), folder, torch.float16)
        _load_in_fp32_by_default(folder / "text_encoder" / "config.json")
        return True


def _load_in_fp32_by_default(config: Path) -> None:
    """Set fp32 as the default dtype in the config of a text encoder.

    Without a dtype in the config, transformers 5 loads the text encoder in the dtype of the file (fp16), while
    diffusers loads the UNet in fp32. A pipeline of two dtypes fails in its first matrix product.
    """
    content = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
