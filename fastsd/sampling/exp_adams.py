"""Exponential Adams methods: DEIS and SA-Solver.

Notation: x = alpha * image + sigma * z with alpha^2 + sigma^2 = 1; rho = sigma / alpha, and lambda = -log rho, which
increases by h over a row's interval. A polynomial through known outputs is integrated exactly against an exponential.
"""

from __future__ import annotations

import math

from numpy.polynomial import Polynomial

from fastsd.sampling.dpm_solver import FEW
from fastsd.sampling.levels import RAMPS
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, noise_prediction, vp_level_of_sigma, vp_prediction


def deis(schedule: Schedule) -> Table:
    """DEIS with polynomials in log rho, of order 2 unless the checkpoint states another (Zhang and Chen 2023, "Fast
    sampling with exponential integrator").

    x' / alpha' = x / alpha + the integral of eps over rho; the history holds eps. As in diffusers the run ends at the
    level of timestep 0, not at 0, and the last of few steps has order 1.
    """
    times, sigmas = _levels(schedule)
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    count = len(times)
    for i in range(schedule.start, count):
        level = vp_level_of_sigma(sigmas[i])
        after = vp_level_of_sigma(sigmas[i + 1])
        order = min(schedule.option("solver_order", 2), i - schedule.start + 1)
        if count < FEW and schedule.option("lower_order_final", True):
            order = min(order, count - i)
        nodes = [math.log(sigmas[i - k]) for k in range(order)]
        weights = _integrals(nodes, math.log(sigmas[i]), math.log(sigmas[i + 1]), 1.0)
        builder.add(
            TableRow(
                t=times[i],
                prediction=noise_prediction(schedule.config.prediction_type, *level),
                a=after[0] / level[0],
                b=[after[0] * sigmas[i + 1] * w for w in weights],
                step=i,
                keep=after,
            )
        )
    return builder.table()


def sa_solver(schedule: Schedule) -> Table:
    """SA-Solver with predictor and corrector of order 2 (Xue et al. 2023, "SA-Solver", algorithm 1).

    The stochastic share tau is 1 at timesteps 200 to 800, else 0; every row draws noise, as in diffusers, and the run
    ends at the level of timestep 0. A row corrects its latent over the interval before it, then predicts over the next.
    Predictor and corrector start from the same latent with the same noise, so the correction is a sum of outputs alone.
    """
    times, sigmas = _levels(schedule)
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    correction = [0.0] * 4
    for i in range(schedule.start, len(times)):
        tau = 1.0 if 200 <= times[i] <= 800 else 0.0
        order = min(2, i - schedule.start + 1)
        if schedule.option("lower_order_final", True):
            order = min(order, len(times) - i)
        predictor = _predictor(sigmas, i, order, tau)
        after = vp_level_of_sigma(sigmas[i + 1])
        h = math.log(sigmas[i] / sigmas[i + 1])
        x_weight = math.exp(-(tau**2) * h) * after[1] / vp_level_of_sigma(sigmas[i])[1]
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level_of_sigma(sigmas[i])),
                a=x_weight,
                b=[x_weight * c + w for c, w in zip(correction, predictor)],
                n=after[1] * math.sqrt(-math.expm1(-2 * tau**2 * h)),
                draw=True,
                step=i,
                keep=after,
            )
        )
        if i + 1 < len(times):  # in the next row the history is one output older
            corrector = _corrector(sigmas, i, tau)
            correction = [corrector[0], *(c - w for c, w in zip(corrector[1:], predictor))]
    return builder.table()


def _predictor(sigmas: list[float], i: int, order: int, tau: float) -> list[float]:
    """The weights of D, H1, H2, H3 in the prediction over interval i. Order 2 has UniPC's term, as in the authors'
    code: the line's integral is replaced by h^2 / 2."""
    nodes = [-math.log(sigmas[i - k]) for k in range(order)]
    weights = _adams(sigmas, i, nodes, tau)
    if order == 2:
        h = math.log(sigmas[i] / sigmas[i + 1])
        shift = _shift(sigmas, i, tau) * (h**2 / 2 - _moment(h, tau)) / (nodes[0] - nodes[1])
        weights = [weights[0] + shift, weights[1] - shift]
    return weights + [0.0] * (4 - len(weights))


def _corrector(sigmas: list[float], i: int, tau: float) -> list[float]:
    """The weights of the outputs at the end and at the start of interval i, and of older ones, in its correction."""
    nodes = [-math.log(sigmas[i + 1]), -math.log(sigmas[i])]
    h = nodes[0] - nodes[1]
    shift = _shift(sigmas, i, tau) * (h / 2 - _moment(h, tau) / h)
    weights = _adams(sigmas, i, nodes, tau)
    return [weights[0] + shift, weights[1] - shift, 0.0, 0.0]


def _adams(sigmas: list[float], i: int, nodes: list[float], tau: float) -> list[float]:
    """(1 + tau^2) alpha' times the integrals of e^((1 + tau^2) (lambda - lambda')) l_k (Xue et al. 2023)."""
    integrals = _integrals(nodes, -math.log(sigmas[i]), -math.log(sigmas[i + 1]), 1 + tau**2)
    return [_shift(sigmas, i, tau) * value for value in integrals]


def _shift(sigmas: list[float], i: int, tau: float) -> float:
    return (1 + tau**2) * vp_level_of_sigma(sigmas[i + 1])[0]


def _moment(h: float, tau: float) -> float:
    """The integral of e^((1 + tau^2) (u - h)) u for u from 0 to h."""
    k = 1 + tau**2
    return (k * h + math.expm1(-k * h)) / k**2


def _levels(schedule: Schedule) -> tuple[list[float], list[float]]:
    """`Schedule.solver_levels` with the last level above 0: that of timestep 0, or of a ramp's own last."""
    times, sigmas = schedule.solver_levels()
    if sigmas[-1] > 0:
        return times, sigmas
    last = sigmas[-2] if schedule.schedule in RAMPS else float(schedule.sigmas[0])
    return times, [*sigmas[:-1], min(last, sigmas[-2])]


def _integrals(nodes: list[float], start: float, end: float, rate: float) -> list[float]:
    """For each node, the integral of e^(rate (u - end)) times its Lagrange polynomial, from `start` to `end`."""
    length = end - start
    result = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        # In u - end, so that the polynomial's coefficients stay small.
        polynomial = Polynomial.fromroots([other - end for other in others]) if others else Polynomial([1.0])
        polynomial = polynomial / math.prod(node - other for other in others)
        value, sign, derivative = 0.0, 1.0, polynomial
        for power in range(1, len(nodes) + 1):  # by parts
            value += sign * (derivative(0.0) - math.exp(-rate * length) * derivative(-length)) / rate**power
            sign, derivative = -sign, derivative.deriv()
        result.append(float(value))
    return result
