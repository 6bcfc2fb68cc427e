"""A sampler's table: one row of coefficients for each call of the network.

    if save: saved = x
    D  = p x + q F(c_in x, t)                       F: the network's output after guidance
    x' = a x + s saved + b0 D + b1 H1 + b2 H2 + b3 H3 + n z_i + m z_(i-1)
    if push: (H1, H2, H3) = (D, H1, H2)

z_i is the fresh noise of row i, z_(i-1) that of the row before. The saved latent and the history start at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fastsd.errors import FastsdError
from fastsd.sampling.schedule import Float64

COLUMNS = ("t", "c_in", "p", "q", "a", "s", "b0", "b1", "b2", "b3", "n", "m")


@dataclass(frozen=True)
class TableRow:
    """One call of the network and the update after it. `b`: the weights of D, H1, H2, H3; missing ones are 0."""

    t: float
    prediction: tuple[float, float]  # (p, q)
    step: int  # the user's step that it belongs to
    keep: tuple[float, float]  # (signal, noise) after this row, see Table.keep
    c_in: float = 1.0
    a: float = 0.0
    s: float = 0.0
    b: Sequence[float] = ()
    n: float = 0.0
    m: float = 0.0
    save: bool = False
    push: bool = True
    draw: bool = False


@dataclass(frozen=True)
class Table:
    """A sampler for one schedule: everything that does not depend on the latent. Arrays are on the host.

    Attributes:
        rows: `[R, 12]` float64, with the columns `COLUMNS`.
        save, push: `[R]` bool, see above.
        draw: `[R]` bool, whether a row needs fresh noise.
        keep: `[R, 2]` float64. Inpainting restores the known part after row i to `keep[i, 0] * image + keep[i, 1] *
            noise`, as diffusers' pipeline does. It is (1, 0) in the last row.
        step: `[R]` int, the user's step, 0 to N - 1, that a row belongs to.
        init: the run starts from `init * noise`.
        mix: with an image, it starts from `mix[0] * image + mix[1] * noise`.
    """

    rows: Float64
    save: NDArray[np.bool_]
    push: NDArray[np.bool_]
    draw: NDArray[np.bool_]
    keep: Float64
    step: NDArray[np.int64]
    init: float
    mix: tuple[float, float]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> int:
        """The number of the user's steps that run."""
        return int(self.step[-1] - self.step[0]) + 1 if len(self) else 0

    def without_rows(self) -> Table:
        """A table that changes nothing: with an image, the run starts and ends at that image."""
        per_row = ("rows", "save", "push", "draw", "keep", "step")
        return replace(self, **{name: getattr(self, name)[:0] for name in per_row}, mix=(1.0, 0.0))

    @property
    def timesteps(self) -> Float64:
        """The timestep of each row's network call, `[R]`."""
        return self.rows[:, 0]

    def rows_within(self, start: float, end: float) -> frozenset[int]:
        """The rows of the steps that lie within two shares of the steps that run: step i of n does where i / n is at
        least `start` and (i + 1) / n at most `end`."""
        return frozenset(
            row
            for row, step in enumerate(self.step - self.step[:1])
            if step / self.steps >= start and (step + 1) / self.steps <= end
        )


@dataclass
class TableBuilder:
    """Collects rows. init, mix: as in `Table`."""

    mix: tuple[float, float]
    init: float = 1.0
    rows: list[TableRow] = field(default_factory=list)

    def add(self, row: TableRow) -> None:
        self.rows.append(row)

    def table(self) -> Table:
        """The finished table. The last row ends at the clean image, so its `keep` is (1, 0).

        Raises:
            FastsdError: there is no row, as DDIM of A1111 has none for one step; or a coefficient is not finite: the
                prediction type does not work at one of the noise levels, or two steps coincide.
        """
        if not self.rows:
            raise FastsdError(
                "the sampler calls the network in none of so few steps; take more", argument="num_inference_steps"
            )
        flat = [(r.t, r.c_in, *r.prediction, r.a, r.s, *r.b, *(0.0,) * (4 - len(r.b)), r.n, r.m) for r in self.rows]
        keep = [r.keep for r in self.rows[:-1]] + [(1.0, 0.0)]
        table = Table(
            rows=np.array(flat, dtype=np.float64),
            save=np.array([r.save for r in self.rows]),
            push=np.array([r.push for r in self.rows]),
            draw=np.array([r.draw for r in self.rows]),
            keep=np.array(keep, dtype=np.float64),
            step=np.array([r.step for r in self.rows]),
            init=float(self.init),
            mix=self.mix,
        )
        if not (np.isfinite(table.rows).all() and np.isfinite(table.keep).all() and math.isfinite(table.init)):
            raise FastsdError(
                "the schedule has no finite coefficients for this many steps; take fewer",
                argument="num_inference_steps",
            )
        return table


def vp_level(alpha_bar: float) -> tuple[float, float]:
    """Variance-preserving: (signal, noise) = (sqrt(alpha_bar), sqrt(1 - alpha_bar))."""
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def vp_level_of_sigma(sigma: float) -> tuple[float, float]:
    """Variance-preserving: (signal, noise) with noise / signal = `sigma`."""
    signal = 1 / math.sqrt(1 + sigma * sigma)
    return signal, sigma * signal


def vp_prediction(prediction_type: str, signal: float, noise: float) -> tuple[float, float]:
    """(p, q) that make D = p x + q F the clean image, for a latent x = signal * image + noise * z.

    epsilon: Ho et al. 2020, equation 15. v: Salimans and Ho 2022, appendix D. sample: F is the image.
    """
    if prediction_type == "epsilon":
        if signal == 0:
            raise FastsdError(
                "epsilon cannot start from zero terminal SNR, where the input is all noise; "
                "use timestep_spacing leading, or a model with v_prediction",
                argument="prediction_type",
            )
        return 1 / signal, -noise / signal
    if prediction_type == "v_prediction":
        return signal, -noise
    if prediction_type == "sample":
        return 0.0, 1.0
    raise FastsdError(
        f"{prediction_type!r} is unknown; use epsilon, v_prediction or sample", argument="prediction_type"
    )


def noise_prediction(prediction_type: str, signal: float, noise: float) -> tuple[float, float]:
    """(p, q) that make D = p x + q F the noise z, for a latent x = signal * image + noise * z."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    p, q = vp_prediction(prediction_type, signal, noise)
    return (1 - signal * p) / noise, -signal * q / noise


def karras_prediction(prediction_type: str, sigma: float) -> tuple[float, float]:
    """(p, q) that make D = p x + q F the clean image, for x = image + sigma * z (Karras et al. 2022, table 1)."""
    signal = 1 / math.sqrt(1 + sigma * sigma)
    p, q = vp_prediction(prediction_type, signal, sigma * signal)
    return p * signal, q  # the variance-preserving latent is signal * x


def karras_c_in(sigma: float) -> float:
    """The factor from x = image + sigma * z to the variance-preserving latent, which is the network's input."""
    return 1 / math.sqrt(1 + sigma * sigma)
