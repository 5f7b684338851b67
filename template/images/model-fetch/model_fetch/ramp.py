"""How many connections a transfer has open: few at first, twice as many for as long as that pays.

Two saturate a store nearby, and there every further one only takes time from the others and from
the digests; a store that is far away, or slow for each connection, needs all that are allowed.
"""

from __future__ import annotations

FIRST = 2  # connections to begin with
PACE = 1.0  # seconds over which a rate is measured
WORTH = 1.25  # times as fast: what twice as many connections must bring to be doubled again
PATIENCE = 5.0  # seconds until more are tried all the same


class Ramp:
    """Decides by what has been received."""

    def __init__(self, limit: int) -> None:
        """limit: the most connections that are allowed."""
        self._limit = limit
        self._open = min(FIRST, limit)
        self._received = 0
        self._since: float | None = None
        self._doubled = 0.0
        self._rate = 0.0  # bytes per second before the last doubling

    def connections(self, received: int, now: float) -> int:
        """How many should be open.

        received: bytes of this run so far; now: seconds of a clock that never goes back
        """
        if self._since is None:
            self._since = self._doubled = now
            self._received = received
        elapsed = now - self._since
        if elapsed >= PACE:
            rate = (received - self._received) / elapsed
            if rate >= WORTH * self._rate or now - self._doubled >= PATIENCE:
                self._open = min(2 * self._open, self._limit)
                self._rate, self._doubled = rate, now
            self._received, self._since = received, now
        return self._open
