"""The latents of the training images: encoded once, then sampled from (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastsd.model.vae import AutoencoderKL
from fastsd.train import checkpoint
from fastsd.train.images import Notes
from fastsd.train.stage import TrainingJob

ENCODE_BATCH = 128


@dataclass(frozen=True)
class Latents:
    """The training set of the diffusion model: latent distributions of the images.

    Attributes:
        mean, std: of the latent distribution of each image, `[N, h, w, C]` fp16.
        notes: what is known of each image beside its pixels.
        offset, spread: `[C]`, mean and standard deviation of each channel over the whole set.
    """

    mean: torch.Tensor
    std: torch.Tensor
    notes: Notes
    offset: torch.Tensor
    spread: torch.Tensor

    def sample(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sample the latents of `rows`; every channel has mean 0 and variance 1 over the set. fp32."""
        sampled = self.mean[rows].float() + self.std[rows].float() * noise
        return (sampled - self.offset) / self.spread


def encode_all(vae: AutoencoderKL, job: TrainingJob) -> Latents:
    """Encode `data.passes` augmented versions of every image, and take notes of them."""
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    vae = copy.deepcopy(vae).to(dtype)
    images, passes = job.images, job.settings.data.passes

    @torch.inference_mode()
    def encode(work: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Notes]:
        job.check_stop()
        augmentation, first = work
        generator = np.random.default_rng([job.settings.seed, augmentation, first])
        rows = np.arange(first, min(first + ENCODE_BATCH, len(images)))
        pixels, notes = images.pixels(rows, generator, notes=True)
        posterior = vae.encode(pixels.to(job.device, dtype))
        return posterior.mean.half().cpu(), torch.exp(0.5 * posterior.logvar.float()).half().cpu(), notes

    work = [(augmentation, first) for augmentation in range(passes) for first in range(0, len(images), ENCODE_BATCH)]
    means, stds, taken = zip(*job.workers.map(encode, work))
    mean, std = torch.cat(means), torch.cat(stds)
    notes = {name: torch.cat([each[name] for each in taken]) for name in taken[0]}
    channels = mean.float()
    variance = channels.var((0, 1, 2)) + std.float().square().mean((0, 1, 2))
    return Latents(mean, std, images.complete(notes), channels.mean((0, 1, 2)), variance.sqrt())


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
