"""Computes a file's digests while it is being fetched, in order, on another core.

Chunks finish in any order, a digest needs them in the right one. What has arrived is digested where
it lies, in the page cache: mapped, never copied into this process.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable

from .chunks import Chunk, Plan
from .verify import Digests

WINDOW = 16 << 20  # bytes that are mapped at a time
ENOUGH = 2  # chunks to digest, the present one included, with which a digest counts as behind


class Follower:
    """The digests of one file, following what has arrived of it."""

    def __init__(
        self,
        digests: Digests,
        fd: int,
        plan: Plan,
        done: set[int],
        digested: Callable[[], None],
        finished: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """done: chunks that are in the file already; digested: called after each chunk, and then
        finished, once all were."""
        self._digests, self._fd, self._plan = digests, fd, plan
        self._digested, self._finished, self._failed = digested, finished, failed
        self._condition = threading.Condition()
        self._done = set(done)
        self._came: set[int] = set()
        self._next = 0
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def arrived(self, index: int) -> None:
        """A chunk is in the file."""
        with self._condition:
            self._done.add(index)
            self._came.add(index)
            self._condition.notify()

    @property
    def behind(self) -> bool:
        """Whether the digest, not the network, is what takes the time now.

        What an earlier run left does not count: the network need not wait until that was read.
        """
        return bool(self._digests) and self._came.issuperset(
            range(self._next, min(self._next + ENOUGH, len(self._plan)))
        )

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
            for chunk in self._plan:
                with self._condition:
                    while chunk.index not in self._done and not self._cancelled:
                        self._condition.wait()
                self._digest(chunk)
                if self._cancelled:
                    return
                self._next = chunk.index + 1
                self._digested()
            self._finished()
        except BaseException as error:
            self._failed(error)

    def _digest(self, chunk: Chunk) -> None:
        if not self._digests:
            return
        for start in range(chunk.start, chunk.end, WINDOW):
            if self._cancelled:
                return
            end = min(start + WINDOW, chunk.end)
            page = start - start % mmap.ALLOCATIONGRANULARITY
            try:
                mapped = mmap.mmap(
                    self._fd, end - page, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=page
                )
            except ValueError:
                raise OSError(errno.EIO, "the file became shorter while it was fetched") from None
            with mapped, memoryview(mapped) as view, view[start - page :] as content:
                self._digests.update(content)
