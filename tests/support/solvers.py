"""Published solvers as plain float64 loops over a denoiser D(x, sigma), for x = image + sigma z.

Each yields the latent after every step. They are written from the papers' equations, with lambda = -log sigma, and know
nothing of tables. `noise()` gives the next draw of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]
Noise = Callable[[], torch.Tensor]
Steps = Iterator[torch.Tensor]
Solver = Callable[[Denoiser, torch.Tensor, list[float], Noise], Steps]


def posterior(s: float, t: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of DDPM's posterior between two levels (Ho et al. 2020, equation 7)."""
    up = math.sqrt(t * t * (s * s - t * t)) / s
    return math.sqrt(t * t - up * up), up


def dpmpp_2s_a(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """Lu et al. 2022b, algorithm 1, r = 1/2, to sigma_down; then noise."""
    for s, t in zip(sigmas, sigmas[1:]):
        image = D(x, s)
        if t == 0:
            yield image
            return
        down, up = posterior(s, t)
        h = math.log(s / down)
        middle = s * math.exp(-h / 2)
        u = middle / s * x + (1 - math.exp(-h / 2)) * image
        x = down / s * x + (1 - math.exp(-h)) * D(u, middle) + up * noise()
        yield x


def multistep_sde(highest: int) -> Solver:
    """DPM-Solver++ on the reverse SDE with divided differences of D over lambda, as k-diffusion weighs them.

    The second is weighed by phi_3, not by 2 phi_3, as `sample_dpmpp_3m_sde` has it.
    """

    def run(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
        points: list[tuple[float, torch.Tensor]] = []  # (lambda, D), newest first
        for s, t in zip(sigmas, sigmas[1:]):
            points = [(-math.log(s), D(x, s)), *points][:highest]
            if t == 0:
                yield points[0][1]
                return
            h = math.log(s / t)
            phi_1 = (1 - math.exp(-2 * h)) / (2 * h)
            phi_2 = (1 - phi_1) / (2 * h)
            phi_3 = (0.5 - phi_2) / (2 * h)
            new = math.exp(-2 * h) * x + 2 * h * phi_1 * points[0][1]
            if len(points) > 1:
                first = (points[0][1] - points[1][1]) / (points[0][0] - points[1][0])
                slope = first
                if len(points) > 2:
                    second = (first - (points[1][1] - points[2][1]) / (points[1][0] - points[2][0])) / (
                        points[0][0] - points[2][0]
                    )
                    slope = first + (points[0][0] - points[1][0]) * second
                    new = new + 2 * h * phi_3 * h * h * second
                new = new + 2 * h * phi_2 * h * slope
            x = new + t * math.sqrt(1 - math.exp(-2 * h)) * noise()
            yield x

    return run


def heunpp(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """Up to two steps of Euler ahead; their slopes are weighed by sigma over the first sigma of the run."""
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        levels = [sigma for sigma in sigmas[i : i + 3] if sigma > 0]
        slopes, y = [], x
        for k, level in enumerate(levels):
            slopes.append((y - D(y, level)) / level)
            if k + 1 < len(levels):
                y = y + (levels[k + 1] - level) * slopes[-1]
        weights = [level / (len(levels) * sigmas[0]) for level in levels[1:]]
        mean = (1 - sum(weights)) * slopes[0] + sum(w * slope for w, slope in zip(weights, slopes[1:]))
        x = x + (t - s) * mean
        yield x


def restart(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """Heun's method; from about 0.1 noise leads back to about 2 (Xu et al. 2023), with A1111's counts."""
    steps = len(sigmas) - 1
    count, length = {True: (0, 0), 20 <= steps < 36: (1, 9), 36 <= steps: (2, steps // 4)}[True]

    def ramp(high: float, low: float, points: int) -> list[float]:
        return [(high ** (1 / 7) + k / (points - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for k in range(points)]

    if count:
        sigmas = [*ramp(sigmas[0], sigmas[-2], steps - count * length), 0.0]
    bottom = min(range(len(sigmas)), key=lambda k: abs(sigmas[k] - 0.1))
    top = min(range(len(sigmas)), key=lambda k: abs(sigmas[k] - 2.0))

    def heun(x: torch.Tensor, s: float, t: float) -> torch.Tensor:
        slope = (x - D(x, s)) / s
        y = x + (t - s) * slope
        return y if t == 0 else x + (t - s) * (slope + (y - D(y, t)) / t) / 2

    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        x = heun(x, s, t)
        again = count if i + 1 == bottom and top < bottom else 0
        for _ in range(again):
            yield (x := x + math.sqrt(sigmas[top] ** 2 - sigmas[bottom] ** 2) * noise())
            levels = ramp(sigmas[top], sigmas[bottom], length + 1)
            for k, (high, low) in enumerate(zip(levels, levels[1:])):
                x = heun(x, high, low)
                if k + 2 < len(levels):
                    yield x
        yield x


def slopes(
    weigh: Callable[[list[float]], list[float]],
) -> Solver:
    """x' = x + h sum_k w_k slope_(i-k); `weigh` gets the levels of the slopes, newest first, and the next one first."""

    def run(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
        known: list[torch.Tensor] = []
        for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
            known = [(x - D(x, s)) / s, *known][:4]
            weights = [1.0] if t == 0 else weigh([t, *(sigmas[i - k] for k in range(len(known)))])
            x = x + (t - s) * sum(w * slope for w, slope in zip(weights, known))
            yield x

    return run


def even_weights(levels: list[float]) -> list[float]:
    """Adams-Bashforth on even nodes: integrals of Lagrange polynomials through 0, -1, -2, ... from 0 to 1."""
    nodes = [-k for k in range(len(levels) - 1)]
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        lagrange = np.atleast_1d(np.poly(others)) / np.prod([node - other for other in others])
        weights.append(float(np.polyval(np.polyint(lagrange), 1)))
    return weights


def res(stochastic: bool) -> Solver:
    """RES multistep (Zhang et al. 2023): e^-h x + h ((phi_1 - phi_2 / c) D + phi_2 / c D_old), phi_k at -h."""

    def run(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
        old, reached = None, math.nan
        for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
            image = D(x, s)
            down, up = posterior(s, t) if stochastic else (t, 0.0)
            if t == 0:
                yield image
                return
            h = math.log(s / down)
            phi_1 = (1 - math.exp(-h)) / h
            if old is None:
                x = down / s * x + h * phi_1 * image
            else:
                c = (-math.log(sigmas[i - 1]) + math.log(reached)) / h
                phi_2 = (1 - phi_1) / h
                x = math.exp(-h) * x + h * ((phi_1 - phi_2 / c) * image + phi_2 / c * old)
            old, reached = image, down
            x = x + up * noise() if stochastic else x
            yield x

    return run


def seeds(*, fractions: list[float], eta: float, heun: bool) -> Solver:
    """Exponential Runge-Kutta with stages at `fractions` of a step in lambda, and one Ornstein-Uhlenbeck noise.

    Gonzalez et al. 2023 for two and three stages; with `heun`, the second stage of two is weighed by phi_2.
    """
    k = 1 + eta

    def run(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
        for s, t in zip(sigmas, sigmas[1:]):
            images = [D(x, s)]
            if t == 0:
                yield images[0]
                return
            h = math.log(s / t)
            ends = [*fractions, 1.0]
            process, before = torch.zeros_like(x), 0.0
            for c in ends:
                level = s * math.exp(-c * h)
                if eta:
                    decay = math.exp(-eta * h * (c - before))
                    process = decay * process + math.sqrt(max(1 - decay**2, 0.0)) * noise()
                e = k * c * h
                phi_1 = (1 - math.exp(-e)) / e
                phi_2 = (1 - phi_1) / e
                newest = fractions[len(images) - 2]
                if len(images) == 1:
                    mean = phi_1 * images[0]
                elif len(fractions) == 1 and not heun:
                    mean = phi_1 * ((1 - 1 / (2 * newest)) * images[0] + 1 / (2 * newest) * images[1])
                else:
                    share = phi_2 * c / newest
                    mean = (phi_1 - share) * images[0] + share * images[-1]
                y = math.exp(-e) * x + e * mean + level * process
                before = c
                if c != ends[-1] or len(images) == 1:
                    images.append(D(y, level))
            x = y
            yield x

    return run


def er_sde(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """ER-SDE-Solver-3 (Cui et al. 2023) with scale(s) = s (e^(s^0.3) + 10) and sums of 200 points."""

    def scale(s: np.ndarray | float) -> np.ndarray | float:
        return s * (np.exp(s**0.3) + 10)

    images: list[torch.Tensor] = []
    for i, (s, t) in enumerate(zip(sigmas, sigmas[1:])):
        images = [D(x, s), *images][:3]
        if t == 0:
            yield images[0]
            return
        r = float(scale(t) / scale(s))
        grid = t + (s - t) / 200 * np.arange(200)
        new = r * x + (1 - r) * images[0]
        if i > 0:
            first = (images[0] - images[1]) / (s - sigmas[i - 1])
            new = new + (t - s + float(scale(t)) * float(np.sum(1 / scale(grid))) * (s - t) / 200) * first
        if i > 1:
            older = (images[1] - images[2]) / (sigmas[i - 1] - sigmas[i - 2])
            second = (first - older) / ((s - sigmas[i - 2]) / 2)
            moment = float(np.sum((grid - s) / scale(grid))) * (s - t) / 200
            new = new + ((t - s) ** 2 / 2 + float(scale(t)) * moment) * second
        x = new + math.sqrt(t * t - r * r * s * s) * noise()
        yield x


def dpm_fast(D: Denoiser, x: torch.Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """DPM-Solver-fast (Lu et al. 2022a, section 3.4), from the first level to the last but 0; yields the end."""
    calls, high, low = len(sigmas) - 1, sigmas[0], sigmas[-2]
    orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
    levels = [high * (low / high) ** (k / len(orders)) for k in range(len(orders) + 1)]
    for order, s, t in zip(orders, levels, levels[1:]):
        h = math.log(s / t)

        def eps(y: torch.Tensor, r: float, s: float = s, h: float = h) -> torch.Tensor:
            level = s * math.exp(-r * h)
            return (y - D(y, level)) / level

        def to(r: float, s: float = s, h: float = h) -> float:  # the weight of a constant slope over r of the step
            return -s * math.exp(-r * h) * math.expm1(r * h)

        def line(r: float, s: float = s, h: float = h) -> float:  # of its difference over r
            return -s * math.exp(-r * h) * (math.expm1(r * h) / (r * h) - 1)

        e_0 = eps(x, 0.0)
        if order == 1:
            x = x + to(1) * e_0
        elif order == 2:
            x = x + to(1) * eps(x + to(1 / 2) * e_0, 1 / 2)
        else:
            e_1 = eps(x + to(1 / 3) * e_0, 1 / 3)
            e_2 = eps(x + to(2 / 3) * e_0 + 2 * line(2 / 3) * (e_1 - e_0), 2 / 3)
            x = x + to(1) * e_0 + 3 / 2 * line(1) * (e_2 - e_0)
    yield x


REFERENCES: dict[str, Solver] = {
    "dpm++2s_a": dpmpp_2s_a,
    "dpm++2m_sde_heun": multistep_sde(2),
    "dpm++3m_sde": multistep_sde(3),
    "dpm_fast": dpm_fast,
    "heun++": heunpp,
    "restart": restart,
    "ipndm": slopes(even_weights),
    "gradient_estimation": slopes(lambda levels: [1.0] if len(levels) == 2 else [2.0, -1.0]),
    "res_multistep": res(False),
    "res_multistep_a": res(True),
    "seeds_2": seeds(fractions=[1 / 2], eta=1, heun=False),
    "seeds_3": seeds(fractions=[1 / 3, 2 / 3], eta=1, heun=False),
    "exp_heun": seeds(fractions=[1.0], eta=0, heun=True),
    "exp_heun_sde": seeds(fractions=[1.0], eta=1, heun=True),
    "er_sde": er_sde,
}
