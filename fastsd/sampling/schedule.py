"""Noise levels: the training schedule in float64, and the timesteps that a run visits.

A level has three notations: `alpha_bar`, the signal power in the variance-preserving process; `sigma`, the noise per
unit of signal, sqrt((1 - alpha_bar) / alpha_bar); and `lambda = -log sigma`, half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsd.config import BETA_SCHEDULES, EDMConfig, SchedulerConfig
from fastsd.errors import FastsdError
from fastsd.sampling.levels import RAMPS, exponential_ramp, karras_ramp

Float64 = NDArray[np.float64]


def betas(config: SchedulerConfig) -> Float64:
    """The variance that each training timestep adds, `[T]`.

    "linear": Ho et al. 2020, section 4. "scaled_linear": linear in sqrt(beta), as in the code of latent diffusion
    (Rombach et al. 2022). "squaredcos_cap_v2": Nichol and Dhariwal 2021, equation 17, capped at 0.999. "exp", "laplace"
    and "sigmoid" are diffusers' (`betas_for_alpha_bar`, `DDPMScheduler.__init__`).

    Raises:
        FastsdError: another `beta_schedule`.
    """
    steps, low, high = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return np.array(config.trained_betas)
    if config.beta_schedule == "linear":
        return np.linspace(low, high, steps)
    if config.beta_schedule == "scaled_linear":
        return np.square(np.linspace(low**0.5, high**0.5, steps))
    if config.beta_schedule == "sigmoid":
        return (high - low) / (1 + np.exp(-np.linspace(-6, 6, steps))) + low
    u = np.arange(steps + 1) / steps
    if config.beta_schedule == "squaredcos_cap_v2":
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    elif config.beta_schedule == "exp":
        alpha_bar = np.exp(-12 * u)
    elif config.beta_schedule == "laplace":
        snr = np.exp(-0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
        alpha_bar = np.sqrt(snr / (1 + snr))
    else:
        raise FastsdError(
            f"{config.beta_schedule!r} is unknown; use {', '.join(BETA_SCHEDULES)}", argument="beta_schedule"
        )
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


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


def _edm_ramp(edm: EDMConfig, count: int) -> Float64:
    """`count` sigmas from the highest to the lowest of an EDM model, on its own schedule."""
    if edm.ramp == "exponential":
        return exponential_ramp(edm.sigma_max, edm.sigma_min, count)
    return karras_ramp(edm.sigma_max, edm.sigma_min, count, edm.rho)


@dataclass(frozen=True)
class Schedule:
    """What a sampler builds its table from: the training schedule and the user's choices.

    Attributes:
        config: the checkpoint's noise schedule.
        num_inference_steps: the user's steps, N.
        start: the first of them that runs, 0 except in image-to-image.
        schedule: one of `fastsd.sampling.samplers.SCHEDULES`.
        eta: DDIM's share of fresh noise.
        given: timesteps and sigmas that replace those of the spacing, as `karras_levels` returns them: of a named
            schedule (`fastsd.sampling.levels`), another program's, or the caller's sigmas.
        listed: the caller listed the timesteps or the sigmas: they are `given`, or these.
    """

    config: SchedulerConfig
    num_inference_steps: int
    start: int = 0
    schedule: str = "default"
    eta: float = 0.0
    given: tuple[list[float], list[float]] | None = None
    listed: tuple[float, ...] = ()

    @cached_property
    def alphas_cumprod(self) -> Float64:
        """`alpha_bar` `[T]`, for the variance-preserving samplers."""
        return alphas_cumprod(self.config)

    @cached_property
    def sigmas(self) -> Float64:
        """`sigma` `[T]`, for the samplers that work in sigma; an alpha_bar of 0 becomes 2^-24 to keep it finite."""
        if self.config.edm is not None:
            return _edm_ramp(self.config.edm, self.config.num_train_timesteps)[::-1]
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
        if self.listed:
            return np.array(self.listed, dtype=np.float64)
        points, used = steps + extra_point, self.used_timesteps if extra_point else total
        if config.timestep_spacing == "linspace":
            times = np.linspace(0, used - 1, points)[::-1]
            times = np.round(times) if integers else times
        elif config.timestep_spacing == "leading":
            times = (np.arange(points, dtype=np.float64) * (used // points))[::-1] + (config.steps_offset or 0)
        elif config.timestep_spacing == "trailing":
            # For some N (61, 103, ...) arange yields N + 1 points; the slice below drops the last, t = -1.
            times = np.arange(used, 0, -total / steps).round() - 1
            if len(times) < steps:
                raise FastsdError(
                    f"lambda_min_clipped leaves {len(times)} of {steps} trailing steps; use leading or linspace",
                    argument="spacing",
                )
        else:
            raise FastsdError(
                f"{config.timestep_spacing!r} is unknown; use leading, trailing or linspace",
                argument="timestep_spacing",
            )
        return np.clip(times[:steps], 0, total - 1)

    def option(self, name: str, default: Any) -> Any:
        """What the checkpoint states of `fastsd.config.SolverConfig`, or the sampler's `default`."""
        value = getattr(self.config.solver, name)
        return default if value is None else value

    @cached_property
    def used_timesteps(self) -> int:
        """The training timesteps below which DPM-Solver stays: those with lambda >= `lambda_min_clipped`."""
        lowest = self.option("lambda_min_clipped", -math.inf)
        return int(np.searchsorted(np.log(self.sigmas), -lowest, side="right"))

    @property
    def last_sigma(self) -> float:
        """The noise after the last step: none, or with `final_sigmas_type` "sigma_min" that of timestep 0."""
        return float(self.sigmas[0]) if self.option("final_sigmas_type", "zero") == "sigma_min" else 0.0

    def karras_levels(self, *, options: bool = False) -> tuple[list[float], list[float]]:
        """Timesteps `[N]` and sigmas `[N + 1]`, the last 0, for samplers in the notation of Karras et al. 2022.

        Timesteps are not whole numbers. "karras", "exponential" and "beta" span the sigmas that the spacing selects.
        With `options`, the checkpoint's `interpolation_type`, `timestep_type` and `final_sigmas_type` count, as for
        diffusers' Euler; with "log_linear" the last sigma is the N + 1st, whatever the final type.
        """
        if self.given is not None:
            return self.given
        if self.config.edm is not None:
            return self._edm_levels(self.config.edm)
        times = self._sgm_uniform() if self.schedule == "sgm_uniform" else self.timesteps(integers=False)
        sigmas = self._interpolate(times)
        last = self.last_sigma if options else 0.0
        if self.schedule in RAMPS:
            sigmas = self._ramp(sigmas[0], sigmas[-1])
            times = self.timestep_of(sigmas)
        elif options and self.option("interpolation_type", "linear") == "log_linear":
            steps = self.num_inference_steps
            ramp = exponential_ramp(self.sigmas[-1], self.sigmas[0], steps + 1)
            sigmas, last = ramp[:-1], float(ramp[-1])
        if options and self.config.prediction_type == "v_prediction":
            if self.option("timestep_type", "discrete") == "continuous":
                times = 0.25 * np.log(sigmas)
        return times.tolist(), [*sigmas.tolist(), last]

    def solver_levels(self, *, linspace: bool = False) -> tuple[list[float], list[float]]:
        """Timesteps `[N]` and sigmas `[N + 1]`, the last `last_sigma`, for DPM-Solver and UniPC.

        Timesteps are whole numbers but for named levels. "karras", "exponential" and "beta" span all training sigmas.
        With `linspace`, that spacing replaces the config's, as in diffusers' singlestep solver.
        """
        if self.given is not None:
            return self.given
        if self.config.edm is not None:
            return self._edm_levels(self.config.edm)
        if self.schedule in RAMPS:
            sigmas = self._ramp(self.sigmas[-1], self.sigmas[0])
            times = self.timestep_of(sigmas)
            nearest = self.schedule == "karras" or self.option("use_lu_lambdas", False)
            if nearest and self.config.beta_schedule != "squaredcos_cap_v2":
                times = np.round(times)
            else:  # diffusers casts to int; 1e-6 keeps timesteps that rounding left just below a whole number
                times = np.floor(times + 1e-6)
        else:
            if self.schedule == "sgm_uniform":
                times = np.round(self._sgm_uniform())
            elif linspace and not self.listed:
                times = np.round(np.linspace(self.used_timesteps - 1, 0, self.num_inference_steps + 1)[:-1])
            else:
                times = self.timesteps(extra_point=True)
            sigmas = self._interpolate(times)
        return times.tolist(), [*sigmas.tolist(), self.last_sigma]

    def at(self, sigmas: Sequence[float]) -> tuple[list[float], list[float]]:
        """Timesteps and sigmas, as `karras_levels` returns them, for sigmas with the one after the last step."""
        return self.timestep_of(np.array(sigmas[:-1])).tolist(), list(sigmas)

    def timestep_of(self, sigmas: Float64) -> Float64:
        """The timesteps of `sigmas`, interpolated in log sigma and clamped to the first and the last.

        An EDM model has log(sigma) / 4 instead (Karras et al. 2022, table 1, c_noise).
        """
        if self.config.edm is not None:
            return 0.25 * np.log(sigmas)
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(self.sigmas), np.arange(len(self.sigmas)))

    def _edm_levels(self, edm: EDMConfig) -> tuple[list[float], list[float]]:
        """Timesteps `[N]` and sigmas `[N + 1]` of an EDM model, the last `last_sigma`, for every sampler."""
        if self.schedule == "default":
            sigmas = _edm_ramp(edm, self.num_inference_steps)
        elif self.schedule == "sgm_uniform":
            sigmas = self._interpolate(self._sgm_uniform())
        else:
            sigmas = self._ramp(edm.sigma_max, edm.sigma_min)
        return self.timestep_of(sigmas).tolist(), [*sigmas.tolist(), self.last_sigma]

    def _interpolate(self, times: Float64) -> Float64:
        return np.interp(times, np.arange(len(self.sigmas)), self.sigmas)

    def _sgm_uniform(self) -> Float64:
        """N + 1 even points from the last timestep to 0, without the 0, as in Stability's generative-models."""
        return np.linspace(self.config.num_train_timesteps - 1, 0, self.num_inference_steps + 1)[:-1]

    def _ramp(self, sigma_max: float, sigma_min: float) -> Float64:
        """N sigmas of one of `RAMPS` between two bounds, or between the checkpoint's."""
        steps = self.num_inference_steps
        sigma_max, sigma_min = self.option("sigma_max", sigma_max), self.option("sigma_min", sigma_min)
        return RAMPS[self.schedule](sigma_max, sigma_min, steps)
