"""One file on its way: what has arrived of it, and what is still to be fetched."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

from .cache import Staging
from .chunks import Chunk, Journal, Plan, Progress, boot_id, read_journal
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
        self._begin(self._known() or Progress(chunk_size), whole=False)

    @property
    def present(self) -> int:
        """Bytes of the chunks that are done."""
        return sum(self.plan[index].size for index in self.done)

    def open(self) -> None:
        """Opens the file and its journal."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.sink = Sink(fd)
        os.ftruncate(fd, self.file.size)
        done = frozenset(self.done)
        progress = Progress(self.plan.chunk_size, self.validator, done, self.verified_before)
        self.journal = Journal(self._where, self.file.path, self.file.size, progress)

    def restart(self, whole: bool = False) -> None:
        """Throws away what has come so far. whole: fetch it as one stream, without ranges."""
        self._retire()
        self.delete()
        self._begin(Progress(self._chunk_size), whole)
        self.open()

    def delete(self) -> None:
        """Removes the file and its journal from the staging folder."""
        self._where.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)

    def take(self) -> Work | None:
        """The next chunk to fetch, if there is one now."""
        assert self.follower is not None
        if not self.pending or (self.probing and not self.ranges):
            return None
        if self.active and self.follower.behind:
            return None  # more connections would only take the processor away from the digest
        self.probing = True
        self.active += 1
        return Work(self, self.pending.popleft(), self.generation, self.sink, self.follower)

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
            self._retired += [self.journal, self.sink.fd]
            self.journal = None

    def _begin(self, progress: Progress, whole: bool) -> None:
        self.plan = Plan(self.file.size, progress.chunk_size)
        self.validator = progress.validator
        self.verified_before = progress.sha256
        self.done = set(progress.done)
        self.whole = whole
        left = [chunk for chunk in self.plan if chunk.index not in self.done]
        self.pending = deque([] if whole else left)
        self.generation += 1
        self.probing = self.ranges = False

    def _known(self) -> Progress | None:
        """What an earlier run left, if it can be believed."""
        try:
            if self.target.is_symlink() or self.target.stat().st_size != self.file.size:
                return None
            text = self._where.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        progress = read_journal(text, self.file.path, self.file.size, boot_id())
        if progress and progress.validator is None and self.file.sha256 is None:
            return None  # nothing would show that the store holds another version by now
        return progress
