"""The one way to end a run early: a signal, a lost lock, or the first error of a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Stop:
    """Set once, with the reason; wakes up whoever sleeps or reads."""

    def __init__(self, parent: Stop | None = None) -> None:
        """parent: ends this one too when it is set itself."""
        self._event = threading.Event()
        self._reason: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []
        if parent is not None:
            parent.call(lambda: self.set(parent.reason or RuntimeError("stopped")))

    @property
    def reason(self) -> BaseException | None:
        """Why the run is to end; None while it goes on."""
        return self._reason

    def set(self, reason: BaseException) -> None:
        """Asks everything to end; the first reason wins."""
        if self._reason is None:
            self._reason = reason
        self._event.set()
        for callback in list(self._callbacks):
            callback()

    def check(self) -> None:
        """Raises the reason when the run is to end."""
        if self._event.is_set() and self._reason is not None:
            raise self._reason

    def is_set(self) -> bool:
        return self._event.is_set()

    def sleep(self, seconds: float) -> None:
        """Waits, or raises the reason as soon as the run is to end."""
        self._event.wait(seconds)
        self.check()

    def call(self, callback: Callable[[], None]) -> None:
        """Has `callback` called when the run is to end."""
        self._callbacks.append(callback)
        if self._event.is_set():
            callback()

    def forget(self, callback: Callable[[], None]) -> None:
        if callback in self._callbacks:
            self._callbacks.remove(callback)
