"""Brings a body from a connection into a file: within the kernel where it can, else by a buffer."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from .chunks import Checksums
from .transport import describe

PIECE = 1 << 20  # bytes that are moved at a time: the most that a pipe may hold (pipe(7))
LINGER = 0.1  # seconds without a byte after which what has come is written
LONGEST = 1.0  # seconds after which it is written in any case, so that a drip is seen as one
READ = 1 << 16  # bytes that are read at a time where TLS or chunks are decoded
# What kernels, file systems and seccomp filters answer that have no splice for this (splice(2)).
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
CUT = "the connection was cut"


class ReadFailed(Exception):
    """The connection broke, or stood still for too long."""


@dataclass(frozen=True, slots=True)
class Sink:
    """A file that several connections write to."""

    fd: int

    sums: Checksums | None = None
    """Kept where what is read later may not be what was written."""

    writing: threading.Lock = field(default_factory=threading.Lock)
    """The kernel lets one thread at a time write to a file, and the others burn their time spinning
    for it (inode rwsem); here they sleep."""

    def write(self, data: memoryview, position: int) -> None:
        """Puts all of `data` there."""
        if self.sums is not None:
            self.sums.add(data, position)
        written = 0
        with self.writing:
            while written < len(data):
                written += os.pwrite(self.fd, data[written:], position + written)


class Receiver:
    """What one connection needs to receive: a pipe in the kernel, a buffer where that cannot be."""

    def __init__(self, timeout: float) -> None:
        """timeout: seconds without a byte until a connection counts as dead."""
        self._timeout = timeout
        self._pipe: tuple[int, int] | None = None
        self._splices = hasattr(os, "splice")
        self._buffer: memoryview | None = None

    def close(self) -> None:
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)

    def receive(
        self,
        response: http.client.HTTPResponse,
        sock: socket.socket | None,
        sink: Sink,
        start: int,
        end: int,
    ) -> Iterator[int]:
        """Fills the bytes from start to end (exclusive) of a file with a body.

        sock: where the body comes from as it is, None when something must decode it (TLS)
        Yields: how many bytes more are in the file.
        Raises: ReadFailed, OSError when the file cannot be written.
        """
        position = start
        if not response.length or sink.sums is not None:
            sock = None  # without a length the body's end must be found; an empty one has none
        # What came with the headers is in this process already.
        try:
            head = len(response.peek()) if sock is not None and self._splices else 0
        except (OSError, http.client.HTTPException) as error:
            raise ReadFailed(describe(error)) from None
        failure = None
        while position < end and failure is None:
            most = min(head or PIECE, end - position)
            if sock is not None and self._splices and not head:
                count = self._splice(response, sock, sink, position, most)
            else:
                count, failure = self._copy(response, sink, position, most)
            head -= min(head, count)
            position += count
            yield count
        if failure is not None:
            raise ReadFailed(failure)
        if response.length == 0:
            response.close()

    def _copy(
        self, response: http.client.HTTPResponse, sink: Sink, position: int, most: int
    ) -> tuple[int, str | None]:
        """Writes the next bytes by way of a buffer; returns how many, and why no more will come."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(PIECE))
        count, failure, until = 0, None, time.monotonic() + LONGEST
        while count < most and failure is None and (not count or time.monotonic() < until):
            try:
                data = response.read1(min(READ, most - count))
            except (OSError, http.client.HTTPException) as error:
                failure = describe(error)
                break
            failure = None if data else CUT
            self._buffer[count : count + len(data)] = data
            count += len(data)
        sink.write(self._buffer[:count], position)
        return count, failure

    def _splice(
        self,
        response: http.client.HTTPResponse,
        sock: socket.socket,
        sink: Sink,
        position: int,
        most: int,
    ) -> int:
        """Writes what is there by way of the pipe; returns how much, 0 when this system cannot."""
        if self._pipe is None:
            self._pipe = _pipe()
        drain, fill = self._pipe
        count = left = self._fill(fill, sock, most)
        assert response.length is not None
        response.length -= count
        while left:
            try:
                with sink.writing:
                    moved = os.splice(drain, sink.fd, left, offset_dst=position)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self._splices = False
                data = os.read(drain, left)
                sink.write(memoryview(data), position)
                moved = len(data)
            position += moved
            left -= moved
        return count

    def _fill(self, pipe: int, sock: socket.socket, most: int) -> int:
        """Moves up to `most` bytes into the pipe, as they come in; 0 when this system cannot."""
        count, readable, until = 0, False, time.monotonic() + LONGEST
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while count < most and (not count or time.monotonic() < until):
            try:
                moved = os.splice(sock.fileno(), pipe, most - count, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                if count and (readable or not poll.poll(LINGER * 1000)):
                    break  # the pipe is full, or the connection pauses
                if not count and not poll.poll(self._timeout * 1000):
                    raise ReadFailed(describe(TimeoutError())) from None
                readable = True
            except OSError as error:
                if count:
                    break  # what came before is good, and the next call meets the error again
                if error.errno not in UNSUPPORTED:
                    raise ReadFailed(describe(error)) from None
                self._splices = False
                break
            else:
                if not moved and not count:
                    raise ReadFailed(CUT)
                if not moved:
                    break
                count, readable = count + moved, False
        return count


def _pipe() -> tuple[int, int]:
    """A pipe with room for PIECE bytes, or for as many as this user may still have."""
    drain, fill = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(fill, fcntl.F_SETPIPE_SZ, PIECE)
    except OSError:
        pass  # what it has does it too, by more calls
    return drain, fill
