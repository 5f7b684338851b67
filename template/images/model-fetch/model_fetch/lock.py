"""One process at a time fetches a version; the others wait, and notice when it died.

Three layers, since none suffices. `flock` is free at once when its holder dies, but some network
file systems keep it to one machine, or to one mount, or have none. `mkdir` is exclusive on all of
them: so a holder makes a folder, `.<version>.claim-<number>`; the highest number holds. And since a
folder outlives its maker, the holder puts a sign of life into it, each time as a fresh file under
the old name, which other machines see at once (an overwritten file they may not: SeaweedFS).

Who gets the `flock` and finds a claim watches it: one that beats is alive and the `flock` a lie; one
that stands still for the lease is dead, and the next number is free. Only differences that the
watcher sees on its own monotonic clock count, so clocks may be wrong or jump.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import reading, volume
from .chunks import boot_id
from .console import Console, duration
from .failures import LockTimeout
from .stop import Stop

LONGEST_RECORD = 1024  # bytes
HIGHEST = 1_000_000_000  # claims of one version: nobody counts that far
POLL = 0.25  # seconds between two tries
SAY_EVERY = 10.0  # seconds between two lines that say so


class LockLost(Exception):
    """Another process took the lock over because this one showed no sign of life."""


@dataclass(frozen=True, slots=True)
class Record:
    """A holder's sign of life."""

    token: str
    where: str
    """Kernel and mount on which its `flock` can be seen."""

    beat: int
    bytes: int
    """So far."""

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """None where there is none, or nothing that a holder wrote."""
        data = volume.read_small(path, LONGEST_RECORD)
        try:
            fields = reading.mapping(reading.document(data or b"", "it"), "it")
            return cls(
                reading.text(fields["token"], "token", r"[ -~]*", longest=200),
                reading.text(fields["boot"], "boot", longest=200),
                reading.count(fields["beat"], "beat"),
                reading.count(fields["bytes"], "bytes"),
            )
        except (reading.UnreadableError, KeyError):
            return None

    def write(self, path: Path) -> None:
        """Puts the record there as a fresh file, flushed and then renamed."""
        fresh = path.with_name(path.name + ".new")
        content = {"token": self.token, "boot": self.where, "beat": self.beat, "bytes": self.bytes}
        volume.write_new(fresh, json.dumps(content).encode())
        volume.sync(fresh)
        os.replace(fresh, path)


@dataclass(frozen=True, slots=True)
class Claim:
    """A folder that says who holds the lock."""

    number: int
    folder: Path

    @property
    def beat(self) -> Path:
        return self.folder / "beat"

    def remove(self) -> None:
        volume.remove(self.folder)


def claims(lock: Path) -> list[Claim]:
    """The claims on a lock, the one that holds it last."""
    stem = lock.name.removesuffix(".lock") + ".claim-"
    pattern = re.compile(re.escape(stem) + "([1-9][0-9]{0,9})")
    with os.scandir(lock.parent) as entries:
        found = [(pattern.fullmatch(entry.name), entry.path) for entry in entries]
    numbered = [(int(match[1]), Path(path)) for match, path in found if match]
    return [Claim(number, path) for number, path in sorted(numbered) if number < HIGHEST]


def claim(lock: Path, number: int) -> Claim:
    """The claim of a number, whether it is there or not."""
    stem = lock.name.removesuffix(".lock")
    return Claim(number, lock.with_name(f"{stem}.claim-{number}"))


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

    path: in a folder that is there
    lease: seconds without a sign of life after which a holder elsewhere counts as dead
    progress: bytes so far, told to those who wait
    Raises: LockTimeout after `timeout` seconds; OSError. Sets `stop` with LockLost when the lock
    goes to somebody else.
    """
    fd = _open(path)
    try:
        where = f"{boot_id()}:{os.fstat(fd).st_dev}"
        token = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(6).hex()}"
        mine = _acquire(fd, path, where, lease, timeout, console, stop, done)
        if mine is None:
            yield None
            return
        if os.fstat(fd).st_nlink == 1:
            os.ftruncate(fd, 0)  # what a version 0.1.0 left
        hold = Hold(mine, path, Record(token, where, 0, 0), lease, progress, stop)
        try:
            hold.start()
            yield hold
        finally:
            hold.end()
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    """The file that `flock` is for."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        return volume.open_regular(path, flags, 0o664)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EEXIST, errno.EISDIR, errno.ENXIO):
            raise
        volume.remove(path)  # a link, a pipe, a folder: of no run of this program
        return volume.open_regular(path, flags, 0o664)


