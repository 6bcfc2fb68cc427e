"""The denoising loss of a loaded checkpoint: what is predicted, how errors at each noise level and pixel weigh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.train.noising import NoiseLevels, noised, prediction_target


@dataclass(frozen=True)
class LossSettings:
    """How errors weigh.

    Attributes:
        min_snr: the gamma of min-SNR weighting (Hang et al. 2023, section 3.4); 0: all timesteps weigh the same.
        noise_offset: of a noise that is the same over a channel, added to every pixel's (Guttenberg 2023).
        masked: only the pixels under the images' masks count.
        prior_weight: of the loss of the class images (Ruiz et al. 2023, "DreamBooth", equation 2).
    """

    min_snr: float = 0.0
    noise_offset: float = 0.0
    masked: bool = False
    prior_weight: float = 1.0

    def check(self) -> None:
        """Raises FastsdError where a value is none that it could have."""
        for name in ("min_snr", "noise_offset", "prior_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise FastsdError("it should be a number of at least 0", argument=f"loss.{name}", value=value)


class NoiseLoss:
    """The loss for a checkpoint's noise schedule and prediction type.

    Raises:
        FastsdError: an EDM schedule, whose loss is another.
    """

    def __init__(self, scheduler: SchedulerConfig, settings: LossSettings):
        if scheduler.edm is not None:
            raise FastsdError("it has an EDM noise schedule, which these stages do not train", argument="model")
        self.scheduler, self.settings = scheduler, settings
        self.alpha_bars = NoiseLevels(scheduler).alpha_bars

    def noise_like(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Standard normal noise of the shape of `x` `[B, h, w, C]`, with the offset; drawn on the CPU."""
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu")
        if self.settings.noise_offset:
            shift = torch.randn(len(x), 1, 1, x.shape[-1], generator=generator, dtype=torch.float32, device="cpu")
            noise = noise + self.settings.noise_offset * shift
        return noise

    def timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`[count]` int64, each from its own share of the schedule, which removes most of the noise from the loss."""
        total = len(self.alpha_bars)
        within = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
        fractions = (torch.arange(count, dtype=torch.float32, device="cpu") + within) / count
        # Images of a part stand in an order of their own.
        order = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        return (fractions * total).long().clamp_max(total - 1)[order]

    def noisy(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """See `noising.noised`."""
        return noised(x, noise, self._alpha_bar(t, x))

    def errors(
        self,
        prediction: torch.Tensor,
        x: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted squared error of each sample `[B]` fp32.

        Args:
            prediction, x, noise: `[B, h, w, C]`: the network's output, the clean latents, the noise. t: `[B]`.
            mask: `[B, h, w]` in [0, 1], the weight of each pixel; the mean is over what it keeps.
        """
        alpha_bar = self._alpha_bar(t, x)
        target = prediction_target(self.scheduler, x, noise, alpha_bar)
        errors = (prediction.float() - target).square().mean(-1)
        if mask is None:
            each = errors.mean((1, 2))
        else:
            each = (errors * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1e-6)
        return each * self.weights(t).to(each)

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Of each timestep's error `[B]` fp32: the weight min(SNR, gamma) of the clean image's error, in terms of what
        is predicted: over SNR for the noise, over SNR + 1 for v."""
        gamma = self.settings.min_snr
        if not gamma:
            return torch.ones(len(t), dtype=torch.float32, device="cpu")
        alpha_bar = self.alpha_bars[t.cpu()]
        snr = alpha_bar / (1 - alpha_bar)
        clipped = snr.clamp_max(gamma)
        kind = self.scheduler.prediction_type
        weights = clipped if kind == "sample" else clipped / (snr + 1) if kind == "v_prediction" else clipped / snr
        return weights.float()

    def _alpha_bar(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.alpha_bars[t.cpu()].float().to(x.device)[:, None, None, None]
