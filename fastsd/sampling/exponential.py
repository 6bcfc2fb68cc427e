"""Exponential integrators in the notation of Karras et al. 2022: RES, SEEDS, exponential Heun, ER-SDE, DPM fast.

Notation: x = image + sigma z, lambda = -log sigma, and h the increase of lambda over a step from S to S_next. Where D
is the clean image, the exact solution is (S_next / S) x plus an integral of e^(lambda - lambda') D. The last step goes
to the clean image.
"""

from __future__ import annotations

import math

from fastsd.sampling.karras_rows import ancestral, builder_of, inner_steps, next_time, row, slope_row, time_of
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table


def res_multistep(schedule: Schedule) -> Table:
    """RES of order 2, multistep (Zhang et al. 2023, "Improved order analysis and design of exponential integrator")."""
    return _res(schedule, ancestral_noise=False)


def res_multistep_a(schedule: Schedule) -> Table:
    """The same to sigma_down, then noise up to S_next (ComfyUI, `sample_res_multistep_ancestral`, eta = 1)."""
    return _res(schedule, ancestral_noise=True)


def _res(schedule: Schedule, *, ancestral_noise: bool) -> Table:
    """x' = e^-h x + (1 - e^-h - h phi_2 / c) D + (h phi_2 / c) H1, with the last D at lambda + c h."""
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    reached = 0.0  # the level that the last step's deterministic part reached
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        down, up = ancestral(S, S_next) if ancestral_noise else (S_next, 0.0)
        b = [1 - down / S]
        if i > schedule.start:
            h = math.log(S / down)
            c = math.log(reached / sigmas[i - 1]) / h
            second = h * _phi_2(h) / c
            b = [b[0] - second, second]
        builder.add(row(schedule, times[i], S, i, S_next, a=down / S, b=b, n=up, draw=ancestral_noise))
        reached = down
    return builder.table()


def seeds_2(schedule: Schedule) -> Table:
    """SEEDS-2 for the prediction of the clean image, r = 1/2 (Gonzalez et al. 2023, "SEEDS")."""
    return _two_stages(schedule, r=0.5, eta=1.0, phi_2=False)


def exp_heun(schedule: Schedule) -> Table:
    """Exponential Heun: a second call at the step's end, weighed by phi_2 (ComfyUI, `sample_exp_heun_2_x0`).

    Hochbruck and Ostermann 2005, "Explicit exponential Runge-Kutta methods", order 2 with c_2 = 1.
    """
    return _two_stages(schedule, r=1.0, eta=0.0, phi_2=True)


def exp_heun_sde(schedule: Schedule) -> Table:
    """Exponential Heun on the reverse SDE (ComfyUI, `sample_exp_heun_2_x0_sde`, eta = 1)."""
    return _two_stages(schedule, r=1.0, eta=1.0, phi_2=True)


def _two_stages(schedule: Schedule, *, r: float, eta: float, phi_2: bool) -> Table:
    """Both rows of a step start at its beginning; the first goes to lambda + r h.

    The noise is one Ornstein-Uhlenbeck process: what the first row draws decays by e^(-(1 - r) h eta) until the end.
    The second row draws even where r = 1 gives it no weight, as in ComfyUI.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        h = math.log(S / S_next)
        M = S_next if r == 1 else S * math.exp(-r * h)
        a, n = _decay(S, M, eta)
        first = row(schedule, times[i], S, i, M, a=a, b=[1 - _power(S, M, eta)], n=n, save=True, draw=eta > 0)
        builder.add(first)
        s, total = _decay(S, S_next, eta)
        _, later = _decay(M, S_next, eta)
        whole = 1 - _power(S, S_next, eta)
        middle = (1 + eta) * h * _phi_2((1 + eta) * h) / r if phi_2 else whole / (2 * r)
        t = next_time(schedule, times, i, S_next) if r == 1 else time_of(schedule, M)
        earlier = math.sqrt(max(total**2 - later**2, 0.0))
        b = [middle, whole - middle]
        builder.add(row(schedule, t, M, i, S_next, s=s, b=b, n=later, m=earlier, draw=eta > 0))
    return builder.table()


def seeds_3(schedule: Schedule) -> Table:
    """SEEDS-3 for the prediction of the clean image, r = 1/3 and 2/3 (Gonzalez et al. 2023, "SEEDS").

    All stages start at the step's beginning, and their noise is one Ornstein-Uhlenbeck process. So the second stage's
    latent, decayed, holds what the third needs of the start and of the first two draws; only its outputs are replaced.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        h = math.log(S / S_next)
        M, L = S * math.exp(-h / 3), S * math.exp(-2 * h / 3)
        a, n = _decay(S, M, 1.0)
        builder.add(row(schedule, times[i], S, i, M, a=a, b=[1 - _power(S, M, 1.0)], n=n, save=True, draw=True))
        s_2, total = _decay(S, L, 1.0)
        _, n = _decay(M, L, 1.0)
        slope = 2 * (4 * h / 3) * _phi_2(4 * h / 3)
        b_2 = [slope, 1 - _power(S, L, 1.0) - slope]
        m = math.sqrt(total**2 - n**2)
        builder.add(row(schedule, time_of(schedule, M), M, i, L, s=s_2, b=b_2, n=n, m=m, draw=True))
        carried, n = _decay(L, S_next, 1.0)  # the weight of the second row's latent, for its noise
        slope = 2 * h * _phi_2(2 * h) * 3 / 2
        b_3 = [slope, -carried * b_2[0], 1 - _power(S, S_next, 1.0) - slope - carried * b_2[1]]
        third = row(schedule, time_of(schedule, L), L, i, S_next, a=carried, b=b_3, n=n, draw=True)
        builder.add(third)
    return builder.table()


