"""diffusers' `callback_on_step_end`: a function of the caller that sees, and may replace, the latents of each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastsd.errors import FastsdError
from fastsd.generate.batch import Batch, Estimate
from fastsd.parameters import Settings

TENSORS = ("latents",)
NAME = "callback_on_step_end"


@dataclass(frozen=True)
class StepCallback:
    """The function, and the names of the tensors that it is given."""

    function: Callable[..., Any]
    tensors: tuple[str, ...]

    @classmethod
    def of(cls, settings: Settings) -> StepCallback | None:
        """The callback of a call, or None.

        Raises:
            FastsdError: it asks for a tensor that there is not.
        """
        names = settings.callback_on_step_end_tensor_inputs
        if not isinstance(names, list | tuple) or not set(names) <= set(TENSORS):
            raise FastsdError(f"a list of {', '.join(TENSORS)} is what there is", argument=f"{NAME}_tensor_inputs")
        if settings.callback_on_step_end is None:
            return None
        return cls(settings.callback_on_step_end, tuple(names))

    def __call__(self, pipe: Any, batch: Batch, row: int, estimate: Estimate) -> None:
        """Call it after the row that ends a step, with latents `[n, C, h, w]` fp32; what it returns replaces them."""
        state = batch.inputs.state
        given = {"latents": state.x.permute(0, 3, 1, 2).clone()} if self.tensors else {}
        steps = state.host_table.step
        time = torch.tensor(estimate.timestep, dtype=torch.float32, device=state.x.device)
        returned = self.function(pipe, int(steps[row] - steps[0]), time, given)
        if returned is None:
            return
        if not isinstance(returned, dict) or not set(returned) <= set(self.tensors):
            raise FastsdError(f"it should return a dict with {', '.join(self.tensors) or 'nothing'}", argument=NAME)
        latents = returned.get("latents", given.get("latents"))
        if latents is None:
            return
        shape = tuple(state.x.permute(0, 3, 1, 2).shape)
        if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape or latents.is_complex():
            raise FastsdError(f"its latents should be a tensor of real numbers, shape {list(shape)}", argument=NAME)
        batch.replace_latents(latents.permute(0, 2, 3, 1))
