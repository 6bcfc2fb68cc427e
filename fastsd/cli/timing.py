"""What is told while the ops of a new GPU, or of a new image size, are compiled and timed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd.kernels.choice.table import Place, TableEntry


class TimingNote:
    """Says once, on stderr, why nothing is generated yet; the progress bar counts the calls that are known."""

    def __init__(self, bar: Any):
        self.bar, self.count, self.shown = bar, 0, False

    def __call__(self, place: Place, entry: TableEntry) -> None:
        """After each choice of a way to compute a call."""
        if self.count == 0:
            note = "note: kernels are compiled and timed for this GPU and image size, once (docs/tuning.md)"
            self.bar.write(note, file=sys.stderr)
        self.count += 1
        self.bar.set_postfix_str(f"{self.count} ops timed")
        self.shown = True

    def clear(self) -> None:
        """A step was generated: the bar counts steps again."""
        if self.shown:
            self.bar.set_postfix_str("", refresh=False)
            self.shown = False
