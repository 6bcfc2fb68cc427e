"""The stage `vae`: the KL autoencoder (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastsd.config import VAEConfig
from fastsd.model.vae import AutoencoderKL
from fastsd.train.images import rows_with_replacement
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage


@dataclass(frozen=True)
class VaeSettings:
    """The loss is L1 + MSE + `edge_weight` * L1 of neighbour differences + `kl_weight` * KL per pixel."""

    model: VAEConfig
    fit: Fit
    kl_weight: float = 0.03
    edge_weight: float = 1.0


class VaeStage(Stage):
    """Trains `vae`. Every batch gets new augmentations."""

    name = "vae"
    table = VaeSettings
    stream = "autoencoder"
    settings: VaeSettings

    def build(self) -> None:
        self.vae = AutoencoderKL(self.settings.model).to(self.job.device)
        self.trained = {"vae": self.vae}
        self.job.modules["vae"] = self.vae

    def prepare(self) -> None:
        (self.job.out / "latents.pt").unlink(missing_ok=True)  # of the weights before this training

    def batch(self, part: Part) -> Batch:
        rows = np.sort(rows_with_replacement(len(self.job.images), part))
        return {"image": self.job.images.pixels(rows, part.random.numpy)[0].to(self.job.device)}

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        image = batch["image"]
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
        total = l1 + mse + self.settings.edge_weight * edges + self.settings.kl_weight * kl / pixels
        return total, {"l1": l1.item(), "mse": mse.item(), "edges": edges.item(), "kl": kl.item()}
