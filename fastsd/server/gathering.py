"""How long the first of some jobs waits for others of its shape, before it begins in a batch that has room."""

from __future__ import annotations

import math
import time

# Of the seconds of the last batch: waited for clients that may be expected, and for those of whom nothing is known.
EXPECTED_SHARE, UNKNOWN_SHARE = 0.1, 0.03
LEAST, MOST = 0.003, 0.05  # seconds


class Gathering:
    """Clients that wait for their images ask again together, and the first of them should not go alone.

    As many jobs are expected as the last batch had and waited at its end, for as long as that batch took: when they are
    there, nobody waits longer. A client that calls alone, one request after the other, does not wait at all.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._expected = 0
        self._until = 0.0

    def note_end(self, jobs: int, seconds: float) -> None:
        """A batch has ended.

        Args:
            jobs: that it had, and that wait now.
            seconds: that it took.
        """
        self._seconds, self._expected, self._until = seconds, jobs, time.monotonic() + seconds

    @property
    def expected(self) -> float:
        """With so many jobs nobody else is waited for; infinity: nothing is known of the clients."""
        return self._expected if time.monotonic() < self._until else math.inf

    @property
    def patience(self) -> float:
        """Seconds that the first of them waits at most."""
        share = UNKNOWN_SHARE if self.expected == math.inf else EXPECTED_SHARE
        return min(max(share * self._seconds, LEAST), MOST)
