"""Noise levels as k-diffusion spaces them, which A1111 and ComfyUI follow, where diffusers' schedulers differ.

N timesteps are even from the last to the first, and the noise levels between training timesteps are interpolated in
log sigma (k_diffusion/external.py, `DiscreteSchedule.get_sigmas` and `t_to_sigma`). Every sampler takes the same
levels, and the network gets timesteps that are not whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fastsd.sampling.levels import LEVELS, RAMPS, at_times, normal
from fastsd.sampling.schedule import Float64, Schedule
from fastsd.sampling.table import Table


@dataclass(frozen=True)
class KLevels:
    """How a program makes noise levels of a schedule by name.

    Attributes:
        nearest: timesteps are the nearest training timesteps, as in ComfyUI (comfy/model_sampling.py,
            `ModelSamplingDiscrete.timestep`), else they lie between.
        discards: samplers that take one level more and leave out the last but one.
        leaves: samplers that have levels of their own.
        names: what a schedule's name stands for there.
        tables: samplers with steps of their own, and what makes their tables.
    """

    nearest: bool = False
    discards: Collection[str] = ()
    leaves: Collection[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Callable[[Schedule], Table]] = field(default_factory=dict)

    def spacing(self, sampler: str) -> str:
        """The spacing that stands for these levels."""
        return "leading" if sampler in self.tables else "linspace"

    def of(self, schedule: Schedule, sampler: str, xl: bool) -> tuple[list[float], list[float]] | None:
        """Timesteps and sigmas, and the sigma after the last step; None: the schedule's own.

        Args:
            schedule, sampler: of the run.
            xl: the model is of SDXL's family.
        """
        if sampler in self.leaves:
            return None
        name = self.names.get(schedule.schedule, schedule.schedule)
        steps, discards = schedule.num_inference_steps, sampler in self.discards
        sigmas = _levels(name, schedule.sigmas, steps + discards, xl)
        if discards:
            del sigmas[-2]
        return self._times(schedule, np.array(sigmas[:-1])).tolist(), sigmas

    def _times(self, schedule: Schedule, sigmas: Float64) -> Float64:
        if not self.nearest or schedule.config.edm is not None:
            return schedule.timestep_of(sigmas)
        gaps = np.abs(np.log(sigmas)[:, None] - np.log(schedule.sigmas)[None])
        return gaps.argmin(axis=1).astype(np.float64)


def _levels(name: str, sigmas: Float64, steps: int, xl: bool) -> list[float]:
    """The sigmas of a schedule by its name in `fastsd.sampling.samplers.SCHEDULES`, and the one after the last step.

    A ramp stretches between the first and the last of the training `sigmas`; "default" is `normal`.
    """
    if name in RAMPS:
        return [*RAMPS[name](sigmas[-1], sigmas[0], steps).tolist(), 0.0]
    if name == "sgm_uniform":
        return [*at_times(sigmas, np.linspace(len(sigmas) - 1, 0, steps + 1)[:-1]).tolist(), 0.0]
    return (normal if name == "default" else LEVELS[name])(sigmas, steps, xl)
