"""DPM-Solver and DPM-Solver++, multistep and singlestep, on the ODE and the SDE (Lu et al. 2022a, 2022b).

Notation: x = alpha * image + sigma * z with alpha^2 + sigma^2 = 1, and lambda = log(alpha / sigma), which increases by
h over a row's interval. DPM-Solver++ integrates D, the clean image, over lambda; DPM-Solver integrates the noise. Order
1 takes it as constant, order 2 as a line through two points, order 3 as a parabola through three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastsd.errors import FastsdError
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import (
    Table,
    TableBuilder,
    TableRow,
    noise_prediction,
    vp_level_of_sigma,
    vp_prediction,
)

ODE, SDE = ("dpmsolver++", "dpmsolver"), ("sde-dpmsolver++", "sde-dpmsolver")  # algorithms; the first is the usual one
FEW = 15  # with fewer steps, `lower_order_final` lowers the order of the last ones


def dpmpp_2m(schedule: Schedule) -> Table:
    """Multistep (Lu et al. 2022b, algorithm 2), of second order unless the checkpoint states another."""
    return _multistep(_Solver.of(schedule, ODE))


def dpmpp_2m_sde(schedule: Schedule) -> Table:
    """The same on the reverse SDE (Lu et al. 2022b, section 5, SDE-DPM-Solver++(2M)). Every row draws noise."""
    return _multistep(_Solver.of(schedule, SDE))


def dpmpp_2s(schedule: Schedule) -> Table:
    """Singlestep (Lu et al. 2022b, algorithm 1): groups of as many rows as the order.

    The first row of a group is first order and saves its latent. Each later one starts from the saved latent again,
    with a D more: the inner points of the group's interval are the levels between its steps. Timesteps are even,
    whatever the config says, as in diffusers' singlestep scheduler.
    """
    solver = _Solver.of(schedule, (*ODE, SDE[0]), linspace=True)
    orders = _singlestep_orders(solver)
    builder = TableBuilder(mix=vp_level_of_sigma(solver.sigmas[schedule.start]))
    for i in range(schedule.start, len(solver.times)):
        order = min(orders[i], i - schedule.start + 1)
        begin = i - order + 1
        way = solver.integral(solver.sigmas[begin], solver.sigmas[i + 1])
        first = order == 1
        solver.add(builder, i, way, a=way.x if first else 0.0, s=0.0 if first else way.x, b=solver.inner(way, begin, i))
    return builder.table()


@dataclass(frozen=True)
class _Integral:
    """x' = x-weight x + d0 D + d1 D' + d2 D'' + noise z, with derivatives in the share of the interval."""

    x: float
    d0: float
    d1: float
    d2: float
    noise: float


@dataclass(frozen=True)
class _Solver:
    """The levels of a run and the checkpoint's choice of method."""

    schedule: Schedule
    times: list[float]
    sigmas: list[float]
    algorithm: str
    order: int
    heun: bool

    @classmethod
    def of(cls, schedule: Schedule, algorithms: tuple[str, ...], linspace: bool = False) -> _Solver:
        """Read the options. A stated algorithm counts if it is one of these; else the first does."""
        times, sigmas = schedule.solver_levels(linspace=linspace)
        stated = schedule.option("algorithm_type", algorithms[0])
        algorithm = stated if stated in algorithms else algorithms[0]
        if not algorithm.endswith("++") and sigmas[-1] == 0:
            raise FastsdError(
                f"{algorithm} integrates the noise, so it needs final_sigmas_type sigma_min", argument="sampler"
            )
        order = schedule.option("solver_order", 2)
        heun = schedule.option("solver_type", "midpoint") == "heun"
        return cls(schedule, times, sigmas, algorithm, order, heun)

    def integral(self, sigma: float, sigma_next: float) -> _Integral:
        """The exact solution's weights. With s = alpha' and u = -h for the image, s = sigma' and u = h for the noise
        (on the SDE 2 h for the image, 2 sigma' for the noise): d0 = -s (e^u - 1), and so on.

        d1 is the "midpoint" form's in order 2, d0 / 2, or the "heun" form's, -s ((e^u - 1) / u - 1).
        """
        h = _lambda_gap(sigma, sigma_next)
        (alpha, noise), (alpha_next, noise_next) = vp_level_of_sigma(sigma), vp_level_of_sigma(sigma_next)
        image, sde = self.algorithm.endswith("++"), self.algorithm.startswith("sde")
        if image:
            s, u = alpha_next, -h * (1 + sde)
            x = noise_next / noise * (math.exp(-h) if sde else 1.0)
            z = noise_next * math.sqrt(-math.expm1(-2 * h)) if sde else 0.0
        else:
            s, u = noise_next * (1 + sde), h
            x = alpha_next / alpha
            z = noise_next * math.sqrt(math.expm1(2 * h)) if sde else 0.0
        d0 = -s * math.expm1(u)
        if not math.isfinite(u) or u == 0:  # the step to the clean image, or no step: of first order
            return _Integral(x, d0, 0.0, 0.0, z)
        d1 = -s * (math.expm1(u) / u - 1)
        # In diffusers the last 1/2 has this sign on the SDE, unlike in k-diffusion's `sample_dpmpp_3m_sde`.
        d2 = -s * ((math.expm1(u) - u) / u**2 + (0.5 if sde else -0.5))
        return _Integral(x, d0, d1, d2, z)

    def older(self, way: _Integral, i: int, order: int) -> list[float]:
        """Multistep: the weights of D, H1, H2 in row i, through points before the interval."""
        gap = _lambda_gap(self.sigmas[i], self.sigmas[i + 1])
        if order == 1 or gap == 0:
            return [way.d0]
        r0 = _lambda_gap(self.sigmas[i - 1], self.sigmas[i]) / gap
        if order == 2:
            slope = (way.d1 if self.heun else way.d0 / 2) / r0
            return [way.d0 + slope, -slope]
        r1 = _lambda_gap(self.sigmas[i - 2], self.sigmas[i - 1]) / gap
        # first = (m0 - m1) / r0, second = (m1 - m2) / r1; D' and D'' in terms of them
        first = way.d1 * (1 + r0 / (r0 + r1)) + way.d2 / (r0 + r1)
        second = -way.d1 * r0 / (r0 + r1) - way.d2 / (r0 + r1)
        return [way.d0 + first / r0, -first / r0 + second / r1, -second / r1]

    def inner(self, way: _Integral, begin: int, i: int) -> list[float]:
        """Singlestep: the weights of D, H1, H2 in row i, whose group began at `begin`, through the group's points."""
        if i == begin:
            return [way.d0]
        h = _lambda_gap(self.sigmas[begin], self.sigmas[i + 1])
        r0 = _lambda_gap(self.sigmas[begin], self.sigmas[i]) / h
        if i == begin + 1:
            slope = (way.d1 if self.heun else way.d0 / 2) / r0
            return [slope, way.d0 - slope]
        r1 = _lambda_gap(self.sigmas[begin], self.sigmas[begin + 1]) / h
        newest, middle = way.d1, 0.0  # of (m0 - m2) / r0 and (m1 - m2) / r1
        if self.heun:
            newest = (2 * way.d2 - r1 * way.d1) / (r0 - r1)
            middle = (r0 * way.d1 - 2 * way.d2) / (r0 - r1)
        return [newest / r0, middle / r1, way.d0 - newest / r0 - middle / r1]

    def add(self, builder: TableBuilder, i: int, way: _Integral, *, a: float, s: float = 0.0, b: list[float]) -> None:
        """Row i; it saves its latent unless it starts from the saved one."""
        predict = vp_prediction if self.algorithm.endswith("++") else noise_prediction
        builder.add(
            TableRow(
                t=self.times[i],
                prediction=predict(self.schedule.config.prediction_type, *vp_level_of_sigma(self.sigmas[i])),
                a=a,
                s=s,
                b=b,
                n=way.noise,
                save=s == 0.0,
                draw=self.algorithm.startswith("sde"),
                step=i,
                keep=vp_level_of_sigma(self.sigmas[i + 1]),
            )
        )


