"""One process at a time fetches a version; the others wait, and notice when it died.

Two layers, since neither suffices. `flock` is free at once when its holder dies, but some network
file systems keep it to one machine or have none. So the holder also writes a sign of life into the
lock file. Who gets the `flock` and finds a record of another machine watches it: one that beats is
alive and the `flock` a lie; one that stands still for the lease is dead. Only differences that
the watcher sees on its own monotonic clock count, so clocks may be wrong or jump.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .chunks import boot_id
from .console import Console, duration
from .failures import LockTimeout
from .stop import Stop

RECORD_SIZE = 512  # bytes; one write, so a reader never sees half of it
POLL = 0.25  # seconds between two tries
SAY_EVERY = 10.0  # seconds between two lines that say so


class LockLost(Exception):
    """Another process took the lock over because this one showed no sign of life."""


@contextmanager
def held(
    path: Path,
    *,
    lease: float,
    timeout: float,
    console: Console,
    stop: Stop,
    done: Callable[[], bool],
    progress: Callable[[], int],
) -> Iterator[Hold | None]:
    """Holds the lock at `path`; yields None instead when `done` becomes true while waiting.

    lease: seconds without a sign of life after which a holder on another machine counts as dead
    progress: bytes so far, told to those who wait
    Raises: LockTimeout after `timeout` seconds; OSError. Sets `stop` with LockLost when the lock
    goes to somebody else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
    try:
        token = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(6).hex()}"
        if not _acquire(fd, path, token, lease, timeout, console, stop, done):
            yield None
            return
        hold = Hold(fd, path, token, lease, progress, stop)
        try:
            yield hold
        finally:
            hold.end()
    finally:
        os.close(fd)


def _acquire(
    fd: int,
    path: Path,
    token: str,
    lease: float,
    timeout: float,
    console: Console,
    stop: Stop,
    done: Callable[[], bool],
) -> bool:
    began = time.monotonic()
    spoke = -SAY_EVERY
    seen: dict[str, Any] | None = None
    seen_at = began
    while True:
        stop.check()
        now = time.monotonic()
        flocked, supported = _flock(fd)
        record = _read(path)
        if record != seen:
            seen, seen_at = record, now
        if flocked or not supported:
            local = supported and record is not None and record.get("boot") == boot_id()
            if record is None or local or now - seen_at >= lease:
                if record is not None:
                    console.info(f"taking over from {record.get('token', '?')}, which is gone")
                _write(fd, token, 0, 0)
                if supported:
                    return True
                # Without flock the last writer wins; both have looked again by then.
                stop.sleep(lease / 4)
                if (_read(path) or {}).get("token") == token:
                    return True
            if flocked:
                fcntl.flock(fd, fcntl.LOCK_UN)
        if done():
            return False
        if now - began >= timeout:
            raise LockTimeout(
                f"another process has been fetching this version for {duration(now - began)}: "
                "look at the other pods' logs, or wait longer with --lock-timeout"
            )
        if now - spoke >= SAY_EVERY:
            spoke = now
            holder = record or {}
            console.info(
                f"waiting for {holder.get('token', 'another process')}, which fetches this version"
                f" ({holder.get('bytes', 0) / 1e6:,.0f} MB so far)"
            )
        stop.sleep(POLL)


class Hold:
    """A lock that is held: keeps its record alive, and stops the run when another stands there."""

    def __init__(
        self,
        fd: int,
        path: Path,
        token: str,
        lease: float,
        progress: Callable[[], int],
        stop: Stop,
    ) -> None:
        self._fd, self._path, self._token = fd, path, token
        self._progress, self._stop = progress, stop
        self._interval = min(lease / 5, 3.0)
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken the lock over."""
        for _ in range(2):
            record = _read(self._path)
            if record is not None:
                return record.get("token") != self._token
            time.sleep(0.05)  # a reader may meet a write that is under way
        return True

    def _run(self) -> None:
        beat = 0
        while not self._quit.wait(self._interval):
            try:
                if self.lost:
                    self._stop.set(LockLost())
                    return
                beat += 1
                _write(self._fd, self._token, beat, self._progress())
            except OSError:
                continue

    def end(self) -> None:
        self._quit.set()
        self._thread.join()
        try:
            if not self.lost:
                os.ftruncate(self._fd, 0)
        except OSError:
            pass


def _flock(fd: int) -> tuple[bool, bool]:
    """(whether the lock is ours, whether the file system has such locks)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
            return False, True
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            return False, False
        raise
    return True, True


def _read(path: Path) -> dict[str, Any] | None:
    """The holder's record. Opens the file anew, since only that makes NFS look at its server."""
    try:
        record = json.loads(path.read_bytes()[:RECORD_SIZE])
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _write(fd: int, token: str, beat: int, progress: int) -> None:
    record = {"token": token, "boot": boot_id(), "beat": beat, "bytes": progress}
    os.pwrite(fd, json.dumps(record).ljust(RECORD_SIZE).encode(), 0)
