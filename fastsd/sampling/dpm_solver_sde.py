"""Multistep solvers of the reverse SDE by Heun's weights: DPM++ 2M SDE Heun and DPM++ 3M SDE.

Notation as in `dpm_solver`. Over an interval the exact solution for the clean image is e^(-2h) (alpha' / alpha) x plus
alpha' times the integral of 2 e^(2 (lambda - lambda')) D, plus noise sigma' sqrt(1 - e^(-2h)) z (Lu et al. 2022b,
section 5). D is a polynomial in lambda through the last outputs, and its integrals are exact.
"""

from __future__ import annotations

import math

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, vp_level_of_sigma, vp_prediction


def dpmpp_2m_sde_heun(schedule: Schedule) -> Table:
    """Order 2 (k-diffusion, `sample_dpmpp_2m_sde` with solver_type heun)."""
    return _multistep(schedule, 2)


def dpmpp_3m_sde(schedule: Schedule) -> Table:
    """Order 3 (k-diffusion, `sample_dpmpp_3m_sde`, eta = 1).

    diffusers' class has the other sign in the third order's last term, with which it does not vanish for small steps.
    """
    return _multistep(schedule, 3)


def _multistep(schedule: Schedule, highest: int) -> Table:
    times, sigmas = schedule.solver_levels()
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    for i in range(schedule.start, len(times)):
        alpha, noise = vp_level_of_sigma(sigmas[i])
        after = vp_level_of_sigma(sigmas[i + 1])
        last = sigmas[i + 1] == 0
        h = math.inf if last else math.log(sigmas[i] / sigmas[i + 1])
        order = 1 if last else min(highest, i - schedule.start + 1)
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, alpha, noise),
                a=after[1] / noise * math.exp(-h),
                b=[after[0] * w for w in _weights(sigmas, i, order)],
                n=after[1] * math.sqrt(-math.expm1(-2 * h)),
                draw=True,
                step=i,
                keep=after,
            )
        )
    return builder.table()


def _weights(sigmas: list[float], i: int, order: int) -> list[float]:
    """The weights of D, H1, H2, without alpha'. phi_2 and phi_3 weigh the first and the second derivative."""
    if order == 1:
        return [1.0 if sigmas[i + 1] == 0 else 1 - (sigmas[i + 1] / sigmas[i]) ** 2]
    h, h_1 = (math.log(sigmas[k] / sigmas[k + 1]) for k in (i, i - 1))
    constant, phi_2 = -math.expm1(-2 * h), 1 + math.expm1(-2 * h) / (2 * h)
    r = h_1 / h
    if order == 2:
        return [constant + phi_2 / r, -phi_2 / r]
    phi_3 = 0.5 - phi_2 / (2 * h)
    r_1 = math.log(sigmas[i - 2] / sigmas[i - 1]) / h
    # The derivatives at this level: d1 = d_0 + r second, d2 = second, with d_0 = (D - H1) / r, d_1 = (H1 - H2) / r_1.
    d_0, d_1 = (1 / r, -1 / r, 0.0), (0.0, 1 / r_1, -1 / r_1)
    second = [(x - y) / (r + r_1) for x, y in zip(d_0, d_1)]
    first = [x + r * y for x, y in zip(d_0, second)]
    return [c + phi_2 * x + phi_3 * y for c, x, y in zip((constant, 0.0, 0.0), first, second)]
