"""Samplers in the notation of Karras et al. 2022 that call the network more than once in a step.

DPM2, DPM2 ancestral, DPM++ 2S ancestral, Heun++ and Restart. S is sigma at the step's start, S_next at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fastsd.sampling.karras_rows import ancestral, builder_of, inner_steps, row, slope_row, time_of
from fastsd.sampling.levels import karras_ramp
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table


def dpm2(schedule: Schedule) -> Table:
    """DPM-Solver-2 as a midpoint method (Lu et al. 2022a, "DPM-Solver", algorithm 1; k-diffusion, `sample_dpm_2`).

    The first call's slope leads to the geometric mean M of S and S_next; the slope there covers the whole step.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        M = math.sqrt(S * S_next)
        # In inpainting, diffusers has the known part at S_next after this row already; `keep` follows it.
        builder.add(row(schedule, times[i], S, i, S_next, a=M / S, b=[1 - M / S], save=True))
        whole = (S_next - S) / M
        builder.add(row(schedule, time_of(schedule, M), M, i, S_next, a=whole, s=1.0, b=[-whole]))
    return builder.table()


def dpm2_a(schedule: Schedule) -> Table:
    """DPM-Solver-2 to sigma_down, then noise up to S_next (k-diffusion, `sample_dpm_2_ancestral`, eta = 1).

    The geometric mean of S and sigma_down = S_next^2 / S is S_next, so that is where the second call is.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        down, up = ancestral(S, S_next)
        builder.add(row(schedule, times[i], S, i, S_next, a=S_next / S, b=[1 - S_next / S], save=True))
        whole = (down - S) / S_next
        builder.add(
            row(schedule, time_of(schedule, S_next), S_next, i, S_next, a=whole, s=1.0, b=[-whole], n=up, draw=True)
        )
    return builder.table()


def dpmpp_2s_a(schedule: Schedule) -> Table:
    """DPM-Solver++(2S) to sigma_down, then noise up to S_next (k-diffusion, `sample_dpmpp_2s_ancestral`, eta = 1).

    Lu et al. 2022b, algorithm 1 with r = 1/2: D at the geometric mean of S and sigma_down, which is S_next, stands for
    the whole step.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    for i, S, S_next in inner_steps(builder, schedule, times, sigmas):
        down, up = ancestral(S, S_next)
        builder.add(row(schedule, times[i], S, i, S_next, a=S_next / S, b=[1 - S_next / S], save=True))
        second = row(
            schedule, time_of(schedule, S_next), S_next, i, S_next, s=down / S, b=[1 - down / S], n=up, draw=True
        )
        builder.add(second)
    return builder.table()


def heunpp(schedule: Schedule) -> Table:
    """Heun++: slopes at this level and the next two, weighed by sigma (ComfyUI, `sample_heunpp2`).

    w_k = sigma_(i+k) / (3 sigma_0) for the levels ahead, and the rest for this one. The last step but one has only one
    level ahead that is not 0, and 2 sigma_0; the last is Euler's. sigma_0 is the level at which the run starts.
    """
    times, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    count = len(times)
    for i in range(schedule.start, count):
        S, S_next = sigmas[i], sigmas[i + 1]
        h = S_next - S
        first = slope_row(schedule, times[i], S, i, S_next, a=1.0, b=[h], save=True)
        builder.add(first)
        if i == count - 1:
            continue
        ahead = sigmas[i + 1 : min(i + 3, count)]
        weights = [sigma / ((len(ahead) + 1) * sigmas[schedule.start]) for sigma in ahead]
        final = [h * w for w in (*weights[::-1], 1 - sum(weights))]  # newest first
        if len(ahead) == 2:
            second = slope_row(schedule, times[i + 1], S_next, i, ahead[1], a=1.0, b=[ahead[1] - S_next])
            builder.add(second)
        last = i + len(ahead)
        builder.add(slope_row(schedule, times[last], sigmas[last], i, S_next, s=1.0, b=final))
    return builder.table()


def restart(schedule: Schedule) -> Table:
    """Heun's method that goes back up and repeats a stretch (Xu et al. 2023, "Restart Sampling").

    As A1111 sets it (`restart_sampler` in modules/sd_samplers_extra.py): with 20 steps or more, the stretch from about
    sigma 2 to about 0.1 runs once more in 9 steps; with 36 or more twice, in a quarter of the steps each. The rest are
    spaced as by Karras et al. between the schedule's first and last level, so that N steps remain N.
    """
    _, sigmas = schedule.karras_levels()
    builder = builder_of(schedule, sigmas)
    pairs = list(_restart_pairs(sigmas[schedule.start :]))
    for index, (S, S_next) in enumerate(pairs):
        step = schedule.start + index
        after = pairs[index + 1][0] if index + 1 < len(pairs) else S_next
        up = math.sqrt(max(after**2 - S_next**2, 0.0))
        if S_next == 0:  # Euler's step; where no level is near 0.1, the stretch ends at 0 too, and goes up from there
            builder.add(row(schedule, time_of(schedule, S), S, step, after, b=[1.0], n=up, draw=up > 0))
            continue
        builder.add(row(schedule, time_of(schedule, S), S, step, S_next, a=S_next / S, b=[1 - S_next / S], save=True))
        half = (S_next - S) / 2
        b = [-half / S_next, -half / S]
        a, s = half / S_next, 1 + half / S
        builder.add(row(schedule, time_of(schedule, S_next), S_next, step, after, a=a, s=s, b=b, n=up, draw=up > 0))
    return builder.table()


def _restart_pairs(sigmas: list[float]) -> Iterator[tuple[float, float]]:
    """The (start, end) of every step of a restart run over `sigmas`, whose last is 0."""
    steps = len(sigmas) - 1
    repeats, length = (0, 0) if steps < 20 else (1, 9) if steps < 36 else (2, steps // 4)
    if repeats:
        sigmas = [*karras_ramp(sigmas[0], sigmas[-2], steps - repeats * length).tolist(), 0.0]
    low, high = (int(np.argmin(np.abs(np.array(sigmas) - level))) for level in (0.1, 2.0))
    for i in range(len(sigmas) - 1):
        yield sigmas[i], sigmas[i + 1]
        if repeats and i + 1 == low and high < low:
            stretch = [sigmas[high], *karras_ramp(sigmas[high], sigmas[low], length + 1).tolist()[1:-1], sigmas[low]]
            for _ in range(repeats):
                yield from zip(stretch, stretch[1:])