def er_sde(schedule: Schedule) -> Table:
    """ER-SDE-Solver-3 with the noise scale s (e^(s^0.3) + 10) (Cui et al. 2023, "ER-SDE"; ComfyUI, `sample_er_sde`).

    As there, the integrals are left Riemann sums of 200 points, from S_next up.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        ratio = _er_scale(S_next) / _er_scale(S)
        b = [1 - ratio, 0.0, 0.0]
        points = [S_next + k * (S - S_next) / 200 for k in range(200)]
        width, change = (S - S_next) / 200, S_next - S
        if i > schedule.start:  # + first (D - H1) / (S - S_1)
            first = change + _er_scale(S_next) * width * sum(1 / _er_scale(point) for point in points)
            weights = [1 / (S - sigmas[i - 1]), -1 / (S - sigmas[i - 1]), 0.0]
            b = [x + first * w for x, w in zip(b, weights)]
            if i > schedule.start + 1:  # + second times the second difference over (S, S_1, S_2)
                moment = width * sum((point - S) / _er_scale(point) for point in points)
                second = (change**2 / 2 + _er_scale(S_next) * moment) * 2 / (S - sigmas[i - 2])
                older = 1 / (sigmas[i - 1] - sigmas[i - 2])
                b = [b[0] + second * weights[0], b[1] + second * (weights[1] - older), second * older]
        n = math.sqrt(max(S_next**2 - (S * ratio) ** 2, 0.0))
        builder.add(row(schedule, times[i], S, i, S_next, a=ratio, b=b, n=n, draw=True))
    return builder.table()


def dpm_fast(schedule: Schedule) -> Table:
    """DPM-Solver-fast: N calls in steps of order 3, then 2 and 1, even in log sigma (Lu et al. 2022a, section 3.4).

    Only the first and the last level of the schedule count; the run ends at the last, not at sigma 0 (k-diffusion,
    `sample_dpm_fast`, eta = 0). The history holds the slope, which is the noise. Every call is one of the N steps.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    calls = len(times) - schedule.start
    S, end = sigmas[schedule.start], sigmas[-2] if calls > 1 else float(schedule.sigmas[0])
    orders = [3] * (calls // 3) + [calls % 3] if calls % 3 else [3] * (calls // 3 - 1) + [2, 1]
    h = math.log(S / end) / len(orders)
    step = schedule.start
    for order in orders:
        S_next = S * math.exp(-h)
        inner = [S * math.exp(-h * k / order) for k in range(1, order)]
        for k, (sigma, after) in enumerate(zip([S, *inner], [*inner, S_next])):
            a, s, b = _fast_weights(order, k, h, after)
            t = time_of(schedule, sigma)
            builder.add(slope_row(schedule, t, sigma, step, after, a=a, s=s, b=b, save=k == 0))
            step += 1
        S = S_next
    return builder.table()


def _fast_weights(order: int, k: int, h: float, sigma: float) -> tuple[float, float, list[float]]:
    """The weights of x, the saved latent and the slopes, newest first, in call `k` of a step of h in lambda.

    A call with r = (k + 1) / order of the step behind it: x' = saved - sigma (e^(r h) - 1) eps, plus a difference of
    slopes (Lu et al. 2022a, equations 3.2 and 3.3, algorithms 1 and 2).
    """
    end = h * (k + 1) / order
    whole = -sigma * math.expm1(end)
    if k == 0:
        return 1.0, 0.0, [whole]
    if order == 2:  # r = 1/2: the first-order term times (1 + difference)
        return 0.0, 1.0, [whole, 0.0]
    difference = -sigma * (math.expm1(end) / end - 1)
    if k == 1:
        return 0.0, 1.0, [2 * difference, whole - 2 * difference]
    return 0.0, 1.0, [1.5 * difference, 0.0, whole - 1.5 * difference]


def _power(S: float, S_next: float, eta: float) -> float:
    """e^(-(1 + eta) h): what is left of x, for D = 0, in units of the signal."""
    return (S_next / S) ** (1 + eta)


def _decay(S: float, S_next: float, eta: float) -> tuple[float, float]:
    """The weight of x and of fresh noise from S to S_next: e^(-(1 + eta) h), S_next sqrt(1 - e^(-2 eta h))."""
    return _power(S, S_next, eta), S_next * math.sqrt(max(1 - (S_next / S) ** (2 * eta), 0.0))


def _phi_2(h: float) -> float:
    """(e^-h - 1 + h) / h^2, which is phi_2(-h)."""
    return (math.expm1(-h) + h) / h**2 if h > 1e-4 else 0.5 - h / 6 + h * h / 24


def _er_scale(sigma: float) -> float:
    return sigma * (math.exp(sigma**0.3) + 10)
