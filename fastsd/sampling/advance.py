"""The sampler's state on the device, and the one update that runs every table.

state = begin(table, noise)
while not state.done:
    out = unet(model_input(state), timestep(state), ...)
    step(state, out, guidance_scale=7.5, noise_i=sample_noise() if draws_noise(state) else None)
latent = state.x
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastsd.kernels import advance as op
from fastsd.sampling.table import Table

BUFFERS = ("x", "x_in", "saved", "history", "noise", "row")


@dataclass
class SamplerState:
    """Buffers of one run, updated in place and never replaced, since a captured graph refers to them.

    Attributes:
        host_table: the sampler's table.
        x: the latent `[N, h, w, C]` fp32, or float64 if the noise was; at the noise level after the last finished row.
        x_in: c_in * x, the network's input.
        saved, history, noise: `[N, h, w, C]`, `[3, N, h, w, C]` and `[2, N, h, w, C]`; see `fastsd.kernels.advance`.
        table: `[R + 1, 16]`, the table on the device.
        row: `[1]` int64 on the device, the current row.
        index: the same on the host.
    """

    host_table: Table
    x: torch.Tensor
    x_in: torch.Tensor
    saved: torch.Tensor
    history: torch.Tensor
    noise: torch.Tensor
    table: torch.Tensor
    row: torch.Tensor
    index: int = 0

    def operands(self) -> dict[str, torch.Tensor]:
        """The tensors that `fastsd.kernels.advance.advance` reads and writes."""
        return {name: getattr(self, name) for name in (*BUFFERS, "table")}

    def copy(self, rows: int = 0) -> SamplerState:
        """A copy in new buffers, with the table padded to at least `rows`."""
        table = self.table.new_zeros(max(rows, len(self.table)), op.WIDTH)
        table[: len(self.table)].copy_(self.table)
        buffers = {name: getattr(self, name).clone() for name in BUFFERS}
        return replace(self, table=table, **buffers)

    def load(self, other: SamplerState) -> None:
        """Copy the contents of `other`, whose table may be shorter."""
        self.table[: len(other.table)].copy_(other.table)
        for name in BUFFERS:
            getattr(self, name).copy_(getattr(other, name))

    @property
    def done(self) -> bool:
        """Whether every row has run."""
        return self.index == len(self.host_table)


def begin(table: Table, noise: torch.Tensor, image: torch.Tensor | None = None) -> SamplerState:
    """The state before the first row: `init * noise`, or `mix[0] * image + mix[1] * noise` from an image.

    Args:
        table: the sampler's.
        noise: `[N, h, w, C]`, unit variance. It determines the state's device and dtype: float64 stays, any other dtype
            becomes fp32.
        image: the scaled latent of an image, broadcast to the shape of `noise`.

    Raises:
        ValueError: `noise` does not have four dimensions.
    """
    if noise.ndim != 4:
        raise ValueError(f"noise is {list(noise.shape)}; it needs four dimensions, [N, h, w, C]")
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    noise = noise.to(dtype)
    if image is None:
        x = table.init * noise
    else:
        x = table.mix[0] * image.to(noise).expand_as(noise) + table.mix[1] * noise
    coefficients = _device_table(table).to(noise)
    return SamplerState(
        host_table=table,
        x=x,
        x_in=coefficients[0, 1] * x,
        saved=torch.zeros_like(x),
        history=x.new_zeros(3, *x.shape),
        noise=x.new_zeros(2, *x.shape),
        table=coefficients,
        row=torch.zeros(1, dtype=torch.int64, device=x.device),
    )


def model_input(state: SamplerState) -> torch.Tensor:
    """The network's input in the current row, `c_in * x` `[N, h, w, C]`, in the dtype of the state.

    It is a buffer that `step` and `restore_known` update; code that writes to `state.x` must update it too.
    """
    return state.x_in


def timestep(state: SamplerState) -> float:
    """The timestep of the network call in the current row; not always a whole number."""
    return float(state.host_table.rows[state.index, 0])


def draws_noise(state: SamplerState) -> bool:
    """Whether the current row needs fresh noise."""
    return bool(state.host_table.draw[state.index])


@torch.no_grad()
def step(
    state: SamplerState,
    out: torch.Tensor,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise_i: torch.Tensor | None = None,
) -> None:
    """Finish the current row with the network's output and go to the next.

    Args:
        state: updated in place.
        out: `[N, h, w, C]`, or with guidance `[2N, h, w, C]`, the unconditional half first.
        guidance_scale: of classifier-free guidance, for `2N` outputs.
        guidance_rescale: the share by which the guided output gets the conditional half's standard deviation (Lin et
            al. 2024, section 3.4).
        noise_i: `[N, h, w, C]` noise of unit variance; required where `draws_noise(state)`.

    Raises:
        ValueError: the run is done, noise is missing, or a shape does not fit.
    """
    if state.done:
        raise ValueError("every row of the table has run")
    if draws_noise(state):
        if noise_i is None:
            raise ValueError(f"row {state.index} draws noise; pass noise_i")
        state.noise[0].copy_(noise_i)
    rescale = None
    if guidance_rescale > 0 and len(out) == 2 * len(state.x):
        rescale = op.guidance_rescale(out, guidance_scale, guidance_rescale)
    op.advance(out=out, guidance=guidance_scale, rescale=rescale, **state.operands())
    state.row += 1
    state.index += 1


@torch.no_grad()
def restore_known(state: SamplerState, image: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> None:
    """Restore the known image outside the mask, at the last row's noise level: inpainting with an ordinary model.

    x = mask * x + (1 - mask) * (keep[0] * image + keep[1] * noise), and the model input likewise. Call it after `step`.

    Args:
        state: updated in place.
        image, noise: `[N, h, w, C]`, the scaled latent and the noise that the run started from.
        mask: `[N, h, w, 1]`, 1 where content is new. All three broadcast.

    Raises:
        ValueError: no row has run yet.
    """
    if state.index == 0:
        raise ValueError("call restore_known after step: no row has run yet")
    signal, sigma = (float(value) for value in state.host_table.keep[state.index - 1])
    known = signal * image.to(state.x) + sigma * noise.to(state.x)
    mask = mask.to(state.x)
    state.x.copy_(mask * state.x + (1 - mask) * known)
    state.x_in.copy_(state.table[state.index, 1] * state.x)


def _device_table(table: Table) -> torch.Tensor:
    """`[R + 1, 16]` float64: rows, flags and two zeros. An added last row has c_in 1, for the finished latent."""
    full = torch.zeros(len(table) + 1, op.WIDTH, dtype=torch.float64, device="cpu")
    full[:-1, :12] = torch.from_numpy(table.rows)
    full[:-1, 12] = torch.from_numpy(table.save)
    full[:-1, 13] = torch.from_numpy(table.push)
    full[-1, 1] = 1.0
    return full
