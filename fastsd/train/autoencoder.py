"""Stage 1: the KL autoencoder, and the cache of its latents (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastsd.model.vae import AutoencoderKL
from fastsd.train import checkpoint
from fastsd.train.digits import IMAGE_SIDE, Digits, augment, to_rgb
from fastsd.train.loop import Loss, RandomStreams, Workers, uses_bf16
from fastsd.train.settings import Autoencoder, Data
from fastsd.train.strokes import Strokes, measure, styles

ENCODE_BATCH = 128


def reconstruction_loss(vae: AutoencoderKL, digits: Digits, data: Data, settings: Autoencoder) -> Loss:
    """The loss of the autoencoder stage. Every batch gets new augmentations."""
    pixels = 3.0 * IMAGE_SIDE**2

    def loss(random: RandomStreams, batch: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen = np.sort(random.numpy.integers(len(digits.images), size=batch))
        image = to_rgb(augment(digits.images[chosen], random.numpy, data.scales, data.shear))
        posterior = vae.encode(image)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=random.torch, dtype=torch.float32, device="cpu")
        decoded = vae.decode(mean + torch.exp(0.5 * logvar) * noise).float()
        error = decoded - image
        vertical, horizontal = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
        edges = vertical.abs().mean() + horizontal.abs().mean()
        l1, mse = error.abs().mean(), error.square().mean()
        # KL(N(mean, var) || N(0, 1)), summed over the latent, averaged over the batch.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / batch
        total = l1 + mse + settings.edge_weight * edges + settings.kl_weight * kl / pixels
        return total, {"l1": l1.item(), "mse": mse.item(), "edges": edges.item(), "kl": kl.item()}

    return loss


@dataclass(frozen=True)
class Latents:
    """The training set of the diffusion model: latent distributions of the images.

    Attributes:
        mean, std: of the latent distribution of each image, `[N, h, w, C]` fp16, before `centre`.
        labels: `[N]` uint8. styles: `[N, 3]` int8, see `strokes.styles`.
        offset, spread: `[C]`, mean and standard deviation of each channel over the whole set.
    """

    mean: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor
    styles: torch.Tensor
    offset: torch.Tensor
    spread: torch.Tensor

    def sample(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sample the latents of `rows`; every channel has mean 0 and variance 1 over the set. fp32."""
        sampled = self.mean[rows].float() + self.std[rows].float() * noise
        return (sampled - self.offset) / self.spread


def encode_all(vae: AutoencoderKL, digits: Digits, data: Data, seed: int, precision: str, workers: Workers) -> Latents:
    """Encode `data.passes` augmented versions of every image, and measure their styles."""
    dtype = torch.bfloat16 if uses_bf16(precision) else torch.float32
    vae = copy.deepcopy(vae).to(dtype)
    total = len(digits.images)

    @torch.inference_mode()
    def encode(job: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Strokes]:
        augmentation, first = job
        generator = np.random.default_rng([seed, augmentation, first])
        images = augment(digits.images[first : first + ENCODE_BATCH], generator, data.scales, data.shear)
        posterior = vae.encode(to_rgb(images).to(dtype))
        return posterior.mean.half(), torch.exp(0.5 * posterior.logvar.float()).half(), measure(images.numpy())

    jobs = [(augmentation, first) for augmentation in range(data.passes) for first in range(0, total, ENCODE_BATCH)]
    means, stds, measured = zip(*workers.map(encode, jobs))
    mean, std = torch.cat(means), torch.cat(stds)
    strokes = Strokes(*(np.concatenate([getattr(m, n) for m in measured]) for n in ("width", "slant", "size")))
    labels = np.tile(digits.labels, data.passes)
    channels = mean.float()
    variance = channels.var((0, 1, 2)) + std.float().square().mean((0, 1, 2))
    return Latents(
        mean,
        std,
        torch.from_numpy(labels),
        torch.from_numpy(styles(strokes, labels, data.style_share)),
        channels.mean((0, 1, 2)),
        variance.sqrt(),
    )


def save_latents(latents: Latents, path: Path) -> None:
    """Write the cache for the diffusion stage."""
    checkpoint.save(dict(vars(latents)), path)


def load_latents(path: Path) -> Latents:
    """Read the cache that `save_latents` wrote."""
    return Latents(**checkpoint.load(path))


@torch.no_grad()
def centre(vae: AutoencoderKL, offset: torch.Tensor, spread: torch.Tensor) -> None:
    """Fold (z - offset) / spread into the last layer of the encoder, and the inverse into the first of the decoder.

    In place. Reconstructions do not change; every latent channel then has mean 0 and variance 1, so the scaling factor
    is 1.

    Args:
        offset, spread: `[C]`.
    """
    channels = len(offset)
    last, first = vae.quant_conv, vae.post_quant_conv
    assert last.bias is not None and first.bias is not None
    last.weight[:channels].div_(spread[:, None])
    last.bias[:channels] = (last.bias[:channels] - offset) / spread
    last.bias[channels:] -= 2 * spread.log()
    first.bias.add_(first.weight @ offset)
    first.weight.mul_(spread)
