"""What the stages that start from a checkpoint share: its networks, cached latents and texts, loss, sample grids."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from fastsd.components import Components
from fastsd.errors import FastsdError, about
from fastsd.generate.latents import Codec
from fastsd.graph import Graphs
from fastsd.model.unet import AddedConditioning
from fastsd.model.vae import AutoencoderKL
from fastsd.pipeline import Pipeline
from fastsd.runtime.memory import GIB, available
from fastsd.text.encode import TextFeatures
from fastsd.train.latents import Latents, cached_latents
from fastsd.train.parts import Part
from fastsd.train.settings import Fit
from fastsd.train.stage import Batch, Metrics, Stage
from fastsd.train.tuning.captions import CaptionEncoder
from fastsd.train.tuning.class_images import ClassImages, PriorSettings
from fastsd.train.tuning.noise_loss import LossSettings, NoiseLoss
from fastsd.weights.formats.json_file import read_json

ADAM_BYTES = 16  # of a trained fp32 parameter: itself, its gradient, two moments
DTYPES = ("fp32", "bf16", "fp16")
LISTING = "trained.json"


@dataclass(frozen=True)
class TextSettings:
    """How captions are read.

    Attributes:
        empty: the share of samples without a caption, which guidance needs (Ho and Salimans 2022).
        clip_skip: 1 leaves out no layer, as in a call.
        chunks: 75 tokens each; longer captions are cut.
        trigger: a text put before every caption, which a prompt then calls the concept by.
    """

    empty: float = 0.1
    clip_skip: int = 1
    chunks: int = 1
    trigger: str = ""

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        if not 0 <= self.empty <= 1:
            raise FastsdError("it should be from 0 to 1", argument="text.empty", value=self.empty)
        for name in ("clip_skip", "chunks"):
            if not 1 <= getattr(self, name) <= 12:
                raise FastsdError("it should be from 1 to 12", argument=f"text.{name}", value=getattr(self, name))


@dataclass(frozen=True)
class SampleSettings:
    """The sample grids: one image a prompt, as `fastsd generate` makes it; 0: the checkpoint's own value."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class TuningSettings:
    """What every such stage has in its table.

    Attributes:
        dtype: of the checkpoint's weights that are not trained.
        recompute: keep less in memory and compute the UNet's blocks twice.
    """

    fit: Fit
    text: TextSettings = TextSettings()
    loss: LossSettings = LossSettings()
    prior: PriorSettings = PriorSettings()
    sample: SampleSettings = SampleSettings()
    dtype: str = "fp32"
    recompute: bool = False

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        if self.dtype not in DTYPES:
            raise FastsdError(f"it should be {', '.join(DTYPES)}", argument="dtype", value=self.dtype)
        self.text.check()
        self.loss.check()
        self.prior.check()


