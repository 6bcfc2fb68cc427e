"""The latents of the training images: encoded once, then sampled from (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsd.model.vae import AutoencoderKL
from fastsd.train import checkpoint
from fastsd.train.images import Notes, Rows
from fastsd.train.stage import TrainingJob

ENCODE_PIXELS = 128 * 64 * 64  # of a batch of images, at least one image
CACHE = "latents.pt"  # in the run's folder


@dataclass(frozen=True)
class Latents:
    """The training set of the diffusion model: latent distributions of the images.

    Attributes:
        means, stds: of the latent distribution of each image, `[n, h, w, C]` fp16 for each group of one size.
        place: `[N, 2]`, the group of a row, and its index there.
        notes: what is known of each image beside its pixels.
        offset, spread: `[C]`, mean and standard deviation of each channel over the whole set.
        key: what they were made of, see `cache_key`.
    """

    means: list[torch.Tensor]
    stds: list[torch.Tensor]
    place: torch.Tensor
    notes: Notes
    offset: torch.Tensor
    spread: torch.Tensor
    key: str

    def __len__(self) -> int:
        return len(self.place)

    def sample(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Sample the latents of `rows`, of one group; every channel has mean 0 and variance 1 over the set. fp32."""
        return (self.raw(rows, generator) - self.offset) / self.spread

    def raw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same as the autoencoder has them."""
        group, index = int(self.place[rows[0], 0]), self.place[rows, 1]
        mean = self.means[group][index]
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32, device="cpu")
        return mean.float() + self.stds[group][index].float() * noise


def digest_of(network: nn.Module) -> Any:
    """A SHA-256 of a network's weights and their names, which may be updated with more."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest


def cache_key(vae: AutoencoderKL, job: TrainingJob) -> str:
    """What the latents depend on: the autoencoder's weights, the images, how they are augmented, the precision."""
    digest = digest_of(vae)
    record = [job.images.record(), job.images.fingerprint(), job.settings.data.passes, job.settings.seed, job.bf16]
    digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def encode_all(vae: AutoencoderKL, job: TrainingJob) -> Latents:
    """Encode `data.passes` augmented versions of every image, and take notes of them."""
    key = cache_key(vae, job)
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    vae = copy.deepcopy(vae).to(dtype)
    images, passes = job.images, job.settings.data.passes

    @torch.inference_mode()
    def encode(work: tuple[int, Rows]) -> tuple[torch.Tensor, torch.Tensor, Notes]:
        job.check_stop()
        augmentation, rows = work
        generator = np.random.default_rng([job.settings.seed, augmentation, int(rows[0])])
        pixels, notes = images.pixels(rows, generator, notes=True)
        posterior = vae.encode(pixels.to(job.device, dtype))
        return posterior.mean.half().cpu(), torch.exp(0.5 * posterior.logvar.float()).half().cpu(), notes

    means, stds, notes, order = [], [], [], []
    place = torch.zeros(passes * len(images), 2, dtype=torch.int64, device="cpu")
    for number, group in enumerate(images.groups()):
        height, width = images.size_of(int(group[0]))
        size = max(1, ENCODE_PIXELS // (height * width))
        chunks = np.split(group, range(size, len(group), size))
        work = [(augmentation, rows) for augmentation in range(passes) for rows in chunks]
        encoded = job.workers.map(encode, work)
        means.append(torch.cat([mean for mean, _, _ in encoded]))
        stds.append(torch.cat([std for _, std, _ in encoded]))
        notes += [taken for _, _, taken in encoded]
        order += [rows + augmentation * len(images) for augmentation, rows in work]
        rows = torch.from_numpy(np.concatenate([group + copied * len(images) for copied in range(passes)]))
        place[rows, 0], place[rows, 1] = number, torch.arange(len(rows), dtype=torch.int64, device="cpu")
    by_row = torch.from_numpy(np.argsort(np.concatenate(order)))
    together = {name: torch.cat([each[name] for each in notes])[by_row] for name in notes[0]}
    mean, std = (torch.cat([part.flatten(0, 2) for part in parts]) for parts in (means, stds))
    channels = mean.float()
    variance = channels.var(0) + std.float().square().mean(0)
    return Latents(means, stds, place, images.complete(together), channels.mean(0), variance.sqrt(), key)


def cached_latents(vae: AutoencoderKL, job: TrainingJob) -> Latents:
    """The latents of the run's cache, encoded anew where it was made by another autoencoder or of other images."""
    path = job.out / CACHE
    if path.is_file():
        latents = load_latents(path)
        if latents.key == cache_key(vae, job):
            return latents
    started = time.monotonic()
    latents = encode_all(vae, job)
    save_latents(latents, path)
    job.report(f"encoded {len(latents):,} images in {(time.monotonic() - started) / 60:.1f} min")
    return latents


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
