"""The rows as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fastsd.verify.rule import Row

TITLES = {
    "op": "ops, against their specification in float64",
    "interpreter": "Triton kernels in the interpreter, at small shapes",
    "layer": "layers, against their specification in float64",
    "module": "networks, against their specification",
    "image": "picture, in grey levels against fp32",
    "graphs": "CUDA graphs",
}
COLUMNS = ("error", "allowed", "torch's", "ms", "torch's")


def title(level: str) -> str:
    """The heading of a level's rows."""
    return f"{TITLES[level]}\n{_columns('', '', 'shape', 'backend', 'calls', *COLUMNS)}"


def line(row: Row) -> str:
    """One row of the table."""
    verdict = {True: "pass", False: "FAIL", None: " -- "}[row.passed]
    numbers = [_number(x, ".2e") for x in (row.error, row.allowed, row.torch_error)]
    numbers += [_number(None if x is None else 1000 * x, ".3f") for x in (row.seconds, row.torch_seconds)]
    text = _columns(verdict, row.name, row.shape, row.backend, str(row.calls), *numbers)
    return f"{text}  {row.note}".rstrip()


def _columns(verdict: str, name: str, shape: str, backend: str, calls: str, *numbers: str) -> str:
    return f"{verdict:4}  {name:55} {shape:36} {backend:9} {calls:>5} " + " ".join(f"{n:>9}" for n in numbers)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(rows: list[Row]) -> str:
    """How many passed, failed and were not judged."""
    counts = [sum(row.passed is verdict for row in rows) for verdict in (True, False, None)]
    return f"{counts[0]} passed, {counts[1]} failed, {counts[2]} not judged"


def to_json(setting: dict[str, Any], rows: list[Row]) -> str:
    """Everything, for programs."""
    passed = not any(row.passed is False for row in rows)
    return json.dumps({**setting, "passed": passed, "rows": [asdict(row) for row in rows]}, indent=2)
