"""Which byte ranges a file is fetched in, and the journal of those that have arrived.

A journal is an append-only text file beside the file that it speaks of:

    {"path": "model.safetensors", "size": 1610612856, "chunk": 16777216, "boot": "5a0e…"}
    ~"\\"5f0c\\""      the store's validator (ETag), as JSON
    +0                chunk 0 is in the file
    +2 1b851995       the same, and the CRC-32 of what came in
    =2                the first two of these marks are on the disk, not in memory alone
    !53aa51…          the whole file was verified, and this is its SHA-256

A line counts only with its line feed, so a torn write is a line that never was. A mark that no `=`
covers is believed only while the same kernel runs (its boot id): its bytes survive a kill or an
eviction in the page cache, but not a power cut. Where the file system is a program or another
machine, only what was flushed is believed, and only with its CRC-32: read back, it must match.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import reading, volume

LONGEST = 64 << 20  # bytes of a journal; 100 GB in chunks of 64 KiB need 30 MB
SMALLEST = 1 << 14  # bytes of a chunk, as --chunk-size has it
VALIDATOR = r"[ -~]{1,1024}"  # what can be sent as a header (RFC 9110, 8.8.3: and nothing else)


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
    done: indexes of the chunks that can be believed, with their CRC-32 where it was kept
    sha256: of the whole file, where an earlier run got as far as verifying it
    """

    chunk_size: int
    validator: str | None = None
    done: Mapping[int, int | None] = field(default_factory=dict)
    sha256: str | None = None


class Checksums:
    """The CRC-32 of each chunk as it came in, before a file system had it."""

    def __init__(self, plan: Plan, known: Mapping[int, int | None] | None = None) -> None:
        self._plan = plan
        self._sums: dict[int, int | None] = dict(known or {})
        self._reached: dict[int, int] = {}

    def add(self, data: memoryview, position: int) -> None:
        """These bytes belong there. Those of one chunk come in order, and from one thread."""
        while data:
            chunk = self._plan[position // self._plan.chunk_size]
            part = data[: chunk.end - position]
            if position == chunk.start:
                self._sums[chunk.index] = zlib.crc32(part)
            elif self._reached.get(chunk.index) == position:
                self._sums[chunk.index] = zlib.crc32(part, self._sums[chunk.index] or 0)
            else:  # its beginning was never seen
                self._sums[chunk.index] = None
            position += len(part)
            self._reached[chunk.index] = position
            data = data[len(part) :]

    def of(self, index: int) -> int | None:
        """The sum of a chunk that is done; None when it is not known."""
        return self._sums.get(index)


def read_journal(data: bytes, path: str, size: int, boot: str | None) -> Progress | None:
    """What `data` says about the file `path` of `size` bytes; None when it is no use for it.

    boot: the running kernel's; None where no cache of a kernel can be believed
    """
    *lines, _torn = data.split(b"\n")
    if not lines:
        return None
    try:
        header = reading.mapping(reading.document(lines[0], "a journal"), "a journal")
        if (header["path"], header["size"]) != (path, size):
            return None
        plan = Plan(size, reading.count(header["chunk"], "a chunk"))
        validator: str | None = None
        sha256: str | None = None
        marks: list[tuple[int, int | None]] = []
        durable = 0
        for line in lines[1:]:
            kind, rest = line[:1], line[1:]
            if kind == b"~":
                validator = reading.text(reading.document(rest), "a validator", VALIDATOR)
            elif kind == b"+":
                index, _, crc = rest.partition(b" ")
                marks.append((_index(index, plan), int(crc, 16) if crc else None))
            elif kind == b"=":
                durable = reading.count(int(rest), "a mark")
            elif kind == b"!":
                sha256 = reading.text(rest.decode(), "a digest", "[0-9a-f]{64}")
            else:
                return None
    except (ValueError, KeyError):  # UnreadableError is one
        return None
    if boot is not None and header.get("boot") == boot:
        return Progress(plan.chunk_size, validator, dict(marks), sha256)
    done = {i: crc for i, crc in marks[:durable] if boot is not None or crc is not None}
    return Progress(plan.chunk_size, validator, done, sha256)


def _index(text: bytes, plan: Plan) -> int:
    return reading.count(int(text), "a chunk's number", len(plan) - 1)


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
        lines += [_mark(index, crc) for index, crc in sorted(progress.done.items())]
        self._marks = len(progress.done)
        where.parent.mkdir(parents=True, exist_ok=True)
        fresh = where.with_name(where.name + ".new")
        volume.write_new(fresh, "".join(line + "\n" for line in lines).encode())
        os.replace(fresh, where)
        self._fd = volume.open_regular(where, os.O_WRONLY | os.O_APPEND)

    def validator(self, validator: str) -> None:
        """Records the name that the store gives this version of the file."""
        with self._lock:
            self._append("~" + json.dumps(validator))

    def done(self, index: int, crc: int | None = None) -> None:
        """Records that a chunk is in the file."""
        with self._lock:
            self._append(_mark(index, crc))
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


def _mark(index: int, crc: int | None) -> str:
    return f"+{index}" if crc is None else f"+{index} {crc:08x}"
