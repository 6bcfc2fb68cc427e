"""How latents are noised in training: the discrete levels of a schedule, or an SDE's in continuous time; and how much
each level counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.schedule import alphas_cumprod

FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
SDES = ("", "vp", "ve")
EARLIEST = 1e-3  # time of an SDE below which nothing is trained: the score grows without limit towards 0


def sde_scheduler(scheduler: SchedulerConfig, sde: str, sigma_min: float, sigma_max: float) -> SchedulerConfig:
    """The discrete schedule with the levels of an SDE at t = 1/N, 2/N ... 1, for the exported model.

    "vp": Ho's linear betas are the SDE's, divided by N (Song et al. 2021, equation 11). "ve": noise grows from
    `sigma_min` to `sigma_max` as a geometric series (equation 9 and appendix C); the same image, scaled by
    1 / sqrt(1 + sigma^2) so that its variance stays, has the levels alpha_bar = 1 / (1 + sigma^2).

    Raises:
        FastsdError: keys of the scheduler that an SDE has no use for.
    """
    if scheduler.prediction_type != "epsilon":
        raise FastsdError(
            'with unet.sde the network is the score, -epsilon / sigma; set unet.scheduler.prediction_type = "epsilon"'
        )
    if scheduler.rescale_betas_zero_snr:
        raise FastsdError("an SDE has no score at zero SNR; unet.scheduler.rescale_betas_zero_snr should be false")
    if sde == "vp":
        return replace(scheduler, beta_schedule="linear")
    count = scheduler.num_train_timesteps
    sigma = sigma_min * (sigma_max / sigma_min) ** (torch.arange(count + 1, dtype=torch.float64, device="cpu") / count)
    alpha_bar = 1 / (1 + sigma.square())
    # The first level is that of t = 1/N, where the schedule's first beta begins from a clean image.
    betas = torch.cat([1 - alpha_bar[1:2], 1 - alpha_bar[2:] / alpha_bar[1:-1]])
    return replace(scheduler, trained_betas=tuple(betas.tolist()))


class NoiseLevels:
    """The levels of noise that a stage trains on.

    Attributes:
        scheduler: what the exported model states.
    """

    def __init__(self, scheduler: SchedulerConfig, sde: str = "", sigma_min: float = 0.01, sigma_max: float = 50.0):
        self.sde, self.sigma_min, self.sigma_max = sde, sigma_min, sigma_max
        self.scheduler = sde_scheduler(scheduler, sde, sigma_min, sigma_max) if sde else scheduler
        self.alpha_bars = torch.from_numpy(alphas_cumprod(self.scheduler).copy())

    def at(self, fractions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The levels at `fractions` in [0, 1) of the way from clean to noise.

        Returns:
            the time that the network is told, in timesteps, and alpha_bar, both `[B]` fp32.
        """
        total = len(self.alpha_bars)
        if not self.sde:
            t = (fractions * total).long().clamp_max(total - 1)
            return t.float(), self.alpha_bars[t].float()
        time = (EARLIEST + (1 - EARLIEST) * fractions.double()).clamp_max(1)
        return (time * total - 1).float(), self.alpha_bar(time).float()

    def alpha_bar(self, time: torch.Tensor) -> torch.Tensor:
        """The signal's share of the variance at `time` in [0, 1] of the SDE; float64."""
        if self.sde == "ve":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** time
            return 1 / (1 + sigma.square())
        count = self.scheduler.num_train_timesteps
        low, high = self.scheduler.beta_start * count, self.scheduler.beta_end * count
        return torch.exp(-(low * time + 0.5 * (high - low) * time.square()))


def noised(x: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """`sqrt(ab) x + sqrt(1 - ab) noise` (Ho et al. 2020, equation 4)."""
    return alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise


def prediction_target(
    scheduler: SchedulerConfig, x: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor
) -> torch.Tensor:
    """The noise, the clean latent, or v = sqrt(ab) noise - sqrt(1 - ab) x (Salimans and Ho 2022, appendix D).

    Score matching is the first: the score of a noised sample is -noise / sqrt(1 - ab), and its squared error, weighted
    by the variance 1 - ab as in Song et al. 2021, equation 7, is the squared error of the noise.
    """
    if scheduler.prediction_type == "epsilon":
        return noise
    if scheduler.prediction_type == "sample":
        return x
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x


def min_snr_weight(scheduler: SchedulerConfig, alpha_bar: torch.Tensor, limit: float) -> torch.Tensor:
    """The weight of each sample that counts the clean latent's error by min(SNR, limit) (Hang et al. 2023, sec. 3.4).

    The squared errors of the noise and of v are SNR and SNR + 1 times that of the clean latent.
    """
    snr = alpha_bar / (1 - alpha_bar).clamp_min(1e-8)
    clipped = snr.clamp_max(limit)
    if scheduler.prediction_type == "sample":
        return clipped
    return clipped / (snr + 1) if scheduler.prediction_type == "v_prediction" else clipped / snr.clamp_min(1e-8)


def stratified(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random numbers, rising, one in each of as many equal parts of [0, 1): fp32."""
    return (torch.arange(count, **FLOATS) + torch.rand(count, generator=generator, **FLOATS)) / count


def offset_noise(noise: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Noise with a random mean for each channel, so that the model learns very dark and bright images (Guttenberg
    2023); `share` 0 draws nothing."""
    if not share:
        return noise
    return noise + share * torch.randn(len(noise), 1, 1, noise.shape[-1], generator=generator, **FLOATS)
