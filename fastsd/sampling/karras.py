"""Samplers in the notation of Karras et al. 2022: x = image + sigma z. Euler, Euler ancestral, Heun, LMS, DPM++ SDE.

Notation: S is sigma at the row, S_next at the end of the step. The probability-flow ODE is dx/dsigma = (x - D) / sigma.
"""

from __future__ import annotations

import math

import numpy as np

from fastsd.sampling.karras_rows import ancestral, builder_of, inner_steps, next_time, row, slope_row, time_of
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table


def euler(schedule: Schedule) -> Table:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without its second call)."""
    times, sigmas = schedule.karras_levels(options=True)
    builder = builder_of(schedule, sigmas)
    for i in range(schedule.start, len(times)):
        ratio = sigmas[i + 1] / sigmas[i]
        builder.add(row(schedule, times[i], sigmas[i], i, sigmas[i + 1], a=ratio, b=[1 - ratio]))
    return builder.table()


def euler_a(schedule: Schedule) -> Table:
    """Euler's method to sigma_down, then noise up to S_next (k-diffusion, `sample_euler_ancestral`, eta = 1).

    sigma_up and sigma_down are the standard deviation and the level of DDPM's posterior (Ho et al. 2020, equation 7):
    sigma_down = S_next^2 / S. The last row draws noise with weight 0, as in diffusers.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i in range(schedule.start, len(times)):
        ratio = (sigmas[i + 1] / sigmas[i]) ** 2
        sigma_up = sigmas[i + 1] * math.sqrt(1 - ratio)
        builder.add(row(schedule, times[i], sigmas[i], i, sigmas[i + 1], a=ratio, b=[1 - ratio], n=sigma_up, draw=True))
    return builder.table()


def heun(schedule: Schedule) -> Table:
    """Heun's second-order method: two calls in each step but the last (Karras et al. 2022, algorithm 1)."""
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i in range(schedule.start, len(times)):
        S, S_next = sigmas[i], sigmas[i + 1]
        builder.add(row(schedule, times[i], S, i, S_next, a=S_next / S, b=[1 - S_next / S], save=True))
        if S_next > 0:  # x' = saved + (S_next - S) (slope at S + slope at S_next) / 2
            half = (S_next - S) / 2
            b = [-half / S_next, -half / S]
            builder.add(
                row(
                    schedule,
                    next_time(schedule, times, i, S_next),
                    S_next,
                    i,
                    S_next,
                    a=half / S_next,
                    s=1 + half / S,
                    b=b,
                )
            )
    return builder.table()


def lms(schedule: Schedule) -> Table:
    """Linear multistep (Adams-Bashforth) of order 4 on the uneven grid of sigmas (k-diffusion, `sample_lms`).

    The history holds slopes; their weights are integrals of Lagrange polynomials over the step. The order is 4, or the
    number of slopes so far. In image-to-image diffusers uses weights of order 4 even where slopes are missing.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i in range(schedule.start, len(times)):
        order = min(i - schedule.start + 1, 4)
        weights = _adams_weights(sigmas[i - order + 1 : i + 2])
        builder.add(slope_row(schedule, times[i], sigmas[i], i, sigmas[i + 1], a=1.0, b=weights))
    return builder.table()


def _adams_weights(nodes: list[float]) -> list[float]:
    """Weights, newest first, of slopes at `nodes[:-1]` in the integral from `nodes[-2]` to `nodes[-1]`."""
    points, weights = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    start, end = nodes[-2], nodes[-1]
    tau = (start + end) / 2 + (end - start) / 2 * points
    known = nodes[-2::-1]
    result = []
    for node in known:
        lagrange = np.ones_like(tau)
        for root in known:
            if root != node:
                lagrange *= (tau - root) / (node - root)
        result.append(float((end - start) / 2 * np.sum(weights * lagrange)))
    return result


def dpmpp_sde(schedule: Schedule) -> Table:
    """DPM-Solver++ singlestep SDE with the midpoint at r = 1/2 (k-diffusion, `sample_dpmpp_sde`, eta = 1).

    The first row of a step goes to the geometric mean M of S and S_next, the second from S to S_next with D at M.
    Brownian motion on (S, M) is part of that on (S, S_next), so the second row's noise is sqrt(r) z_(i-1) + sqrt(1 - r)
    z_i with r = (S - M) / (S - S_next).
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        M = math.sqrt(S * S_next)
        down, up = ancestral(S, M)
        # In inpainting, diffusers has the known part at S_next after this row already; `keep` follows it.
        builder.add(row(schedule, times[i], S, i, S_next, a=down / S, b=[1 - down / S], n=up, save=True, draw=True))
        down, up = ancestral(S, S_next)
        r = (S - M) / (S - S_next)
        t_mid = time_of(schedule, M)
        n, m = up * math.sqrt(1 - r), up * math.sqrt(r)
        builder.add(row(schedule, t_mid, M, i, S_next, s=down / S, b=[1 - down / S], n=n, m=m, draw=True))
    return builder.table()
