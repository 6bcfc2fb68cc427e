"""Noise levels: the training schedule in float64, and the timesteps that a run visits.

A level has three notations: `alpha_bar`, the signal power in the variance-preserving process; `sigma`, the noise per
unit of signal, sqrt((1 - alpha_bar) / alpha_bar); and `lambda = -log sigma`, half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from fastsd.config import SchedulerConfig
from fastsd.errors import FastsdError

Float64 = NDArray[np.float64]


def betas(config: SchedulerConfig) -> Float64:
    """The variance that each training timestep adds, `[T]`.

    "linear": Ho et al. 2020, section 4. "scaled_linear": linear in sqrt(beta), as in the code of latent diffusion
    (Rombach et al. 2022). "squaredcos_cap_v2": Nichol and Dhariwal 2021, equation 17, capped at 0.999.

    Raises:
        FastsdError: another `beta_schedule`.
    """
    steps = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, steps)
    if config.beta_schedule == "scaled_linear":
        return np.square(np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps))
    if config.beta_schedule == "squaredcos_cap_v2":
        alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise FastsdError(
        f"{config.beta_schedule!r} is unknown; use linear, scaled_linear or squaredcos_cap_v2", argument="beta_schedule"
    )


@lru_cache(maxsize=32)
def alphas_cumprod(config: SchedulerConfig) -> Float64:
    """`alpha_bar` of every training timestep, `[T]` float64, read-only.

    With `rescale_betas_zero_snr`, sqrt(alpha_bar) is shifted and scaled: the last becomes exactly 0, the first stays
    (Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1).
    """
    alpha_bar = np.cumprod(1 - betas(config), dtype=np.float64)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alpha_bar)
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alpha_bar.setflags(write=False)
    return alpha_bar


@dataclass(frozen=True)
class Schedule:
    """What a sampler builds its table from: the training schedule and the user's choices.

    Attributes:
        config: the checkpoint's noise schedule.
        num_inference_steps: the user's steps, N.
        start: the first of them that runs, 0 except in image-to-image.
        schedule: one of `fastsd.sampling.samplers.SCHEDULES`.
        eta: DDIM's share of fresh noise.
        given: timesteps and sigmas that another program has in place of these, as `karras_levels` returns them.
    """

    config: SchedulerConfig
    num_inference_steps: int
    start: int = 0
    schedule: str = "default"
    eta: float = 0.0
    given: tuple[list[float], list[float]] | None = None

    @cached_property
    def alphas_cumprod(self) -> Float64:
        """`alpha_bar` `[T]`, for the variance-preserving samplers."""
        return alphas_cumprod(self.config)

    @cached_property
    def sigmas(self) -> Float64:
        """`sigma` `[T]`, for the samplers that work in sigma; an alpha_bar of 0 becomes 2^-24 to keep it finite."""
        alpha_bar = self.alphas_cumprod
        if self.config.rescale_betas_zero_snr:
            alpha_bar = np.append(alpha_bar[:-1], 2.0**-24)
        return np.sqrt((1 - alpha_bar) / alpha_bar)

    def timesteps(self, *, extra_point: bool = False, integers: bool = True) -> Float64:
        """The N timesteps of the config's spacing, from high to low (Lin et al. 2024, table 2).

        Args:
            extra_point: space N + 1 points and drop the last, as DPM-Solver and UniPC do ("leading", "linspace").
            integers: round "linspace" to whole timesteps (half to even). The samplers in sigma interpolate instead.

        Raises:
            FastsdError: another `timestep_spacing`.
        """
        config, steps, total = self.config, self.num_inference_steps, self.config.num_train_timesteps
        points = steps + extra_point
        if config.timestep_spacing == "linspace":
            times = np.linspace(0, total - 1, points)[::-1]
            times = np.round(times) if integers else times
        elif config.timestep_spacing == "leading":
            times = (np.arange(points, dtype=np.float64) * (total // points))[::-1] + (config.steps_offset or 0)
        elif config.timestep_spacing == "trailing":
            # For some N (61, 103, ...) arange yields N + 1 points; the slice below drops the last, t = -1.
            times = np.arange(total, 0, -total / steps).round() - 1
        else:
            raise FastsdError(
                f"{config.timestep_spacing!r} is unknown; use leading, trailing or linspace",
                argument="timestep_spacing",
            )
        return np.clip(times[:steps], 0, total - 1)

    def karras_levels(self) -> tuple[list[float], list[float]]:
        """Timesteps `[N]` and sigmas `[N + 1]`, the last 0, for samplers in the notation of Karras et al. 2022.

        Timesteps are not whole numbers. "karras" and "exponential" span the sigmas that the spacing selects.
        """
        if self.given is not None:
            return self.given
        times = self._sgm_uniform() if self.schedule == "sgm_uniform" else self.timesteps(integers=False)
        sigmas = self._interpolate(times)
        if self.schedule in ("karras", "exponential"):
            sigmas = self._ramp(sigmas[0], sigmas[-1])
            times = self.timestep_of(sigmas)
        return times.tolist(), [*sigmas.tolist(), 0.0]

    def solver_levels(self, *, linspace: bool = False) -> tuple[list[float], list[float]]:
        """Timesteps `[N]` and sigmas `[N + 1]`, the last 0, for DPM-Solver++ and UniPC.

        Timesteps are whole numbers. "karras" and "exponential" span all training sigmas. With `linspace`, that spacing
        replaces the config's, as in diffusers' singlestep solver.
        """
        if self.given is not None:
            return self.given
        if self.schedule in ("karras", "exponential"):
            sigmas = self._ramp(self.sigmas[-1], self.sigmas[0])
            times = self.timestep_of(sigmas)
            if self.schedule == "karras" and self.config.beta_schedule != "squaredcos_cap_v2":
                times = np.round(times)
            else:  # diffusers casts to int; 1e-6 keeps timesteps that rounding left just below a whole number
                times = np.floor(times + 1e-6)
        else:
            uniform = linspace or self.schedule == "sgm_uniform"
            times = np.round(self._sgm_uniform()) if uniform else self.timesteps(extra_point=True)
            sigmas = self._interpolate(times)
        return times.tolist(), [*sigmas.tolist(), 0.0]

    def timestep_of(self, sigmas: Float64) -> Float64:
        """The timesteps of `sigmas`, interpolated in log sigma and clamped to the first and the last."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas)))

    def _interpolate(self, times: Float64) -> Float64:
        return np.interp(times, np.arange(len(self.sigmas)), self.sigmas)

    def _sgm_uniform(self) -> Float64:
        """N + 1 even points from the last timestep to 0, without the 0, as in Stability's generative-models."""
        return np.linspace(self.config.num_train_timesteps - 1, 0, self.num_inference_steps + 1)[:-1]

    def _ramp(self, sigma_max: float, sigma_min: float) -> Float64:
        """N sigmas from `sigma_max` to `sigma_min`: Karras et al. 2022, equation 5, rho = 7; or even in log sigma."""
        steps = self.num_inference_steps
        if self.schedule == "exponential":
            return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
        rho = 7.0
        return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
