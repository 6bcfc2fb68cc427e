"""DPM-Solver++ in its multistep and singlestep forms, and its SDE (Lu et al. 2022b, "DPM-Solver++").

Notation: x = alpha * image + sigma * z with alpha^2 + sigma^2 = 1, lambda = log(alpha / sigma), h the growth of
lambda over the interval that a row updates. The exact solution keeps (sigma' / sigma) x and adds alpha' times an
integral of e^(lambda - lambda') D over lambda, which order 1 takes with constant D and order 2 with D on a line
through two points.
"""

from __future__ import annotations

import math

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Row, Table, TableBuilder, vp_level_of_sigma, vp_prediction


def dpmpp_2m(schedule: Schedule) -> Table:
    """Second-order multistep, midpoint form (Lu et al. 2022b, algorithm 2)."""
    return _multistep(schedule, sde=False)


def dpmpp_2m_sde(schedule: Schedule) -> Table:
    """The same on the reverse SDE (Lu et al. 2022b, section 5, SDE-DPM-Solver++(2M)). Draws noise in every row."""
    return _multistep(schedule, sde=True)


def _multistep(schedule: Schedule, *, sde: bool) -> Table:
    times, sigmas = schedule.solver_levels()
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    for i in range(schedule.start, len(times)):
        x_weight, d_weight, noise = _first_order(sigmas[i], sigmas[i + 1], sde=sde)
        b = [d_weight]
        if i > schedule.start and sigmas[i + 1] > 0:  # a line through D and H1; the step to sigma 0 is first order
            r = _lambda_gap(sigmas[i - 1], sigmas[i]) / _lambda_gap(sigmas[i], sigmas[i + 1])
            b = [d_weight * (1 + 1 / (2 * r)), -d_weight / (2 * r)]
        builder.add(
            Row(
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

    The first row of a pair is first order and saves its latent. The second starts over from there, with D at the
    interval's inner point, which is the pair's middle step. The last step is first order, and so is the one before it
    where N is even. Timesteps are evenly spaced whatever the config says, as in diffusers' singlestep scheduler.
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
            Row(
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
    """h = lambda' - lambda, where sigmas are noise per unit of signal; infinite to sigma 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf


def _first_order(sigma: float, sigma_next: float, *, sde: bool) -> tuple[float, float, float]:
    """Weights of x, D and noise in the exact solution with constant D.

    ODE: x' = (sigma' / sigma) x + alpha' (1 - e^-h) D. SDE: x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) D +
    sigma' sqrt(1 - e^-2h) z.
    """
    h = _lambda_gap(sigma, sigma_next)
    alpha_next, noise_next = vp_level_of_sigma(sigma_next)
    ratio = noise_next / vp_level_of_sigma(sigma)[1]
    if sde:
        return ratio * math.exp(-h), -alpha_next * math.expm1(-2 * h), noise_next * math.sqrt(-math.expm1(-2 * h))
    return ratio, -alpha_next * math.expm1(-h), 0.0