class TuningStage(Stage):
    """A stage that trains something of a checkpoint, or beside it, by the denoising loss.

    Attributes:
        pipe: the checkpoint with everything that generates images.
        trains_text: whether the text encoders' outputs change in training.
    """

    settings: Any
    trains_text = False

    def build(self) -> None:
        job, settings = self.job, self.settings
        if not job.settings.model:
            raise FastsdError("it should be a checkpoint: a file, a folder, a hub id, or digits", argument="model")
        self.pipe = Pipeline.from_pretrained(job.settings.model, device=job.device, dtype=settings.dtype, graphs=False)
        components = self.components
        self.codec = Codec(components.vae, Graphs())
        for _, network in components.networks():
            network.requires_grad_(False).train()  # in training mode, no weight is packed for inference
        components.vae.eval()
        with about(path=job.settings.model):
            self._check(components)
            self.noise_loss = NoiseLoss(components.scheduler, settings.loss)
        self.trained = {"model": self.make()}
        components.unet.recompute_blocks(settings.recompute)
        self.captions = CaptionEncoder(
            components, settings.text.clip_skip, settings.text.chunks, remembers=not self.trains_text
        )
        job.modules |= dict(components.networks())
        self._check_memory()

    @abstractmethod
    def make(self) -> nn.Module:
        """What is trained; its parameters that require a gradient."""

    @property
    def components(self) -> Components:
        return self.pipe.components

    def _check(self, components: Components) -> None:
        config = components.unet.config
        if config.reads or config.in_channels != config.out_channels:
            raise FastsdError(
                f"its UNet reads {config.in_channels} channels, the latent and more ({config.reads or 'unknown'}); "
                "these stages train text-to-image checkpoints",
                argument="model",
            )
        if components.aesthetic_score:
            raise FastsdError("it is SDXL's refiner, which these stages do not train", argument="model")
        if not isinstance(components.vae, AutoencoderKL):
            raise FastsdError("its autoencoder cannot encode images", argument="model")

    def _check_memory(self) -> None:
        """Refuse what cannot fit: weights are loaded; gradients and AdamW's state are to come."""
        trained = sum(p.numel() for m in self.trained.values() for p in m.parameters() if p.requires_grad)
        free = available(self.job.device)
        needed = trained * (ADAM_BYTES - 4)
        if free is not None and needed > free:
            raise FastsdError(
                f"gradients and AdamW's state of {trained:,} trained parameters take {needed / GIB:.1f} GiB,"
                f" {free / GIB:.1f} GiB are free on {self.job.device}; a LoRA takes a hundredth"
                ' (configs/lora-sd15.toml), and fit.optimiser = "adamw8bit" a third less on a GPU'
            )

    def prepare(self) -> None:
        vae = self.components.vae
        assert isinstance(vae, AutoencoderKL)
        self.latents: Latents = cached_latents(vae, self.job)
        self.prior = ClassImages(self.settings.prior, self.pipe, self.job)
        if self.settings.prior.prompt:
            with self.generating():
                self.prior.prepare(vae)

    @property
    def copies(self) -> int:
        return self.job.settings.data.passes

    def batch(self, part: Part) -> Batch:
        settings, random = self.settings, part.random
        rows = self.rows(part)
        x = self._scaled(self.latents.raw(torch.from_numpy(rows), random.torch))
        empty = 0.0 if part.validation else settings.text.empty
        texts = [self.caption(int(row), part, empty) for row in rows]
        sizes, masks = self._notes(rows, x)
        batch: Batch = {"x": x, "texts": texts, "sizes": sizes, "masks": masks, "own": len(x)}
        if settings.prior.prompt and not part.validation:
            latents = self._scaled(self.prior.sample(len(x), random))
            batch["x"] = torch.cat([x, latents])
            batch["texts"] = texts + [settings.prior.prompt] * len(latents)
            batch["sizes"] = torch.cat([sizes, self._own_sizes(latents)])
            batch["masks"] = None if masks is None else torch.cat([masks, torch.ones_like(masks)])
        batch["noise"] = self.noise_loss.noise_like(batch["x"], random.torch)
        batch["t"] = self.noise_loss.timesteps(len(batch["x"]), random.torch)
        return batch

    def caption(self, row: int, part: Part, empty: float) -> str:
        """The caption of a sample, with the trigger before it."""
        text = self.job.images.caption(row, self.latents.notes, part.random.numpy, empty)
        trigger = self.settings.text.trigger
        return f"{trigger}, {text}" if trigger and text else text

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
            self._added(text, batch["sizes"].to(device)),
        )
        masks = None if batch["masks"] is None else batch["masks"].to(device)
        errors = self.noise_loss.errors(prediction, x, noise, t, masks)
        own = errors[: batch["own"]].mean()
        metrics = {"loss": float(own.detach())}
        if len(errors) == batch["own"]:
            return own, metrics
        prior = errors[batch["own"] :].mean()
        return own + self.settings.loss.prior_weight * prior, {**metrics, "prior": float(prior.detach())}

    def _added(self, text: TextFeatures, sizes: torch.Tensor) -> AddedConditioning | None:
        return AddedConditioning(text.pooled, sizes) if self.components.xl else None

    @torch.no_grad()
    def _scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return self.codec.scale(latents)

    def _own_sizes(self, x: torch.Tensor) -> torch.Tensor:
        """SDXL's sizes of images that are not cropped `[B, 6]`: original, crop's corner, target; heights first."""
        scale = self.components.vae.config.downscale
        height, width = x.shape[1] * scale, x.shape[2] * scale
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device="cpu").repeat(len(x), 1)

    def _notes(self, rows: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SDXL's sizes, with each image's original size and crop where the data tell; and the masks."""
        sizes, notes = self._own_sizes(x), self.latents.notes
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

    def write_listing(self, folder: Path) -> None:
        """Write beside the files of an export their names, by which `exported` knows the folder."""
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        text = json.dumps({"stage": self.name, "files": names}, indent=2) + "\n"
        (folder / LISTING).write_text(text, encoding="utf-8")

    def exported(self, folder: Path) -> bool:
        if super().exported(folder):
            return True
        if not (folder / LISTING).is_file():
            return False
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return files <= {LISTING, *map(str, read_json(folder / LISTING).get("files", []))}

    def generating(self) -> Generating:
        """A context in which the networks generate images."""
        return Generating(self)

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


class Generating:
    """Within it, the networks of a stage are those of inference: no dropout, weights packed for the CPU."""

    def __init__(self, stage: TuningStage):
        self.stage = stage

    def __enter__(self) -> None:
        for module in self._modules():
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module in self._modules():
            module.train()
        self.stage.components.vae.eval()

    def _modules(self) -> list[nn.Module]:
        networks = [network for _, network in self.stage.components.networks()]
        return [*networks, *self.stage.trained.values()]


def tiled(images: list[Image.Image]) -> Image.Image:
    """Images of one size in a grid that is about square."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image.convert("RGB"), (number % columns * width, number // columns * height))
    return sheet
