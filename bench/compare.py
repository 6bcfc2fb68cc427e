"""What got faster or slower between two result files.

    python -m bench.compare OLD.json NEW.json

A change counts where it goes beyond the spread: the two ranges from quartile to quartile do not overlap. Exit code 1 if
something of fastsd's own then takes more than 3% longer, or has lost its green gate; 2 for a file that is none.
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
    """One candidate of one contest in both files; `ratio` is new seconds over old."""

    name: str
    candidate: str
    ratio: float | None
    beyond: bool  # the spread
    lost: str = ""  # why there is no speed any more

    @property
    def regression(self) -> bool:
        slower = self.ratio is not None and self.beyond and self.ratio > ALLOWED
        return self.candidate.startswith("fastsd") and (slower or bool(self.lost))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Of every record with a speed in `old` that `new` has too, slowest first."""
    later = {identity(record): record for record in new["records"]}
    found = []
    for record in old["records"]:
        before, after = record.get("seconds"), later.get(identity(record))
        if not before or after is None:
            continue
        name = " ".join(str(record[key]) for key in KEY if record.get(key) is not None)
        candidate = str(record.get("candidate"))
        now = after.get("seconds")
        if not now:
            found.append(Change(name, candidate, None, True, after.get("problem", "no speed")))
            continue
        beyond = now["low"] > before["high"] or now["high"] < before["low"]
        found.append(Change(name, candidate, now["median"] / before["median"], beyond))
    return sorted(found, key=lambda change: -(change.ratio or float("inf")))


def report(found: list[Change]) -> str:
    """A line for each change beyond the spread, and how many stayed."""
    lines = []
    for change in found:
        if change.ratio is None:
            lines.append(f"  lost    {change.name}: {change.lost}")
        elif change.beyond:
            way = "slower" if change.ratio > 1 else "faster"
            lines.append(f"  {way}  {change.name}: {change.ratio:.3f} x the time")
    still = sum(not change.beyond for change in found)
    return "\n".join([*lines, f"  {still} of {len(found)} unchanged within their spread"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old, new = read(options.old), read(options.new)
        found = changes(old, new)
        if not found:
            raise FastsdError(f"{options.old} and {options.new} have no figure in common")
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    devices = [data.get("environment", {}).get("device") for data in (old, new)]
    if devices[0] != devices[1]:
        print(f"note: measured on different devices, {devices[0]} and {devices[1]}")
    print(report(found))
    worse = [change for change in found if change.regression]
    if worse:
        print(f"{len(worse)} of fastsd's own got slower by more than {ALLOWED - 1:.0%}, or lost their gate")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
