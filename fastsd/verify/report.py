"""The results as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fastsd.kernels.choice.rule import CheckResult

TITLES = {
    "op": "ops, against their specification in float64",
    "interpreter": "Triton kernels in the interpreter, at small shapes",
    "layer": "layers, against their specification in float64",
    "module": "networks, against their specification",
    "image": "image, in grey levels, against fp32",
    "graphs": "CUDA graphs",
}
COLUMNS = ("error", "allowed", "torch's", "ms", "torch's")


def title(level: str) -> str:
    """The heading of a level."""
    return f"{TITLES[level]}\n{_columns('', '', 'shape', 'backend', 'calls', *COLUMNS)}"


def line(result: CheckResult) -> str:
    """One row of the table."""
    verdict = {True: "pass", False: "FAIL", None: " -- "}[result.passed]
    numbers = [_number(x, ".2e") for x in (result.error, result.allowed, result.torch_error)]
    numbers += [_number(None if x is None else 1000 * x, ".3f") for x in (result.seconds, result.torch_seconds)]
    text = _columns(verdict, result.name, result.shape, result.backend, str(result.calls), *numbers)
    return f"{text}  {result.note}".rstrip()


def _columns(verdict: str, name: str, shape: str, backend: str, calls: str, *numbers: str) -> str:
    return f"{verdict:4}  {name:55} {shape:36} {backend:9} {calls:>5} " + " ".join(f"{n:>9}" for n in numbers)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(results: list[CheckResult]) -> str:
    """The numbers of checks that passed, failed and were not judged."""
    counts = [sum(result.passed is verdict for result in results) for verdict in (True, False, None)]
    return f"{counts[0]} passed, {counts[1]} failed, {counts[2]} not judged"


def to_json(environment: dict[str, Any], results: list[CheckResult]) -> str:
    """The environment and all results in a machine-readable form."""
    passed = not any(result.passed is False for result in results)
    return json.dumps({**environment, "passed": passed, "rows": [asdict(result) for result in results]}, indent=2)
