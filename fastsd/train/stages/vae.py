"""The stage `vae`: the KL autoencoder (Rombach et al. 2022, section 3.1), with a discriminator if asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsd.config import VAEConfig
from fastsd.errors import FastsdError
from fastsd.model.vae import AutoencoderKL
from fastsd.train.discriminator import PatchDiscriminator, adaptive_weight, feature_distance, hinge
from fastsd.train.grids import rows_of_images
from fastsd.train.lpips import load_lpips
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage

SHOWN = 8  # images of a sample grid


@dataclass(frozen=True)
class GanSettings:
    """The discriminator (Esser et al. 2021). It takes part from step `start` on: before, everything looks fake."""

    weight: float = 0.0  # times the adaptive weight; 0: no discriminator
    start: int = 0
    features: float = 0.0  # weight of the perceptual loss, the distance of the discriminator's features
    channels: int = 64
    layers: int = 3


@dataclass(frozen=True)
class VaeSettings:
    """The loss is `l1_weight` * L1 + `mse_weight` * MSE + `edge_weight` * L1 of neighbour differences + `kl_weight` *
    KL per pixel, and what `lpips` and `gan` add."""

    model: VAEConfig
    fit: Fit
    kl_weight: float = 0.03
    l1_weight: float = 1.0
    mse_weight: float = 1.0
    edge_weight: float = 1.0
    gan: GanSettings = GanSettings()
    lpips: str = ""  # a file with the weights of LPIPS (`fastsd.train.lpips`); empty: it is not used
    lpips_weight: float = 1.0

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of it."""
        return self.model.downscale

    def check(self) -> None:
        """Raises FastsdError where the discriminator's keys make no sense."""
        if self.gan.features and not self.gan.weight:
            raise FastsdError("vae.gan.features needs a discriminator: vae.gan.weight above 0, such as 0.5")
        if self.gan.layers < 1 or self.gan.channels < 1:
            raise FastsdError("vae.gan.layers and vae.gan.channels should be at least 1")
        if self.lpips_weight < 0:
            raise FastsdError("it should be at least 0", argument="vae.lpips_weight", value=self.lpips_weight)


class VaeStage(Stage):
    """Trains `vae`, and `discriminator`. Every batch gets new augmentations."""

    name = "vae"
    table = VaeSettings
    stream = "autoencoder"
    settings: VaeSettings

    def build(self) -> None:
        device = self.job.device
        self.vae = AutoencoderKL(self.settings.model).to(device)
        self.trained = {"vae": self.vae}
        self.job.modules["vae"] = self.vae
        gan = self.settings.gan
        self.lpips = load_lpips(Path(self.settings.lpips)).to(device) if self.settings.lpips else None
        if gan.weight:
            self.discriminator = PatchDiscriminator(gan.channels, gan.layers).to(device)
            self.trained["discriminator"] = self.discriminator

    def batch(self, part: Part) -> Batch:
        rows = np.sort(self.rows(part))
        return {"image": self.job.images.pixels(rows, part.random.numpy)[0].to(self.job.device)}

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        if trained == "discriminator":
            return self._judge(batch, part)
        image, settings = batch["image"], self.settings
        posterior = self.vae.encode(image)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=part.random.torch, dtype=torch.float32, device="cpu").to(mean.device)
        decoded = self.vae.decode(mean + torch.exp(0.5 * logvar) * noise).float()
        error = decoded - image
        vertical, horizontal = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
        edges = vertical.abs().mean() + horizontal.abs().mean()
        l1, mse = error.abs().mean(), error.square().mean()
        # KL(N(mean, var) || N(0, 1)), summed over the latent, averaged over the batch.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / part.size
        pixels = image[0].numel()
        match = settings.l1_weight * l1 + settings.mse_weight * mse + settings.edge_weight * edges
        metrics = {"l1": l1.item(), "mse": mse.item(), "edges": edges.item(), "kl": kl.item()}
        if self.lpips is not None:
            distance = self.lpips(image, decoded).mean()
            match, metrics["lpips"] = match + settings.lpips_weight * distance, distance.item()
        total = match + settings.kl_weight * kl / pixels
        if self._plays(part):
            adversarial, figures = self._fool(image, decoded, match)
            total, metrics = total + adversarial, metrics | figures
            batch["decoded"] = decoded.detach()
        return total, metrics

    def _plays(self, part: Part) -> bool:
        """Whether the discriminator takes part: not before its start, and not in the validation."""
        return bool(self.settings.gan.weight) and part.step >= self.settings.gan.start and not part.validation

    def _fool(self, image: torch.Tensor, decoded: torch.Tensor, match: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """What the discriminator adds to the autoencoder's loss."""
        gan = self.settings.gan
        verdict, features = self.discriminator(decoded)
        adversarial = -verdict.mean()
        last = self.vae.decoder.conv_out.weight
        weight = gan.weight * adaptive_weight(match, adversarial, last)
        total, metrics = weight * adversarial, {"fooled": -adversarial.item(), "gan_weight": weight.item()}
        if gan.features:
            with torch.no_grad():
                _, real = self.discriminator(image)
            distance = feature_distance(real, features)
            total, metrics["features"] = total + gan.features * distance, distance.item()
        return total, metrics

    def _judge(self, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """The discriminator's own loss; a constant before its start."""
        if not self._plays(part):
            return torch.zeros((), dtype=torch.float32, device=self.job.device), {}
        real, _ = self.discriminator(batch["image"])
        fake, _ = self.discriminator(batch["decoded"])
        value = hinge(real, fake)
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return value, {"judge": value.item(), "judge_right": right.item()}

    @torch.no_grad()
    def grid(self) -> Image.Image:
        """Images above, what the autoencoder makes of them below."""
        group = max(self.job.images.groups(), key=len)
        rows = group[np.linspace(0, len(group) - 1, min(SHOWN, len(group))).astype(np.int64)]
        image = self.job.images.pixels(rows, np.random.default_rng(0))[0].to(self.job.device)
        with self.job.autocast():
            decoded = self.vae.decode(self.vae.encode(image).mode()).float()
        return rows_of_images([image.cpu(), decoded.cpu()])
