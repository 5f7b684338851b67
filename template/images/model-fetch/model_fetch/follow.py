"""Computes a file's digests while it is being fetched, in order, on another core.

Chunks finish in any order, a digest needs them in the right one. A worker that has written a piece
near the digest's position hands its buffer over, so the bytes are digested from the processor's
cache; whatever could not be handed over is read back from the page cache when its turn comes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from .chunks import Plan
from .verify import Digests

PIECE = 1 << 19  # bytes of one buffer: small enough for a core's cache
POOL = 64 << 20  # bytes of all buffers that wait for a digest
NEAR = 32 << 20  # bytes ahead of a digest within which buffers are kept


class Pool:
    """Buffers that go round between workers and digests; bounds the program's memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[memoryview] = []
        self._left = POOL // PIECE

    def take(self) -> memoryview | None:
        """A buffer; None when all of them are in use."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._left == 0:
                return None
            self._left -= 1
        return memoryview(bytearray(PIECE))

    def give(self, buffer: memoryview) -> None:
        with self._lock:
            self._free.append(buffer)


class Follower:
    """The digests of one file, following what has arrived of it."""

    def __init__(
        self,
        digests: Digests,
        fd: int,
        plan: Plan,
        done: set[int],
        pool: Pool,
        finished: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """done: chunks that are in the file already; finished: called once all bytes were digested."""
        self.digests = digests
        self._fd, self._plan, self._pool = fd, plan, pool
        self._finished, self._failed = finished, failed
        self._condition = threading.Condition()
        self._done = set(done)
        self._handed: dict[int, tuple[memoryview, int]] = {}
        self._position = 0
        self._claimed = 0
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def arrived(self, index: int) -> None:
        """A chunk is in the file."""
        with self._condition:
            self._done.add(index)
            self._condition.notify()

    def hand_over(self, position: int, buffer: memoryview, count: int) -> memoryview:
        """Offers the `count` bytes that were written to `position`.

        Returns: the buffer to go on with: another one when the offer was taken, else the same.
        """
        if not self.digests or not 0 <= position - self._position < NEAR:
            return buffer
        other = self._pool.take()
        if other is None:
            return buffer
        with self._condition:
            if self._cancelled or position < self._claimed or position in self._handed:
                self._pool.give(other)
                return buffer
            self._handed[position] = (buffer, count)
            if position == self._position:
                self._condition.notify()
        return other

    def cancel(self) -> None:
        """Ends without a result, soon."""
        with self._condition:
            self._cancelled = True
            self._condition.notify()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._digest_all():
                self._finished()
        except BaseException as error:
            self._failed(error)

    def _digest_all(self) -> bool:
        """False when it was cancelled."""
        own = memoryview(bytearray(PIECE))
        try:
            while self._position < self._plan.size:
                handed = self._wait()
                if self._cancelled:
                    return False
                if handed is not None:
                    buffer, count = handed
                    self.digests.update(buffer[:count])
                    self._pool.give(buffer)
                else:
                    count = self._read_back(own)
                self._position += count
            return not self._cancelled
        finally:
            with self._condition:
                self._cancelled = True
                for buffer, _ in self._handed.values():
                    self._pool.give(buffer)
                self._handed.clear()

    def _wait(self) -> tuple[memoryview, int] | None:
        """A buffer that begins at the position; None when the bytes must be read back."""
        chunk = self._position // self._plan.chunk_size
        with self._condition:
            while not self._cancelled:
                handed = self._handed.pop(self._position, None)
                if handed is not None:
                    self._claimed = self._position + handed[1]
                    return handed
                if chunk in self._done:
                    return None
                self._condition.wait()
        return None

    def _read_back(self, buffer: memoryview) -> int:
        """Digests the next bytes from the file, up to a buffer that was handed over."""
        chunk = self._plan[self._position // self._plan.chunk_size]
        end = min(chunk.end, self._position + len(buffer))
        with self._condition:
            end = min([end, *self._handed])
            self._claimed = end
        if not self.digests:
            return end - self._position
        count = os.preadv(self._fd, [buffer[: end - self._position]], self._position)
        if not count:
            raise OSError(5, "the file became shorter while it was fetched")
        self.digests.update(buffer[:count])
        return count
