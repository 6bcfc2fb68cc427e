"""The stage `finetune`: all weights of a checkpoint's UNet, and of its text encoders where wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsd.train.tuning.stage import TuningSettings, TuningStage
from fastsd.weights import save_folder


@dataclass(frozen=True)
class FinetuneSettings(TuningSettings):
    """`train_text`: also the text encoders."""

    train_text: bool = False


class FinetuneStage(TuningStage):
    """Trains the networks themselves; the weights are kept in fp32 whatever `dtype` says."""

    name = "finetune"
    table = FinetuneSettings
    stream = "finetune"
    shardable = True
    settings: FinetuneSettings

    @property
    def trains_text(self) -> bool:  # type: ignore[override]
        return self.settings.train_text

    def make(self) -> nn.Module:
        networks = {name: network for name, network in self.components.networks() if name != "vae"}
        chosen = {name: network for name, network in networks.items() if name == "unet" or self.trains_text}
        for network in chosen.values():
            network.float().requires_grad_(True)
        return nn.ModuleDict(chosen)

    def export(self, folder: Path) -> bool:
        """Write the model as an fp16 checkpoint folder."""
        save_folder(self.components, folder, torch.float16)
        return True
