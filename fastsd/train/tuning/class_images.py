"""DreamBooth's class images: what the checkpoint itself makes of a class, so that training does not forget it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.files import open_whole
from fastsd.image.files import open_image
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.train.parts import RandomStreams
from fastsd.train.stage import TrainingJob


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation (Ruiz et al. 2023, section 3.3).

    Attributes:
        prompt: of the class, "a dog"; empty: none.
        images: how many there should be.
        folder: of the images, which are generated where they are missing; empty: `class` in the run's folder.
        steps: of the sampler; 0: the checkpoint's own.
    """

    prompt: str = ""
    images: int = 100
    folder: str = ""
    steps: int = 0

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        if self.images < 1:
            raise FastsdError("it should be at least 1", argument="prior.images", value=self.images)


class ClassImages:
    """The class images of a run, and their latents."""

    def __init__(self, settings: PriorSettings, pipe: Pipeline, job: TrainingJob):
        self.settings, self.pipe, self.job = settings, pipe, job
        self.folder = Path(settings.folder) if settings.folder else job.out / "class"

    def prepare(self, vae: AutoencoderKL) -> None:
        """Generate the images that are missing, with the checkpoint as it is before training; encode all."""
        height, width = self.job.images.side
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".webp"))
        missing = self.settings.images - len(files)
        if missing > 0:
            self.job.report(f"generating {missing} class images of {self.settings.prompt!r}")
        arguments = {"num_inference_steps": self.settings.steps} if self.settings.steps else {}
        for number in range(len(files), self.settings.images):
            self.job.check_stop()
            made = self.pipe(self.settings.prompt, width=width, height=height, seed=number, **arguments).images[0]
            file = self.folder / f"{number:05d}.png"
            with open_whole(file, overwrite=True) as opened:
                made.save(opened, "png")
            files.append(file)
        self.means, self.stds = self._encode(vae, files[: self.settings.images])

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL, files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = self.job.images.side
        means, stds = [], []
        weight = vae.encoder.conv_in.weight
        for file in files:
            self.job.check_stop()
            image = open_image(file).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div(127.5).sub(1.0)[None]
            found = vae.encode(pixels.to(weight.device, weight.dtype))
            means.append(found.mean.float().cpu())
            stds.append(torch.exp(0.5 * found.logvar.float()).cpu())
        return torch.cat(means), torch.cat(stds)

    def sample(self, count: int, random: RandomStreams) -> torch.Tensor:
        """`count` latents of class images, unscaled, drawn with replacement."""
        rows = torch.from_numpy(random.numpy.integers(len(self.means), size=count))
        noise = torch.randn(self.means[rows].shape, generator=random.torch, dtype=torch.float32, device="cpu")
        return self.means[rows] + self.stds[rows] * noise
