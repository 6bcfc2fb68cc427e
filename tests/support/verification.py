"""Reading the results of `fastsd verify`."""

from __future__ import annotations

from fastsd.kernels.choice.rule import CheckResult


def failures(results: list[CheckResult]) -> set[str]:
    """The names of the failed checks."""
    return {result.name for result in results if result.passed is False}
