"""Named noise levels: schedules that give the sigmas of a run without the config's spacing."""

from __future__ import annotations

import numpy as np

from fastsd.sampling.schedule import Float64


def karras_ramp(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Float64:
    """`count` sigmas from `sigma_max` to `sigma_min`, even in sigma^(1 / rho) (Karras et al. 2022, equation 5)."""
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count) ** rho
