"""One file on its way: what has arrived of it, and what is still to be fetched."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from . import chunks, volume
from .cache import Staging
from .chunks import Checksums, Chunk, Journal, Plan, Progress, boot_id, read_journal
from .embedding_model import PinnedFile
from .follow import Follower
from .receive import Sink


@dataclass(frozen=True, slots=True)
class Work:
    """A chunk that a worker has taken.

    The sink is the file of the present generation. A file that is begun anew is a new inode, so a
    late write of an earlier generation can do no harm.
    """

    job: Job
    chunk: Chunk
    generation: int
    sink: Sink
    follower: Follower


class Job:
    """The state of one file. Guarded by the transfer's condition, except where said."""

    def __init__(self, file: PinnedFile, staging: Staging, chunk_size: int) -> None:
        self.file = file
        self.target = staging.target(file.path)
        self._staging = staging
        self._where = staging.journal(file.path)
        self._chunk_size = chunk_size
        self.attempts = 0
        self.generation = 0
        self.active = 0
        self.finished = False
        self.sha256: str | None = None
        self.journal: Journal | None = None
        self.follower: Follower | None = None
        self.sink: Sink
        self.probing = self.ranges = False
        self._retired: list[Journal | int] = []
        self._flushing = threading.Lock()
        self._begin(self._known() or Progress(chunk_size), whole=False)

    @property
    def present(self) -> int:
        """Bytes of the chunks that are done."""
        return sum(self.plan[index].size for index in self.done)

    def open(self) -> None:
        """Opens the file and its journal."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if not self.done:
            volume.remove(self.target)  # so that the file is new, and nobody else's
        fd = volume.open_regular(self.target, os.O_RDWR | os.O_CREAT)
        if not volume.is_own(os.fstat(fd), self._staging.owner):
            os.close(fd)
            raise FileExistsError(17, "is another user's, or has a second name", str(self.target))
        os.ftruncate(fd, self.file.size)
        done = {index: self.done[index] for index in sorted(self.done)}
        self.sink = Sink(fd, None if self._staging.local else Checksums(self.plan, done))
        progress = Progress(self.plan.chunk_size, self.validator, done, self.verified_before)
        self.journal = Journal(self._where, self.file.path, self.file.size, progress)
        self.sealed = False

    def arrived(self, index: int) -> None:
        """A chunk is in the file. Needs the journal."""
        assert self.journal is not None
        crc = self.sink.sums.of(index) if self.sink.sums else None
        self.journal.done(index, crc)
        self.done[index] = crc

    def checkpoint(self) -> None:
        """Flushes what has arrived, so that a pod on another machine can go on with it."""
        with self._flushing:
            if self.journal is not None and not self.finished and not self.sealed:
                self.journal.checkpoint(self.sink.fd)

    def seal(self, generation: int) -> None:
        """Flushes and closes the file, which has all its chunks: only then is it read back.

        An open file's contents may be what its writer has, not what the store has.
        """
        with self._flushing:
            if self.journal is not None and generation == self.generation:
                self.journal.checkpoint(self.sink.fd)
                self.sealed = True
                os.close(self.sink.fd)

    def restart(self, whole: bool = False) -> None:
        """Throws away what has come so far. whole: fetch it as one stream, without ranges."""
        with self._flushing:
            self._retire()
            self.delete()
            self._begin(Progress(self._chunk_size), whole)
        self.open()

    def delete(self) -> None:
        """Removes the file and its journal from the staging folder."""
        volume.remove(self._where)
        volume.remove(self.target)

    def take(self) -> Work | None:
        """The next chunk to fetch, if there is one now."""
        assert self.follower is not None
        if not self.pending or (self.probing and not self.ranges):
            return None
        if self.active and self.follower.behind:
            return None  # more connections would only take the processor away from the digest
        self.probing = True
        self.active += 1
        self.pending -= 1
        return Work(self, next(self._left), self.generation, self.sink, self.follower)

    def close(self) -> None:
        """Closes everything that was ever open; no worker may be left."""
        self._retire()
        for old in self._retired:
            old.close() if isinstance(old, Journal) else os.close(old)
        self._retired.clear()

    def _retire(self) -> None:
        if self.follower is not None:
            self.follower.cancel()
            self.follower = None
        if self.journal is not None:
            self._retired += [self.journal] if self.sealed else [self.journal, self.sink.fd]
            self.journal = None

    def _begin(self, progress: Progress, whole: bool) -> None:
        self.plan = Plan(self.file.size, progress.chunk_size)
        self.validator = progress.validator
        self.verified_before = progress.sha256
        self.done = dict(progress.done)
        self.whole = whole
        # Not a list: the size of a file that fits nowhere must cost nothing either.
        left = (chunk for chunk in self.plan if chunk.index not in progress.done)
        self._left: Iterator[Chunk] = left
        self.pending = 0 if whole else len(self.plan) - len(self.done)
        self.generation += 1
        self.probing = self.ranges = self.sealed = False

    def _known(self) -> Progress | None:
        """What an earlier run left, if it can be believed."""
        try:
            status = os.lstat(self.target)
        except OSError:
            return None
        if not volume.is_own(status, self._staging.owner) or status.st_size != self.file.size:
            return None
        data = volume.read_small(self._where, chunks.LONGEST)
        boot = boot_id() if self._staging.local else None
        progress = read_journal(data or b"", self.file.path, self.file.size, boot)
        if progress and progress.validator is None and self.file.sha256 is None:
            return None  # nothing would show that the store holds another version by now
        if progress and progress.chunk_size < chunks.SMALLEST:
            return None  # no run of this program fetches in so small pieces
        return progress
