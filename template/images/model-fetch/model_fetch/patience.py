"""Failures in a row: how long to wait, when to give up, and what is said of them meanwhile."""

from __future__ import annotations

import random
import threading
import time

from . import limits
from .console import Console
from .failures import UnreachableError
from .responses import Again
from .settings import Settings
from .stop import Stop
from .transport import ConnectionFailed

MAX_BACKOFF = 20.0  # seconds between two tries
SAY_AGAIN = 60.0  # seconds until the same reason is told once more
MOST_REASONS = 100  # that are remembered as told


class Reasons:
    """Tells why something is tried again: each reason at once, then once a minute. Thread-safe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}

    def tell(self, what: str, failures: int, tries: int, error: Exception, reason: str) -> None:
        """reason: what is the same for all places where it happens."""
        now = time.monotonic()
        with self._lock:
            if now - self._told.get(reason, -SAY_AGAIN) < SAY_AGAIN:
                return
            if len(self._told) >= MOST_REASONS:
                self._told.clear()
            self._told[reason] = now
        self._console.warning(f"{what}: try {failures} of {tries} failed: {error}; trying again")


class Patience:
    """The tries of one thing, one after another."""

    def __init__(self, what: str, settings: Settings, stop: Stop, reasons: Reasons) -> None:
        """what: is to be had, for the log."""
        self._what, self._stop, self._reasons = what, stop, reasons
        self._retries = settings.retries
        self._failures = 0

    def progress(self) -> None:
        """The last try brought something, so the next failure is the first one in a row."""
        self._failures = 0

    def wait(self, error: Again | ConnectionFailed) -> None:
        """After a failure: returns when it is time for the next try.

        Raises: UnreachableError when there was one too many, and what `stop` is set with.
        """
        self._failures += 1
        self._stop.check()
        after, tries = None, self._retries + 1
        if isinstance(error, ConnectionFailed):
            tries = min(tries, error.tries or tries)
        else:
            after = error.after
        if self._failures >= tries:
            raise UnreachableError(
                f"{self._what} could not be fetched, {self._failures} tries in a row: {error}"
            )
        self._reasons.tell(self._what, self._failures, tries, error, error.reason)
        if after is None:
            longest = min(0.1 * 2**self._failures, MAX_BACKOFF)
            after = longest * random.uniform(0.5, 1.0)  # noqa: S311
        self._stop.sleep(min(after, limits.RETRY_AFTER_SECONDS))
