"""Trajectory consistency sampling."""

from __future__ import annotations

import math

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, TableRow, vp_level, vp_prediction
from fastsd.sampling.vp import distilled_timesteps


def tcd(schedule: Schedule) -> Table:
    """Strategic stochastic sampling (Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4).

    A row goes without noise to the timestep s = floor((1 - gamma) t'), then with noise up to the next, t'; `eta` is the
    paper's gamma. The timesteps are those of `lcm`.

    Raises:
        FastsdError: more steps than distillation used.
    """
    times, alpha_bar = distilled_timesteps(schedule, "tcd"), schedule.alphas_cumprod.tolist()
    steps = len(times)
    builder = TableBuilder(mix=vp_level(alpha_bar[times[schedule.start]]))
    for i in range(schedule.start, steps):
        last = i + 1 == steps
        target = 0 if last else times[i + 1]
        signal, noise = vp_level(alpha_bar[times[i]])
        middle = alpha_bar[math.floor((1 - schedule.eta) * target)]
        s_signal, s_noise = vp_level(middle)
        scale, n = 1.0, 0.0
        if schedule.eta > 0 and not last:
            scale, n = math.sqrt(alpha_bar[target] / middle), math.sqrt(1 - alpha_bar[target] / middle)
        a = scale * s_noise / noise
        builder.add(
            TableRow(
                t=times[i],
                prediction=vp_prediction(schedule.config.prediction_type, signal, noise),
                a=a,
                b=[scale * s_signal - a * signal],
                n=n,
                draw=schedule.eta > 0 and not last,
                step=i,
                keep=vp_level(alpha_bar[target]),
            )
        )
    return builder.table()
