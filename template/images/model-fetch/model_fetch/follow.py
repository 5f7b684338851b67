"""Computes a file's digests while it is being fetched, in order, on another core.

Chunks finish in any order, a digest needs them in the right one. What has arrived is read from the
page cache. Never by a mapping: to make one Python duplicates the descriptor, and closing that is a
flush on FUSE, during which SeaweedFS 4.48 loses what others write.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import volume
from .chunks import Checksums, Chunk, Plan
from .verify import Digests

ENOUGH = 2  # chunks to digest, the present one included, with which a digest counts as behind


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told what a follower sees."""

    digested: Callable[[], None]
    """After each chunk."""

    finished: Callable[[str | None], None]
    """Once all were digested, with what is wrong with the volume."""

    failed: Callable[[BaseException], None]


class Follower:
    """The digests of one file, following what has arrived of it."""

    def __init__(
        self,
        digests: Digests,
        fd: int,
        plan: Plan,
        done: Iterable[int],
        told: Told,
    ) -> None:
        """done: chunks that are in the file already."""
        self._digests, self._fd, self._plan = digests, fd, plan
        self._told = told
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
            self._follow()
            if not self._cancelled:
                self._told.finished(self._lost())
        except BaseException as error:
            if not self._cancelled:
                self._told.failed(error)

    def _follow(self) -> None:
        """Digests the file as it comes in; ends early when cancelled."""
        buffer = memoryview(bytearray(volume.PIECE if self._digests else 0))
        for chunk in self._plan:
            self._await(chunk)
            position = chunk.start
            while self._digests and position < chunk.end and not self._cancelled:
                piece = buffer[: chunk.end - position]
                count = os.preadv(self._fd, [piece], position)
                if not count:
                    raise OSError(errno.EIO, "the file became shorter while it was fetched")
                self._digests.update(piece[:count])
                position += count
            if self._cancelled:
                return
            self._next = chunk.index + 1
            self._told.digested()

    def _await(self, chunk: Chunk) -> None:
        with self._condition:
            while chunk.index not in self._done and not self._cancelled:
                self._condition.wait()

    def _lost(self) -> str | None:
        """What the volume does not hold as it was written."""
        return None


class ReadBack(Follower):
    """The same for a file system that is a program or another machine.

    There the cache of this kernel proves nothing. So the whole file is flushed, closed, and read
    back from its store, and each chunk's CRC-32 must be that of what came in.
    """

    behind = False

    def __init__(
        self,
        digests: Digests,
        path: Path,
        plan: Plan,
        done: Iterable[int],
        told: Told,
        sums: Checksums,
        seal: Callable[[], None],
    ) -> None:
        """sums: of what came in; seal: flushes and closes the file."""
        super().__init__(digests, -1, plan, done, told)
        self._path, self._sums, self._seal = path, sums, seal
        self._back = Checksums(plan)

    def _follow(self) -> None:
        for chunk in self._plan:
            self._await(chunk)
        if self._cancelled:
            return
        self._seal()
        position = 0
        for piece in volume.read_back(self._path):
            if self._cancelled:
                return
            piece = piece[: self._plan.size - position]
            self._digests.update(piece)
            self._back.add(piece, position)
            position += len(piece)

    def _lost(self) -> str | None:
        wrong = [c for c in self._plan if self._back.of(c.index) != self._sums.of(c.index)]
        if not wrong:
            return None
        return f"the volume does not hold what was written to it, from byte {wrong[0].start:,} on"