def _acquire(
    fd: int,
    path: Path,
    where: str,
    lease: float,
    timeout: float,
    console: Console,
    stop: Stop,
    done: Callable[[], bool],
) -> Claim | None:
    """Waits for the lock; returns the claim that was made, None when there is no more need."""
    began = time.monotonic()
    spoke = -SAY_EVERY
    seen: tuple[int, Record | None] | None = None
    seen_at = began
    while True:
        stop.check()
        now = time.monotonic()
        flocked, supported = _flock(fd)
        number, record = _holder(path)
        if (number, record) != seen:
            seen, seen_at = (number, record), now
        if flocked or not supported:
            free = number == 0 and record is None
            dead = flocked and record is not None and record.where == where
            if free or dead or now - seen_at >= lease:
                if not free:
                    name = record.token if record else "another process"
                    console.info(f"taking over from {name}, which is gone")
                mine = claim(path, number + 1)
                try:
                    if mine.number < HIGHEST:
                        mine.folder.mkdir()
                        return mine
                    claim(path, number).remove()  # nobody's
                except FileExistsError:  # another one was faster
                    pass
            if flocked:
                fcntl.flock(fd, fcntl.LOCK_UN)
        if done():
            return None
        if now - began >= timeout:
            raise LockTimeout(
                f"another process has been fetching this version for {duration(now - began)}: "
                "look at the other pods' logs, or wait longer with --lock-timeout"
            )
        if now - spoke >= SAY_EVERY:
            spoke = now
            console.info(
                f"waiting for {record.token if record else 'another process'}, which fetches this "
                f"version ({(record.bytes if record else 0) / 1e6:,.0f} MB so far)"
            )
        stop.sleep(POLL)


def _holder(path: Path) -> tuple[int, Record | None]:
    """Number of the highest claim, 0 where there is none, and the holder's sign of life."""
    found = claims(path)
    if found:
        return found[-1].number, Record.read(found[-1].beat)
    return 0, Record.read(path)  # where version 0.1.0 of this program kept its own


class Hold:
    """A lock that is held: shows signs of life, and stops the run when another has taken it over."""

    def __init__(
        self,
        mine: Claim,
        path: Path,
        record: Record,
        lease: float,
        progress: Callable[[], int],
        stop: Stop,
    ) -> None:
        self._mine, self._path, self._record = mine, path, record
        self._progress, self._stop = progress, stop
        self._interval = min(lease / 5, 3.0)
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)

    def start(self) -> None:
        self._record.write(self._mine.beat)
        for other in claims(self._path):
            if other.number < self._mine.number:
                other.remove()
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken the lock over."""
        for _ in range(2):
            number, record = _holder(self._path)
            if record is not None:
                break
            time.sleep(0.05)  # not every file system renames in one step
        return number != self._mine.number or record is None or record.token != self._record.token

    def _run(self) -> None:
        beat = 0
        while not self._quit.wait(self._interval):
            try:
                if self.lost:
                    self._stop.set(LockLost())
                    return
                beat += 1
                replace(self._record, beat=beat, bytes=self._progress()).write(self._mine.beat)
            except OSError:
                continue

    def end(self) -> None:
        self._quit.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if not self.lost:
                self._mine.remove()
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
