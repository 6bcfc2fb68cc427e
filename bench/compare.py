"""The differences in speed between two result files.

    python -m bench.compare OLD.json NEW.json

A difference counts if it exceeds the spread, that is, if the two ranges between the quartiles do not overlap. Exit code
1 if a time of fastsd then rose by more than 3%, or its correctness check fails now; 2 for a file that is not a result
file.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import KEY, identity, read
from fastsd.errors import FastsdError

ALLOWED = 1.03


@dataclass(frozen=True)
class Change:
    """One candidate of one benchmark in both files; `ratio` is the new time divided by the old."""

    name: str
    candidate: str
    ratio: float | None
    exceeds_spread: bool
    problem: str = ""  # why there is no new time

    @property
    def regression(self) -> bool:
        slower = self.ratio is not None and self.exceeds_spread and self.ratio > ALLOWED
        return self.candidate.startswith("fastsd") and (slower or bool(self.problem))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The change of every record of `old` with a time that is also in `new`, slowest first."""
    new_records = {identity(record): record for record in new["records"]}
    all_changes = []
    for record in old["records"]:
        before, new_record = record.get("seconds"), new_records.get(identity(record))
        if not before or new_record is None:
            continue
        name = " ".join(str(record[key]) for key in KEY if record.get(key) is not None)
        candidate = str(record.get("candidate"))
        after = new_record.get("seconds")
        if not after:
            all_changes.append(Change(name, candidate, None, True, new_record.get("problem", "no time")))
            continue
        exceeds_spread = after["low"] > before["high"] or after["high"] < before["low"]
        all_changes.append(Change(name, candidate, after["median"] / before["median"], exceeds_spread))
    return sorted(all_changes, key=lambda change: -(change.ratio or float("inf")))


def report(all_changes: list[Change]) -> str:
    """A line for each change that exceeds the spread, and the number of the others."""
    lines = []
    for change in all_changes:
        if change.ratio is None:
            lines.append(f"  lost    {change.name}: {change.problem}")
        elif change.exceeds_spread:
            direction = "slower" if change.ratio > 1 else "faster"
            lines.append(f"  {direction}  {change.name}: {change.ratio:.3f} x the time")
    unchanged = sum(not change.exceeds_spread for change in all_changes)
    return "\n".join([*lines, f"  {unchanged} of {len(all_changes)} unchanged within their spread"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
        all_changes = changes(old, new)
        if not all_changes:
            raise FastsdError(f"{options.old} and {options.new} have no time in common")
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    devices = [data.get("environment", {}).get("device") for data in (old, new)]
    if devices[0] != devices[1]:
        print(f"note: measured on different devices, {devices[0]} and {devices[1]}")
    print(report(all_changes))
    regressions = [change for change in all_changes if change.regression]
    if regressions:
        print(f"{len(regressions)} of fastsd's benchmarks got slower by more than {ALLOWED - 1:.0%} or failed")
    return 1 if regressions else 0


if __name__ == "__main__":
    sys.exit(main())
