"""Multistep samplers of slopes in the notation of Karras et al. 2022: iPNDM, iPNDM-v, gradient estimation.

The slope is dx/dsigma = (x - D) / sigma; h is the step in sigma, which is negative. The last step goes to the clean
image, which is Euler's step to sigma 0.
"""

from __future__ import annotations

from collections.abc import Callable

from fastsd.sampling.karras_rows import builder_of, slope_row
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table

# Adams-Bashforth on even nodes, newest first, by order.
_EVEN = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(schedule: Schedule) -> Table:
    """iPNDM: Adams-Bashforth of order 4 as if the levels were even.

    Zhang and Chen 2023, "Fast sampling of diffusion models with exponential integrator". The order grows with the
    number of slopes (ComfyUI, `sample_ipndm`).
    """
    return _multistep(schedule, lambda steps: list(_EVEN[len(steps) - 1]))


def ipndm_v(schedule: Schedule) -> Table:
    """iPNDM with weights for uneven steps (ComfyUI, `sample_ipndm_v`, after Zhou et al.'s diff-sampler).

    Order 2 is Adams-Bashforth's. Orders 3 and 4 follow that program, whose second correction differs from
    Adams-Bashforth's on uneven levels; the exact weights are those of `lms`.
    """
    return _multistep(schedule, uneven_weights)


def gradient_estimation(schedule: Schedule) -> Table:
    """Euler with the slope extrapolated, gamma = 2 (Permenter and Yuan 2024).

    slope' = gamma slope_i + (1 - gamma) slope_(i-1), as ComfyUI's `sample_gradient_estimation` has it.
    """
    return _multistep(schedule, lambda steps: [1.0] if len(steps) == 1 else [2.0, -1.0])


def _multistep(schedule: Schedule, weights_of: Callable[[list[float]], list[float]]) -> Table:
    """x' = x + h sum_k w_k slope_(i-k), with `weights_of` the last steps in sigma, newest first, at most 4."""
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i in range(schedule.start, len(times)):
        first = max(schedule.start, i - 3)
        steps = [sigmas[k + 1] - sigmas[k] for k in range(i, first - 1, -1)]
        weights = [1.0] if sigmas[i + 1] == 0 else weights_of(steps)
        b = [steps[0] * w for w in weights]
        builder.add(slope_row(schedule, times[i], sigmas[i], i, sigmas[i + 1], a=1.0, b=b))
    return builder.table()


def uneven_weights(h: list[float]) -> list[float]:
    """The weights of `sample_ipndm_v` for the last steps h_0, h_1, ... in sigma, newest first."""
    if len(h) == 1:
        return [1.0]
    r = h[0] / h[1]
    weights = [1 + r / 2, -r / 2, 0.0, 0.0]
    if len(h) > 2:
        # By the order of operations there, the quotient of steps multiplies only the fraction, not the difference.
        ratio = h[1] / h[2]
        quotient = h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2]))
        c = (1 - h[0] / (3 * (h[0] + h[1])) * quotient) / 2
        weights = [weights[0] + c, weights[1] - (1 + ratio) * c, ratio * c, 0.0]
    if len(h) > 3:
        two, three, four = h[0] + h[1], h[0] + h[1] + h[2], h[1] + h[2] + h[3]
        quotient = h[0] * two * three / (h[1] * (h[1] + h[2]) * four)
        c = ((1 - h[0] / (3 * two)) / 2 + (1 - h[0] / (2 * two)) * h[0] / (6 * three)) * quotient
        ratio, inner = h[1] / h[2], h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
        weights[0] += c
        weights[1] -= (1 + ratio + inner) * c
        weights[2] += (ratio + inner * (1 + h[2] / h[3])) * c
        weights[3] -= inner * ratio * c
    return weights[: len(h)]
