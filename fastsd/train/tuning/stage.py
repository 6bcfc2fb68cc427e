"""What the stages that train a checkpoint by the denoising loss share: batches, loss, sample grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from fastsd.errors import FastsdError
from fastsd.train.parts import Part
from fastsd.train.stage import Batch, Metrics
from fastsd.train.tuning.class_images import ClassImages, PriorSettings
from fastsd.train.tuning.loaded import LoadedSettings, LoadedStage
from fastsd.train.tuning.noise_loss import LossSettings, NoiseLoss


@dataclass(frozen=True)
class SampleSettings:
    """The sample grids: one image a prompt, as `fastsd generate` makes it; 0: the checkpoint's own value."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TuningSettings(LoadedSettings):
    """How errors weigh, class images, sample grids."""

    loss: LossSettings = LossSettings()
    prior: PriorSettings = PriorSettings()
    sample: SampleSettings = SampleSettings()

    def check(self) -> None:
        super().check()
        self.loss.check()
        self.prior.check()


class TuningStage(LoadedStage):
    """A stage that trains by the denoising loss."""

    def check_checkpoint(self) -> None:
        self.noise_loss = NoiseLoss(self.components.scheduler, self.settings.loss)

    def prepare(self) -> None:
        super().prepare()
        self.prior = ClassImages(self.settings.prior, self.pipe, self.job)
        if self.settings.prior.prompt:
            with self.generating():
                self.prior.prepare(self.vae)

    def batch(self, part: Part) -> Batch:
        settings, random = self.settings, part.random
        rows = self.rows(part)
        x = self.scaled(self.latents.raw(torch.from_numpy(rows), random.torch))
        empty = 0.0 if part.validation else settings.text.empty
        texts = [self.caption(int(row), random.numpy, empty) for row in rows]
        sizes, masks = self._notes(rows, x)
        batch: Batch = {"x": x, "texts": texts, "sizes": sizes, "masks": masks, "own": len(x)}
        if settings.prior.prompt and not part.validation:
            latents = self.scaled(self.prior.sample(len(x), random))
            batch["x"] = torch.cat([x, latents])
            batch["texts"] = texts + [settings.prior.prompt] * len(latents)
            batch["sizes"] = torch.cat([sizes, self.own_sizes(latents)])
            batch["masks"] = None if masks is None else torch.cat([masks, torch.ones_like(masks)])
        batch["noise"] = self.noise_loss.noise_like(batch["x"], random.torch)
        batch["t"] = self.noise_loss.timesteps(len(batch["x"]), random.torch)
        return batch

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        """The mean weighted squared error of the samples, plus that of the class images."""
        device = self.job.device
        x, noise, t = (batch[name].to(device) for name in ("x", "noise", "t"))
        text = self.captions(batch["texts"])
        dtype = self.components.unet.conv_in.weight.dtype
        prediction = self.components.unet(
            self.noise_loss.noisy(x, noise, t).to(dtype),
            t.float(),
            text.context.to(dtype),
            self.added(text, batch["sizes"].to(device)),
        )
        masks = None if batch["masks"] is None else batch["masks"].to(device)
        errors = self.noise_loss.errors(prediction, x, noise, t, masks)
        own = errors[: batch["own"]].mean()
        metrics = {"loss": float(own.detach())}
        if len(errors) == batch["own"]:
            return own, metrics
        prior = errors[batch["own"] :].mean()
        return own + self.settings.loss.prior_weight * prior, {**metrics, "prior": float(prior.detach())}

    def _notes(self, rows: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SDXL's sizes, with each image's original size and crop where the data tell; and the masks."""
        sizes, notes = self.own_sizes(x), self.latents.notes
        if "original_size" in notes:
            sizes[:, 0:2] = notes["original_size"][rows].float()
        if "crop" in notes:
            sizes[:, 2:4] = notes["crop"][rows].float()
        if not self.settings.loss.masked:
            return sizes, None
        if "mask" not in notes:
            raise FastsdError("the images have no masks; name their folder in data.masks", argument="loss.masked")
        masks = notes["mask"][rows].float()[:, None] / 255
        return sizes, nn.functional.interpolate(masks, x.shape[1:3], mode="area")[:, 0]

    def grid(self) -> Image.Image | None:
        settings = self.settings.sample
        if not settings.prompts:
            return None
        arguments: dict[str, Any] = {"seed": settings.seed, "negative_prompt": settings.negative_prompt}
        arguments |= {"num_inference_steps": settings.steps} if settings.steps else {}
        images = []
        with self.generating():
            height, width = self.job.images.side
            for prompt in settings.prompts:
                result = self.pipe(prompt, width=width, height=height, **arguments)
                images.append(result.images[0])
        return tiled(images)


def tiled(images: list[Image.Image]) -> Image.Image:
    """Images of one size in a grid that is about square."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image.convert("RGB"), (number % columns * width, number // columns * height))
    return sheet
