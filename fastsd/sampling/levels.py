"""Named noise levels: schedules that give the sigmas of a run without the config's spacing.

Each function of `LEVELS` takes the training sigmas, ascending, the number of steps N, and whether the model is of
SDXL's family, and returns the sigmas from high to low with the one after the last step, which is 0 but for KL Optimal.
As in the programs that they come from, a few numbers of steps give another count of levels than N + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import FastsdError

Float64 = NDArray[np.float64]


def karras_ramp(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Float64:
    """`count` sigmas from `sigma_max` to `sigma_min`, even in sigma^(1 / rho) (Karras et al. 2022, equation 5)."""
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), count) ** rho


def exponential_ramp(sigma_max: float, sigma_min: float, count: int) -> Float64:
    """`count` sigmas from `sigma_max` to `sigma_min`, even in log sigma (k-diffusion, `get_sigmas_exponential`)."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))


def beta_ramp(sigma_max: float, sigma_min: float, count: int) -> Float64:
    """`count` sigmas at even quantiles of the distribution Beta(0.6, 0.6), stretched over the range of sigma.

    Lee et al. 2024, "Beta sampling is all you need", as A1111 (`beta_scheduler`) and diffusers (`use_beta_sigmas`) have
    it.
    """
    return sigma_min + (sigma_max - sigma_min) * beta_quantiles(1 - np.linspace(0, 1, count))


# Schedules that stretch between two sigmas, by their names in `fastsd.sampling.samplers.SCHEDULES`.
RAMPS: dict[str, Callable[[float, float, int], Float64]] = {
    "karras": karras_ramp,
    "exponential": exponential_ramp,
    "beta": beta_ramp,
}


def beta_quantiles(probabilities: Float64, a: float = 0.6) -> Float64:
    """The inverse of the distribution function of Beta(a, a), for values from 0 to 1.

    For x <= 1/2 the function is x^a / (a B(a, a)) times the hypergeometric series F(a, 1 - a; a + 1; x) (DLMF 8.17.7);
    the other half is its mirror image. It is inverted by bisection in x^a, in which it is nearly straight.
    """
    scale = math.gamma(2 * a) / math.gamma(a) ** 2 / a
    small = np.minimum(probabilities, 1 - probabilities)
    low, high = np.zeros_like(small), np.full_like(small, 0.5**a)
    for _ in range(60):
        middle = (low + high) / 2
        x = middle ** (1 / a)
        term, total = np.ones_like(x), np.ones_like(x)
        for k in range(60):  # the terms fall by x <= 1/2
            term = term * ((a + k) * (1 - a + k) * x / ((a + 1 + k) * (1 + k)))
            total = total + term
        below = scale * middle * total < small
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = np.where(small > 0, np.where(small < 0.5, ((low + high) / 2) ** (1 / a), 0.5), 0.0)
    return np.where(probabilities <= 0.5, x, 1 - x)


def at_times(sigmas: Float64, times: Float64) -> Float64:
    """The sigmas at timesteps that need not be whole, log sigma interpolated; `sigmas` are the training's."""
    return np.exp(np.interp(times, np.arange(len(sigmas)), np.log(sigmas)))


