"""Records of a result file, for tests of the benchmarks."""

from __future__ import annotations

from typing import Any


def record_of(candidate: str, median: float | None, **fields: Any) -> dict[str, Any]:
    """A record of a step of SD1.5; `median` None: the correctness check failed. `fields` override."""
    labels = {"benchmark": "step", "model": "sd15", "size": 512, "batch": 1, "dtype": "bf16", "candidate": candidate}
    gate = {"passed": median is not None, "max": 0.1, "relative": 0.01, "psnr": 40.0}
    if median is None:
        problem = "correctness check failed: relative error 0.5"
        return labels | {"gate": gate, "seconds": None, "problem": problem} | fields
    seconds = {"median": median, "low": median, "high": median, "rounds": 3}
    return labels | {"gate": gate, "seconds": seconds} | fields
