"""UniPC: a predictor and a corrector that share a network call (Zhao et al. 2023, "UniPC").

Notation as in `dpm_solver`. For an interval from sigma to sigma', m0 is D at its start and m_k are older D. Predictor
and corrector are the same sum

    x' = (sigma' / sigma) x - alpha' (e^u - 1) m0 - alpha' B sum_k rho_k (m_k - m0) / r_k,  u = -h

over the older points; the corrector's also has D at the interval's end (r = 1). So the corrected latent is the
predicted one plus terms in D and the history. No saved latent is needed, and one row does both. B is e^u - 1 (the
authors' bh2) or u (bh1). Without `predict_x0`, D is the noise, alpha and sigma change places, and u = h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastsd.sampling.schedule import Float64, Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, noise_prediction, vp_level_of_sigma, vp_prediction

ORDER = 2


def unipc(schedule: Schedule) -> Table:
    """UniPC-2 with B2(h) and prediction of the clean image (Zhao et al. 2023, algorithms 1 and 2), unless the
    checkpoint states another order, B(h) or prediction.

    A row corrects its latent over the interval before it, then predicts over the next. `disable_corrector` names the
    steps whose intervals are not corrected.
    """
    times, sigmas = schedule.solver_levels()
    method = _Method(sigmas, schedule.option("predict_x0", True), schedule.option("solver_type", "bh2") == "bh1")
    predict = vp_prediction if method.image else noise_prediction
    highest, uncorrected = schedule.option("solver_order", ORDER), schedule.option("disable_corrector", ())
    builder = TableBuilder(mix=vp_level_of_sigma(sigmas[schedule.start]))
    previous = 0  # the order of the interval before this row; 0: there is none
    for i in range(schedule.start, len(times)):
        corrects = previous and i - 1 not in uncorrected
        correction = method.correction(i - 1, previous) if corrects else np.zeros(4)
        order = min(highest, i - schedule.start + 1)
        if schedule.option("lower_order_final", True):
            order = min(order, len(times) - i)
        x_weight, scale = method.weights(i)
        b = x_weight * correction
        b[0] -= scale * math.expm1(method.u(i))
        if order > 1:
            b += method.differences(i, method.predictor(i, order))
        builder.add(
            TableRow(
                t=times[i],
                prediction=predict(schedule.config.prediction_type, *vp_level_of_sigma(sigmas[i])),
                a=x_weight,
                b=[float(w) for w in b],
                step=i,
                keep=vp_level_of_sigma(sigmas[i + 1]),
            )
        )
        previous = order
    return builder.table()


@dataclass(frozen=True)
class _Method:
    """The sums over interval i, from sigmas[i] to sigmas[i + 1]. image: D is the clean image; bh1: B(h) = u."""

    sigmas: list[float]
    image: bool
    bh1: bool

    def weights(self, i: int) -> tuple[float, float]:
        """The weight of x, and alpha' (or sigma')."""
        now, after = vp_level_of_sigma(self.sigmas[i]), vp_level_of_sigma(self.sigmas[i + 1])
        return (after[1] / now[1], after[0]) if self.image else (after[0] / now[0], after[1])

    def u(self, i: int) -> float:
        """-h, or h for the noise."""
        h = _lambda(self.sigmas[i + 1]) - _lambda(self.sigmas[i])
        return -h if self.image else h

    def B(self, i: int) -> float:
        u = self.u(i)
        return u if self.bh1 else math.expm1(u)

    def ratios(self, i: int, order: int) -> Float64:
        """r_k = (lambda_(i-k) - lambda_i) / h for the older points k = 1 .. order - 1."""
        sigmas = self.sigmas
        h = _lambda(sigmas[i + 1]) - _lambda(sigmas[i])
        return np.array([(_lambda(sigmas[i - k]) - _lambda(sigmas[i])) / h for k in range(1, order)])

    def system(self, i: int, order: int) -> tuple[Float64, Float64]:
        """R and b of R rho = b (Zhao et al. 2023, theorem 3.1). Rows of R are powers of r_1 .. r_(order-1), 1."""
        u, B = self.u(i), self.B(i)
        nodes = np.append(self.ratios(i, order), 1.0)
        R = np.stack([nodes**j for j in range(order)])
        phi, b = math.expm1(u) / u - 1, []
        for j in range(1, order + 1):
            b.append(phi * math.factorial(j) / B)
            phi = phi / u - 1 / math.factorial(j + 1)
        return R, np.array(b)

    def predictor(self, i: int, order: int) -> Float64:
        """rho / r for the older points. Order 2 has rho = 1/2 instead of the system's root, as in the authors' code."""
        if order == 2:
            rho = np.array([0.5])
        else:
            R, b = self.system(i, order)
            rho = np.linalg.solve(R[:-1, :-1], b[:-1])
        return rho / self.ratios(i, order)

    def differences(self, i: int, weights: Float64) -> Float64:
        """The weights of D, H1, H2, H3 in -alpha' B sum_k weights_k (m_k - m0), where m0 is D and m_k is H_k."""
        scale = self.weights(i)[1] * self.B(i)
        result = np.zeros(4)
        result[1 : 1 + len(weights)] = -scale * weights
        result[0] = scale * weights.sum()
        return result

    def correction(self, i: int, order: int) -> Float64:
        """The weights of D, H1, H2, H3 in the corrected minus the predicted latent at the end of interval i.

        In the row after the interval, its m0 is H1, its m_k is H_(k+1) and its end is D. Order 1 has rho = 1/2 for the
        end, as in the authors' code.
        """
        R, b = self.system(i, order)
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(R, b)
        older = rho[:-1] / self.ratios(i, order)
        if order > 1:
            older = older - self.predictor(i, order)
        at_start = self.differences(i, np.append(older, rho[-1]))
        # `differences` orders points as m0, older, end. In this row the end is D, m0 is H1, and the older are H2, ...
        return np.array([at_start[order], at_start[0], *at_start[1:order], *np.zeros(3 - order)])


def _lambda(sigma: float) -> float:
    return -math.log(sigma) if sigma > 0 else math.inf
