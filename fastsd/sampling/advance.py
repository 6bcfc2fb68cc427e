"""The sampler's state on the device, and the one update that runs every table.

state = begin(table, noise)
while not state.done:
    out = unet(model_input(state), timestep(state), ...)
    step(state, out, guidance_scale=7.5, noise_i=draw() if draws(state) else None)
latent = state.x
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastsd.kernels import advance as op
from fastsd.sampling.table import Table

BUFFERS = ("x", "x_in", "saved", "history", "noise", "row")


@dataclass
class State:
    """Buffers of one run. They are changed in place and never replaced, so that a captured graph can hold them.

    x: the latent `[N, h, w, C]` fp32 (float64 if the noise was), at the level that the table's last finished row
    left. x_in: c_in * x, what the network is called with. saved `[N, h, w, C]`, history `[3, N, h, w, C]`, noise `[2,
    N, h, w, C]` and table `[R + 1, 16]`: see `fastsd.kernels.advance`. row: `[1]` int64 on the device. index: the
    same on the host.
    """

    plan: Table
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

    def copy(self, rows: int = 0) -> State:
        """The same state in buffers of its own, the table padded to at least `rows`."""
        table = self.table.new_zeros(max(rows, len(self.table)), op.WIDTH)
        table[: len(self.table)].copy_(self.table)
        buffers = {name: getattr(self, name).clone() for name in BUFFERS}
        return replace(self, table=table, **buffers)

    def load(self, other: State) -> None:
        """Take over the contents of `other`, whose table may be shorter."""
        self.table[: len(other.table)].copy_(other.table)
        for name in BUFFERS:
            getattr(self, name).copy_(getattr(other, name))

    @property
    def done(self) -> bool:
        """Whether every row has run."""
        return self.index == len(self.plan)


def begin(table: Table, noise: torch.Tensor, image: torch.Tensor | None = None) -> State:
    """The state before the first row: `init * noise`, or `mix[0] * image + mix[1] * noise` from an image.

    noise: `[N, h, w, C]`, unit variance; its device is the run's, its dtype fp32 or float64 the state's (anything
    narrower is widened to fp32). image: the scaled latent of the image, broadcast to that shape.

    Raises:
        ValueError: `noise` has not four dimensions.
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
    return State(
        plan=table,
        x=x,
        x_in=coefficients[0, 1] * x,
        saved=torch.zeros_like(x),
        history=x.new_zeros(3, *x.shape),
        noise=x.new_zeros(2, *x.shape),
        table=coefficients,
        row=torch.zeros(1, dtype=torch.int64, device=x.device),
    )


def model_input(state: State) -> torch.Tensor:
    """What the network is called with in the current row, `c_in * x` `[N, h, w, C]` in the dtype of the state.

    It is a buffer of the state that `step` and `hold` rewrite; whoever writes to `state.x` directly has to do so too.
    """
    return state.x_in


def timestep(state: State) -> float:
    """The timestep at which the network is called in the current row; not always whole."""
    return float(state.plan.rows[state.index, 0])


def draws(state: State) -> bool:
    """Whether the current row takes fresh noise."""
    return bool(state.plan.draw[state.index])


@torch.no_grad()
def step(
    state: State,
    out: torch.Tensor,
    guidance_scale: float | torch.Tensor = 1.0,
    guidance_rescale: float = 0.0,
    noise_i: torch.Tensor | None = None,
) -> None:
    """Finish the current row with the network's output and go to the next.

    out: `[N, h, w, C]`, or `[2N, h, w, C]` with the unconditional half first; then guided by `guidance_scale` and
    taken back to the conditional half's spread by the share `guidance_rescale` (Lin et al. 2024, section 3.4).
    noise_i: `[N, h, w, C]` unit-variance noise, needed where `draws(state)`.

    Raises:
        ValueError: the run is done, noise is missing, or a shape does not fit.
    """
    if state.done:
        raise ValueError("every row of the table has run")
    if draws(state):
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
def hold(state: State, image: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> None:
    """Put the known image, at the level the last row left, back outside the mask (inpainting with an ordinary model).

    x = mask * x + (1 - mask) * (keep[0] * image + keep[1] * noise), and the model input follows. Call it after
    `step`. image, noise: `[N, h, w, C]`, the scaled latent and the noise that the run began with. mask: `[N, h, w,
    1]`, 1 where new content goes. All broadcast.

    Raises:
        ValueError: no row has run yet.
    """
    if state.index == 0:
        raise ValueError("hold comes after step: no row has run yet")
    signal, sigma = (float(value) for value in state.plan.keep[state.index - 1])
    known = signal * image.to(state.x) + sigma * noise.to(state.x)
    mask = mask.to(state.x)
    state.x.copy_(mask * state.x + (1 - mask) * known)
    state.x_in.copy_(state.table[state.index, 1] * state.x)


def _device_table(table: Table) -> torch.Tensor:
    """`[R + 1, 16]` float64: rows, flags and two zeros; the last row scales the finished latent by 1."""
    full = torch.zeros(len(table) + 1, op.WIDTH, dtype=torch.float64)
    full[:-1, :12] = torch.from_numpy(table.rows)
    full[:-1, 12] = torch.from_numpy(table.save)
    full[:-1, 13] = torch.from_numpy(table.push)
    full[-1, 1] = 1.0
    return full
