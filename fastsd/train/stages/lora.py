"""The stage `lora`: an adapter for a checkpoint, which stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.errors import FastsdError, about, nearest
from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter
from fastsd.train.parts import Part
from fastsd.train.stage import Batch, Metrics
from fastsd.train.tuning.metadata import adapter_metadata
from fastsd.train.tuning.stage import TuningSettings, TuningStage
from fastsd.weights.adapters.write import DTYPES, FORMATS, write_adapter


@dataclass(frozen=True)
class SaveSettings:
    """The files of the finished adapter.

    Attributes:
        name: of the file, and of the LoRA where programs show one.
        formats: names of `fastsd.weights.adapters.write.FORMATS`.
        dtype: of the tensors.
    """

    name: str = "lora"
    formats: tuple[str, ...] = ("kohya",)
    dtype: str = "fp16"

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        for form in self.formats:
            if form not in FORMATS:
                known = f"it should be {', '.join(FORMATS)}{nearest(form, FORMATS)}"
                raise FastsdError(known, argument="save.formats", value=form)
        if self.dtype not in DTYPES:
            raise FastsdError(f"it should be {', '.join(DTYPES)}", argument="save.dtype", value=self.dtype)
        if not self.name or Path(self.name).name != self.name:
            raise FastsdError("it should be a file name without folders", argument="save.name", value=self.name)


@dataclass(frozen=True)
class LoraSettings(TuningSettings):
    """`adapter`: what is trained. `save`: the files."""

    adapter: AdapterSettings = AdapterSettings()
    save: SaveSettings = SaveSettings()

    def check(self) -> None:
        super().check()
        with about("adapter"):
            self.adapter.check()
        self.save.check()


class LoraStage(TuningStage):
    """Trains the adapter's parameters alone."""

    name = "lora"
    table = LoraSettings
    stream = "lora"
    settings: LoraSettings

    @property
    def trains_text(self) -> bool:  # type: ignore[override]
        return any(network != "unet" for network in self.settings.adapter.networks)

    def make(self) -> nn.Module:
        settings = self.settings.adapter
        with about("adapter"):
            self.adapter = TrainableAdapter(self.components, settings, self.job.settings.seed)
        self.adapter.attach()
        self.job.report(
            f"{settings.kind} of {len(self.adapter.layers)} layers, {self.adapter.parameter_count():,} parameters"
        )
        return self.adapter

    def loss(self, trained: str, batch: Batch, part: Part) -> tuple[torch.Tensor, Metrics]:
        self.adapter.masks.set(None if part.validation else part.random.torch.initial_seed())
        return super().loss(trained, batch, part)

    def export(self, folder: Path) -> bool:
        """Write the adapter in every form that `save` names."""
        save: Any = self.settings.save
        metadata = adapter_metadata(self, self.adapter, save.name)
        for form in save.formats:
            path = folder / f"{save.name}.safetensors" if form == "kohya" else folder
            path = folder / "peft" if form == "peft" else path
            write_adapter(path, form, self.adapter.stored(), self.components, metadata, save.dtype, overwrite=True)
        self.write_listing(folder)
        return True
