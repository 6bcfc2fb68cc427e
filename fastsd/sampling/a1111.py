"""DDIM as A1111 runs it (modules/sd_samplers_timesteps.py, `CompVisSampler`, and `ddim` in its `_impl`)."""

from __future__ import annotations

from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import Table, TableBuilder, vp_level
from fastsd.sampling.vp import ddim_row


def ddim(schedule: Schedule) -> Table:
    """DDIM over the timesteps 1, 1 + T // N, 1 + 2 (T // N), ..., up to T, of which there may be more than N.

    A row goes from a timestep to the one before. None goes on from the first, so that N timesteps make N - 1 calls, and
    the run ends at the level of timestep 1. A run from an image starts at the level of the t-th timestep, where t + 1
    steps run, and its first call is at the timestep below.
    """
    alpha_bar, total = schedule.alphas_cumprod, schedule.config.num_train_timesteps
    times = [min(t + 1, total - 1) for t in range(0, total, total // schedule.num_inference_steps)]
    top = len(times) - 1
    first = max(min(schedule.num_inference_steps - schedule.start - 2, top), 1) if schedule.start else top
    builder = TableBuilder(mix=vp_level(alpha_bar[times[min(first + 1, top)]]))
    for i, at in enumerate(range(first, 0, -1)):
        A, P = alpha_bar[times[at]], alpha_bar[times[at - 1]]
        builder.add(ddim_row(schedule, times[at], schedule.start + i, A, P, vp_level(P)))
    return builder.table()
