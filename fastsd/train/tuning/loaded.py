"""What every stage that starts from a checkpoint shares: its networks, captions, cached latents, export."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from fastsd.train.settings import Fit
from fastsd.train.stage import Stage
from fastsd.train.tuning.captions import CaptionEncoder
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
class LoadedSettings:
    """What every such stage has in its table.

    Attributes:
        dtype: of the checkpoint's weights that are not trained.
        recompute: keep less in memory and compute the UNet's blocks twice.
    """

    fit: Fit
    text: TextSettings = TextSettings()
    dtype: str = "fp32"
    recompute: bool = False

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        if self.dtype not in DTYPES:
            raise FastsdError(f"it should be {', '.join(DTYPES)}", argument="dtype", value=self.dtype)
        self.text.check()


class LoadedStage(Stage):
    """A stage that trains something of a checkpoint, or beside it.

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
            self.check_checkpoint()
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

    def check_checkpoint(self) -> None:
        """Raises FastsdError where the stage cannot train the checkpoint for a reason of its own."""

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
        shares = self.job.processes.count if self.sharded else 1
        needed = trained * (ADAM_BYTES - 4) // shares
        if free is not None and needed > free:
            raise FastsdError(
                f"gradients and AdamW's state of {trained // shares:,} trained parameters take {needed / GIB:.1f} GiB,"
                f" {free / GIB:.1f} GiB are free on {self.job.device}; a LoRA takes a hundredth"
                ' (configs/lora-sd15.toml), and fit.optimiser = "adamw8bit" a third less on a GPU'
            )

    @property
    def vae(self) -> AutoencoderKL:
        """The checkpoint's autoencoder, of the one class that `_check` lets through."""
        vae = self.components.vae
        assert isinstance(vae, AutoencoderKL)
        return vae

    def prepare(self) -> None:
        self.latents: Latents = cached_latents(self.vae, self.job)

    @property
    def copies(self) -> int:
        return self.job.settings.data.passes

    def caption(self, row: int, random: np.random.Generator, empty: float) -> str:
        """The caption of a sample, with the trigger before it."""
        text = self.job.images.caption(row, self.latents.notes, random, empty)
        trigger = self.settings.text.trigger
        return f"{trigger}, {text}" if trigger and text else text

    def added(self, text: TextFeatures, sizes: torch.Tensor) -> AddedConditioning | None:
        """What SDXL's UNet reads beside the text; None of other families."""
        return AddedConditioning(text.pooled, sizes) if self.components.xl else None

    @torch.no_grad()
    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents `[B, h, w, C]` as the UNet sees them."""
        return self.codec.scale(latents)

    def own_sizes(self, x: torch.Tensor) -> torch.Tensor:
        """SDXL's sizes of images that are not cropped `[B, 6]`: original, crop's corner, target; heights first."""
        scale = self.components.vae.config.downscale
        height, width = x.shape[1] * scale, x.shape[2] * scale
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device="cpu").repeat(len(x), 1)

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


class Generating:
    """Within it, the networks of a stage are those of inference: no dropout, weights packed for the CPU."""

    def __init__(self, stage: LoadedStage):
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
