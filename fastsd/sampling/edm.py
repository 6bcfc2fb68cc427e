"""Tables of models in Karras et al. 2022's own terms, made from those of a model that predicts v.

A model that predicts v in the variance-preserving process is the case sigma_data = 1: D = x / (sigma^2 + 1) - sigma /
sqrt(sigma^2 + 1) F. Every sampler's table holds D, or a sum of x and D, as p x + q F; so p, q and c_in are all that
another preconditioning changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastsd.config import EDMConfig
from fastsd.sampling.schedule import Schedule
from fastsd.sampling.table import COLUMNS, Table

_C_IN, _P, _Q, _A = (COLUMNS.index(name) for name in ("c_in", "p", "q", "a"))


def precondition(edm: EDMConfig, prediction_type: str, sigma: float) -> tuple[float, float, float]:
    """(c_in, c_skip, c_out) for x = image + sigma z (Karras et al. 2022, table 1): D = c_skip x + c_out F(c_in x).

    With s = sigma_data: c_in = 1 / sqrt(sigma^2 + s^2), c_skip = s^2 c_in^2, c_out = sigma s c_in; -c_out where F is v.
    """
    c_in = 1 / math.sqrt(sigma**2 + edm.sigma_data**2)
    c_out = sigma * edm.sigma_data * c_in
    return c_in, (edm.sigma_data * c_in) ** 2, -c_out if prediction_type == "v_prediction" else c_out


def of_v(make: Callable[[Schedule], Table]) -> Callable[[Schedule], Table]:
    """The sampler `make` for schedules whose config has `edm`."""

    def make_edm(schedule: Schedule) -> Table:
        as_v = replace(schedule, config=replace(schedule.config, prediction_type="v_prediction"))
        return _converted(make(as_v), schedule)

    return make_edm


def _converted(table: Table, schedule: Schedule) -> Table:
    """The table of an EDM model, from that of a model which predicts v at the same levels.

    In a variance-preserving table the latent is x / sqrt(sigma^2 + 1); a run that ends above noise 0 is scaled back.
    """
    edm, rows, preserving = schedule.config.edm, table.rows.copy(), False
    assert edm is not None
    for row in rows:
        sigma = math.exp(4 * row[0])
        root = math.sqrt(sigma**2 + 1)
        preserving = row[_C_IN] == 1
        scale = root if preserving else 1.0  # from the table's latent to image + sigma z
        share = row[_Q] / (-sigma / root)  # of D in the row's p x + q F
        rest = row[_P] - share * scale / root**2
        c_in, c_skip, c_out = precondition(edm, schedule.config.prediction_type, sigma)
        row[_C_IN], row[_P], row[_Q] = c_in * scale, rest + share * c_skip * scale, share * c_out
    if preserving:
        last = schedule.last_sigma if schedule.given is None else schedule.given[1][-1]
        rows[-1, _A:] *= math.sqrt(last**2 + 1)
    return replace(table, rows=np.ascontiguousarray(rows))
