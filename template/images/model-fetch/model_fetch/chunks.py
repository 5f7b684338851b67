"""Which byte ranges a file is fetched in, and the journal of those that have arrived.

A journal is an append-only text file beside the file that it speaks of:

    {"path": "model.safetensors", "size": 1610612856, "chunk": 16777216, "boot": "5a0e…"}
    ~"\\"5f0c\\""      the store's validator (ETag), as JSON
    +0                chunk 0 is in the file
    +2
    =2                the first two of these marks are on the disk, not in memory alone
    !53aa51…          the whole file was verified, and this is its SHA-256

A line counts only with its line feed, so a torn write is a line that never was. A mark that no `=`
covers is believed only while the same kernel runs (its boot id): its bytes survive a kill or an
eviction in the page cache, but not a power cut.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes `start` to `end` (exclusive) of a file."""

    index: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """A file cut into chunks of equal size, the last one shorter."""

    size: int
    chunk_size: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.chunk_size < 1:
            raise ValueError(f"no plan for {self.size} bytes in chunks of {self.chunk_size}")

    def __len__(self) -> int:
        return -(-self.size // self.chunk_size)

    def __getitem__(self, index: int) -> Chunk:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.chunk_size
        return Chunk(index, start, min(start + self.chunk_size, self.size))

    def __iter__(self) -> Iterator[Chunk]:
        return (self[index] for index in range(len(self)))

    def ends_within(self, start: int, end: int) -> range:
        """Indexes of the chunks whose last byte is in the bytes from start to end (exclusive)."""
        last = len(self) if end == self.size else end // self.chunk_size
        return range(start // self.chunk_size, last)


def boot_id() -> str:
    """Names the running kernel; differs on every machine and after every boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{os.getpid()}-{os.urandom(8).hex()}"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a journal says about a file.

    validator: what the store called this version of the file, None when it gave no name
    done: indexes of the chunks that can be believed
    sha256: of the whole file, where an earlier run got as far as verifying it
    """

    chunk_size: int
    validator: str | None = None
    done: frozenset[int] = frozenset()
    sha256: str | None = None


def read_journal(text: str, path: str, size: int, boot: str) -> Progress | None:
    """What `text` says about the file `path` of `size` bytes; None when it is no use for it."""
    *lines, _torn = text.split("\n")
    if not lines:
        return None
    try:
        header = json.loads(lines[0])
        if (header["path"], header["size"]) != (path, size) or not header["chunk"] >= 1:
            return None
        plan = Plan(size, header["chunk"])
        same_kernel = header["boot"] == boot
        validator: str | None = None
        sha256: str | None = None
        marks: list[int] = []
        durable = 0
        for line in lines[1:]:
            kind, rest = line[:1], line[1:]
            if kind == "~":
                validator = json.loads(rest)
            elif kind == "+":
                marks.append(int(rest))
            elif kind == "=":
                durable = int(rest)
            elif kind == "!":
                sha256 = rest
            else:
                return None
    except (ValueError, KeyError, TypeError):
        return None
    believed = marks if same_kernel else marks[:durable]
    if any(not 0 <= index < len(plan) for index in believed):
        return None
    return Progress(plan.chunk_size, validator, frozenset(believed), sha256)


class Journal:
    """Writes the journal of one file. Safe to use from several threads."""

    def __init__(self, where: Path, path: str, size: int, progress: Progress) -> None:
        """Starts the journal at `where` anew, holding what `progress` says and nothing else."""
        self._where = where
        self._lock = threading.Lock()
        header = {"path": path, "size": size, "chunk": progress.chunk_size, "boot": boot_id()}
        lines = [json.dumps(header)]
        if progress.validator is not None:
            lines.append("~" + json.dumps(progress.validator))
        if progress.sha256 is not None:
            lines.append("!" + progress.sha256)
        lines += [f"+{index}" for index in sorted(progress.done)]
        self._marks = len(progress.done)
        where.parent.mkdir(parents=True, exist_ok=True)
        fresh = where.with_name(where.name + ".new")
        fresh.write_text("".join(line + "\n" for line in lines))
        os.replace(fresh, where)
        self._fd = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def validator(self, validator: str) -> None:
        """Records the name that the store gives this version of the file."""
        with self._lock:
            self._append("~" + json.dumps(validator))

    def done(self, index: int) -> None:
        """Records that a chunk is in the file."""
        with self._lock:
            self._append(f"+{index}")
            self._marks += 1

    def verified(self, sha256: str) -> None:
        """Records the digest of the whole file, which was found right."""
        with self._lock:
            self._append("!" + sha256)

    def checkpoint(self, fd: int) -> None:
        """Flushes the file open as `fd` and records that what was marked before is on the disk."""
        with self._lock:
            marks = self._marks
        os.fdatasync(fd)
        with self._lock:
            self._append(f"={marks}")
            if self._fd >= 0:
                os.fdatasync(self._fd)

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _append(self, line: str) -> None:
        if self._fd >= 0:
            os.write(self._fd, (line + "\n").encode())
