"""DPM-Solver++ in its multistep and singlestep forms, and its SDE (Lu et al. 2022b, "DPM-Solver++").

Notation: x = alpha * image + sigma * z with alpha^2 + sigma^2 = 1, and lambda = log(alpha / sigma), which increases by
h over a row's interval. The exact solution is (sigma' / sigma) x plus alpha' times an integral of e^(lambda - lambda')
D over lambda. Order 1 takes D as constant, order 2 as a line through two points.
"""

from __future__ import annotations

import math

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, vp_level_of_sigma, vp_prediction


def dpmpp_2m(schedule: Schedule) -> Table:
    """Second-order multistep, midpoint form (Lu et al. 2022b, algorithm 2)."""
    return _multistep(schedule, sde=False)


def dpmpp_2m_sde(schedule: Schedule) -> Table:
    """The same on the reverse SDE (Lu et al. 2022b, section 5, SDE-DPM-Solver++(2M)). Every row draws noise."""
    return _multistep(schedule, sde=True)


def _multistep(schedule: Schedule, *, sde: bool) -> Table:
    times, sigmas = schedule.solver_levels()
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    for i in range(schedule.start, len(times)):
        x_weight, d_weight, noise = _first_order(sigmas[i], sigmas[i + 1], sde=sde)
        b = [d_weight]
        if i > schedule.start and sigmas[i + 1] > 0:  # a line through D and H1, but for the step to sigma 0
            r = _lambda_gap(sigmas[i - 1], sigmas[i]) / _lambda_gap(sigmas[i], sigmas[i + 1])
            b = [d_weight * (1 + 1 / (2 * r)), -d_weight / (2 * r)]
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level_of_sigma(sigmas[i])),
                a=x_weight,
                b=b,
                n=noise,
                draw=sde,
                step=i,
                keep=vp_level_of_sigma(sigmas[i + 1]),
            )
        )
    return builder.table()


def dpmpp_2s(schedule: Schedule) -> Table:
    """Second-order singlestep (Lu et al. 2022b, algorithm 1), in pairs of steps.

    The first row of a pair is first order and saves its latent. The second starts from the saved latent again, with D
    at an inner point of the interval: the level between the two steps. The last step is first order; with even N, so is
    the one before it. Timesteps are evenly spaced whatever the config says, as in diffusers' singlestep scheduler.
    """
    times, sigmas = schedule.solver_levels(linspace=True)
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    for i in range(schedule.start, len(times)):
        second = i % 2 == 1 and i + 1 < len(times) and i > schedule.start
        begin = i - 1 if second else i
        x_weight, d_weight, _ = _first_order(sigmas[begin], sigmas[i + 1], sde=False)
        b = [d_weight]
        if second:
            r = _lambda_gap(sigmas[begin], sigmas[i]) / _lambda_gap(sigmas[begin], sigmas[i + 1])
            b = [d_weight / (2 * r), d_weight - d_weight / (2 * r)]
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level_of_sigma(sigmas[i])),
                a=0.0 if second else x_weight,
                s=x_weight if second else 0.0,
                b=b,
                save=not second,
                step=i,
                keep=vp_level_of_sigma(sigmas[i + 1]),
            )
        )
    return builder.table()


def _lambda_gap(sigma: float, sigma_next: float) -> float:
    """h = lambda' - lambda for sigmas in noise per unit of signal; infinite for sigma' = 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def _first_order(sigma: float, sigma_next: float, *, sde: bool) -> tuple[float, float, float]:
    """The weights of x, D and noise in the exact solution for constant D.

    ODE: x' = (sigma' / sigma) x + alpha' (1 - e^-h) D. SDE: x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D +
    sigma' sqrt(1 - e^-2h) z.
    """
    h = _lambda_gap(sigma, sigma_next)
    alpha_next, noise_next = vp_level_of_sigma(sigma_next)
    ratio = noise_next / vp_level_of_sigma(sigma)[1]
    if sde:
        return ratio * math.exp(-h), -alpha_next * math.expm1(-2 * h), noise_next * math.sqrt(-math.expm1(-2 * h))
    return ratio, -alpha_next * math.expm1(-h), 0.0