def normal(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """Even timesteps from the last to the first, log sigma interpolated (A1111's and ComfyUI's `normal_scheduler`)."""
    return [*at_times(sigmas, np.linspace(len(sigmas) - 1, 0, steps)).tolist(), 0.0]


def simple(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """Every (T / N)th training sigma from the last, rounded down (A1111's and ComfyUI's `simple_scheduler`)."""
    stride = len(sigmas) / steps
    return [*(float(sigmas[-1 - int(i * stride)]) for i in range(steps)), 0.0]


def ddim_uniform(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """Every (T // N)th training sigma from the second, as original DDIM (A1111's and ComfyUI's `ddim_scheduler`).

    Where T / N is not whole, they are often more than N.
    """
    return [*sigmas[1 :: max(len(sigmas) // steps, 1)][::-1].tolist(), 0.0]


def beta_comfy(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The training sigmas at quantiles of Beta(0.6, 0.6) over the timesteps (ComfyUI's `beta_scheduler`).

    Lee et al. 2024. Timesteps that rounding makes equal count once, so from 139 steps on they are fewer than N.
    """
    times = np.rint(beta_quantiles(1 - np.linspace(0, 1, steps, endpoint=False)) * (len(sigmas) - 1))
    return [*(float(sigmas[int(t)]) for t in dict.fromkeys(times.tolist())), 0.0]


def kl_optimal(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """sigma = tan(angle) at N + 1 even angles (Sabour et al. 2024, "Align Your Steps"; A1111's `kl_optimal`).

    The run ends at the smallest training sigma, not at 0.
    """
    angles = np.linspace(math.atan(sigmas[-1]), math.atan(sigmas[0]), steps + 1)
    return np.tan(angles).tolist()


def kl_optimal_comfy(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The same at N angles, then 0 (ComfyUI's `kl_optimal_scheduler`)."""
    return [*np.tan(np.linspace(math.atan(sigmas[-1]), math.atan(sigmas[0]), steps)).tolist(), 0.0]


def linear_quadratic(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """N // 2 steps of 0.05 / N of the largest sigma, then a parabola down to 0 (ComfyUI; Mochi's, Genmo 2024).

    At the joint, both pieces have the same value and slope.
    """
    sigma_max = float(sigmas[-1])
    if steps == 1:
        return [sigma_max, 0.0]
    early = steps // 2
    late, slope = steps - early, 0.025 / early
    curve = (1 - 0.025 - slope * late) / late**2
    done = [slope * i + (curve * (i - early) ** 2 if i > early else 0.0) for i in range(steps)]
    return [*(sigma_max * (1 - value) for value in done), 0.0]


def turbo(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The training sigmas at timesteps k T / N - 1 (Forge's `turbo_scheduler`)."""
    times = np.round(np.arange(steps, 0, -1) * (len(sigmas) / steps) - 1)
    return [*sigmas[np.clip(times, 0, len(sigmas) - 1).astype(int)].tolist(), 0.0]


def sd_turbo(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The training sigmas at the first N of ten even timesteps from the last (ComfyUI's node SDTurboScheduler).

    Raises:
        FastsdError: more than 10 steps.
    """
    if steps > 10:
        raise FastsdError(f"the schedule sd_turbo takes 1 to 10, not {steps}", argument="num_inference_steps")
    times = np.arange(10, 0, -1) * (len(sigmas) // 10) - 1
    return [*sigmas[times[:steps]].tolist(), 0.0]


# Optimised sigmas, for SD 1 and for SDXL: NVIDIA's (Sabour et al. 2024, "Align Your Steps"), its 32 and those of GITS
# (Chen et al. 2024) as Forge has them.
_AYS = (
    (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
)
_GITS = (
    (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029),
    (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029),
)
_AYS_32 = (
    (14.615, 11.23951352, 8.64363081, 6.64729424, 5.57250862, 4.71648546, 3.99196065, 3.5195609)
    + (3.13490466, 2.79228788, 2.48773628, 2.21663865, 1.97508351, 1.7793172, 1.61475335, 1.46540953)
    + (1.314849, 1.16642497, 1.03475547, 0.91573744, 0.80748169, 0.71202361, 0.621739, 0.53065202)
    + (0.4529096, 0.37491455, 0.27461819, 0.2011529, 0.14105873, 0.06682881, 0.03166121, 0.015),
    (14.615, 11.1491618, 8.50522127, 6.48827151, 5.43707402, 4.60398619, 3.89854704, 3.27407457)
    + (2.74396527, 2.29968659, 1.95448514, 1.67108715, 1.42878152, 1.23181009, 1.06789649, 0.92579443)
    + (0.80290886, 0.69660121, 0.60436903, 0.52852552, 0.46773344, 0.41393379, 0.36258186, 0.31008517)
    + (0.26518925, 0.22326461, 0.17653877, 0.13959192, 0.10587381, 0.05519369, 0.02877334, 0.015),
)


def align_your_steps(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """Align Your Steps: the published levels, interpolated in log sigma for another number of them, as A1111 does."""
    return _published(_AYS[xl], steps)


def align_your_steps_32(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The same from 32 levels."""
    return _published(_AYS_32[xl], steps)


def align_your_steps_gits(sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The levels of GITS (Chen et al. 2024, "On the trajectory regularity of ODE-based diffusion sampling")."""
    return _published(_GITS[xl], steps)


LEVELS: dict[str, Callable[[Float64, int, bool], list[float]]] = {
    function.__name__: function
    for function in (
        *(normal, simple, ddim_uniform, beta_comfy, kl_optimal, kl_optimal_comfy, linear_quadratic, turbo, sd_turbo),
        *(align_your_steps, align_your_steps_32, align_your_steps_gits),
    )
}


def _published(levels: tuple[float, ...], steps: int) -> list[float]:
    """`levels` at `steps` even positions, interpolated in log sigma, and 0. A single step starts at the first."""
    if steps == 1:
        return [levels[0], 0.0]
    if steps == len(levels):
        return [*levels, 0.0]
    positions = np.linspace(0, len(levels) - 1, steps)
    return [*at_times(np.array(levels), positions).tolist(), 0.0]
