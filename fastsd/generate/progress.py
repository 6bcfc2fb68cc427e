"""What a stream gives after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from fastsd.generate.batch import Estimate
from fastsd.generate.request import Pass
from fastsd.generate.result import Result
from fastsd.runtime import memory


@dataclass
class Step:
    """One finished step of the loop. `result` is set on the last.

    Attributes:
        index: how many steps are done, over all batches; `total`: how many there will be.
        latents: `[n, h, w, C]` fp32, the batch's state after the step.
    """

    index: int
    total: int
    latents: torch.Tensor
    _pipeline: Any = field(repr=False)
    _stage: Pass = field(repr=False)
    _estimate: Estimate = field(repr=False)
    result: Result | None = None

    def preview(self) -> Image.Image:
        """The batch's first image as the network now predicts it."""
        with memory.fitting(self._stage.workload):
            latent = self._estimate.denoised(self._pipeline.components.scheduler)
            image: Image.Image = self._pipeline.preview(latent, self._stage.vae_tiling)
            return image
