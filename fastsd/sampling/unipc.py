"""UniPC: a predictor and a corrector that share a network call (Zhao et al. 2023, "UniPC").

Notation as in `dpm_solver`. For an interval from sigma to sigma', m0 is D at its start, m_k are older D, and B = e^-h -
1 (the authors' bh2) weighs their differences. Predictor and corrector are the same sum

    x' = (sigma' / sigma) x + alpha' (1 - e^-h) m0 - alpha' B sum_k rho_k (m_k - m0) / r_k

over the older points; the corrector's also has D at the interval's end (r = 1). So the corrected latent is the
predicted one plus terms in D and the history. No saved latent is needed, and one row does both.
"""

from __future__ import annotations

import math

import numpy as np

from fastsd.sampling.schedule import Float64, Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, vp_level_of_sigma, vp_prediction

ORDER = 2


def unipc(schedule: Schedule) -> Table:
    """UniPC-2 with B2(h) and prediction of the clean image (Zhao et al. 2023, algorithms 1 and 2).

    A row corrects its latent over the interval before it, then predicts over the next.
    """
    times, sigmas = schedule.solver_levels()
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    previous = 0  # the order of the interval before this row; 0: there is none
    for i in range(schedule.start, len(times)):
        correction = _correction(sigmas, i - 1, previous) if previous else np.zeros(4)
        order = min(ORDER, len(times) - i, i - schedule.start + 1)
        alpha_next, noise_next = vp_level_of_sigma(sigmas[i + 1])
        x_weight = noise_next / vp_level_of_sigma(sigmas[i])[1]
        h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
        b = x_weight * correction
        b[0] -= alpha_next * math.expm1(-h)
        if order > 1:
            b += _differences(sigmas, i, _predictor_weights(order, sigmas, i))
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, *vp_level_of_sigma(sigmas[i])),
                a=x_weight,
                b=[float(w) for w in b],
                step=i,
                keep=vp_level_of_sigma(sigmas[i + 1]),
            )
        )
        previous = order
    return builder.table()


def _lambda(sigma: float) -> float:
    return -math.log(sigma) if sigma > 0 else math.inf


def _ratios(sigmas: list[float], i: int, order: int) -> Float64:
    """r_k = (lambda_(i-k) - lambda_i) / h for the older points k = 1 .. order - 1 of interval i, from i to i + 1."""
    h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
    return np.array([(_lambda(sigmas[i - k]) - _lambda(sigmas[i])) / h for k in range(1, order)])


def _system(sigmas: list[float], i: int, order: int) -> tuple[Float64, Float64]:
    """R and b of R rho = b (Zhao et al. 2023, theorem 3.1). Rows of R are powers of r_1 .. r_(order-1), 1."""
    hh = _lambda(sigmas[i]) - _lambda(sigmas[i + 1])  # -h, for prediction of the clean image
    nodes = np.append(_ratios(sigmas, i, order), 1.0)
    R = np.stack([nodes**j for j in range(order)])
    phi, b = math.expm1(hh) / hh - 1, []
    for j in range(1, order + 1):
        b.append(phi * math.factorial(j) / math.expm1(hh))
        phi = phi / hh - 1 / math.factorial(j + 1)
    return R, np.array(b)


def _predictor_weights(order: int, sigmas: list[float], i: int) -> Float64:
    """rho / r for the older points. Order 2 has rho = 1/2 instead of the system's root, as in the authors' code."""
    if order == 2:
        rho = np.array([0.5])
    else:
        R, b = _system(sigmas, i, order)
        rho = np.linalg.solve(R[:-1, :-1], b[:-1])
    return rho / _ratios(sigmas, i, order)


def _differences(sigmas: list[float], i: int, weights: Float64) -> Float64:
    """The weights of D, H1, H2, H3 in -alpha' B sum_k weights_k (m_k - m0), where m0 is D and m_k is H_k."""
    scale = vp_level_of_sigma(sigmas[i + 1])[0] * math.expm1(_lambda(sigmas[i]) - _lambda(sigmas[i + 1]))
    result = np.zeros(4)
    result[1 : 1 + len(weights)] = -scale * weights
    result[0] = scale * weights.sum()
    return result


def _correction(sigmas: list[float], i: int, order: int) -> Float64:
    """The weights of D, H1, H2, H3 in the corrected minus the predicted latent at the end of interval i.

    In the row after the interval, its m0 is H1, its m_k is H_(k+1) and its end is D. Order 1 has rho = 1/2 for the end,
    as in the authors' code.
    """
    R, b = _system(sigmas, i, order)
    rho = np.array([0.5]) if order == 1 else np.linalg.solve(R, b)
    older = rho[:-1] / _ratios(sigmas, i, order)
    if order > 1:
        older = older - _predictor_weights(order, sigmas, i)
    at_start = _differences(sigmas, i, np.append(older, rho[-1]))
    # `_differences` orders points as m0, older, end. In this row the end is D, m0 is H1, and the older are H2, ...
    return np.array([at_start[order], at_start[0], *at_start[1:order], *np.zeros(3 - order)])
