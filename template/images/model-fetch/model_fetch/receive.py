"""Brings a body from a connection into a file: within the kernel where it can, else by a buffer."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .transport import describe

PIECE = 1 << 20  # bytes that are moved at a time: the most that a pipe may hold (pipe(7))
LINGER = 100  # milliseconds to wait for more before what has come is written
F_SETPIPE_SZ = 1031  # <linux/fcntl.h>; not in the fcntl of every Python
# What kernels, file systems and seccomp filters answer that have no splice for this (splice(2)).
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
CUT = "the connection was cut"


class ReadFailed(Exception):
    """The connection broke, or stood still for too long."""


@dataclass(frozen=True, slots=True)
class Sink:
    """A file that several connections write to."""

    fd: int

    writing: threading.Lock = field(default_factory=threading.Lock)
    """The kernel lets one thread at a time write to a file, and the others burn their time spinning
    for it (inode rwsem); here they sleep."""

    def write(self, data: memoryview, position: int) -> None:
        """Puts all of `data` there."""
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
        if not response.length:
            sock = None  # without a length the body's end must be found; an empty one has none
        # What came with the headers is in this process already.
        head = len(_from(response.peek)) if sock is not None and self._splices else 0
        while position < end:
            most = min(head or PIECE, end - position)
            if sock is not None and self._splices and not head:
                count = self._splice(response, sock, sink, position, most)
            else:
                count = self._copy(response, sink, position, most)
            head -= min(head, count)
            position += count
            yield count
        if response.length == 0:
            response.close()

    def _copy(
        self, response: http.client.HTTPResponse, sink: Sink, position: int, most: int
    ) -> int:
        """Writes the next bytes by way of a buffer; returns how many."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(PIECE))
        count = int(_from(response.readinto, self._buffer[:most]))
        if not count:
            raise ReadFailed(CUT)
        sink.write(self._buffer[:count], position)
        return count

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
        count, readable = 0, False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        while count < most:
            try:
                moved = os.splice(sock.fileno(), pipe, most - count, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                if count and (readable or not poll.poll(LINGER)):
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


def _from(read: Callable[..., Any], *arguments: object) -> Any:
    """Calls what reads from a connection. Raises ReadFailed."""
    try:
        return read(*arguments)
    except (OSError, http.client.HTTPException) as error:
        raise ReadFailed(describe(error)) from None


def _pipe() -> tuple[int, int]:
    """A pipe with room for PIECE bytes, or for as many as this user may still have."""
    drain, fill = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(fill, F_SETPIPE_SZ, PIECE)
    except OSError:
        pass  # what it has does it too, by more calls
    return drain, fill