def _multistep(solver: _Solver) -> Table:
    schedule, count = solver.schedule, len(solver.times)
    # At levels of k-diffusion's kind only the step to 0 has a lower order, as there; they end above 0 in KL Optimal.
    few = schedule.option("lower_order_final", True) and count < FEW and schedule.given is None
    at_final = few or schedule.option("euler_at_final", False) or solver.sigmas[-1] == 0
    if solver.order > 2 and solver.algorithm == "sde-dpmsolver":
        raise FastsdError("sde-dpmsolver has solver_order 1 or 2", argument="sampler")
    builder = TableBuilder(mix=vp_level_of_sigma(solver.sigmas[schedule.start]))
    for i in range(schedule.start, count):
        order = min(solver.order, i - schedule.start + 1)
        if i == count - 1 and at_final:
            order = 1
        elif i == count - 2 and few:
            order = min(order, 2)
        way = solver.integral(solver.sigmas[i], solver.sigmas[i + 1])
        solver.add(builder, i, way, a=way.x, b=solver.older(way, i, order))
    return builder.table()


def _singlestep_orders(solver: _Solver) -> list[int]:
    """The order of each step: 1 to the solver's, again and again; the last are lower (`lower_order_final`)."""
    steps, order, zero = len(solver.times), solver.order, solver.sigmas[-1] == 0
    lower = zero or steps % order != 0 or solver.schedule.option("lower_order_final", False)
    whole, rest = divmod(steps, order)
    group = list(range(1, order + 1))
    if not lower or order == 1:
        orders = group * whole
    elif rest == 0:
        orders = group * (whole - 1) + (group[:-1] if order > 2 else [1]) + [1]
    else:
        orders = group * whole + group[:rest]
    return [*orders[:-1], 1] if zero else orders


def _lambda_gap(sigma: float, sigma_next: float) -> float:
    """h = lambda' - lambda for sigmas in noise per unit of signal; infinite for sigma' = 0."""
    return math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
