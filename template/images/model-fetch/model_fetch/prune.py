"""Removes old versions of a model, when asked to, and never one that may be in use.

A pod that runs has no process that this one could see, so use is told by the last start: every
start touches the version's marker. Kept are the present version, the `keep` others that were
started last, every version started within `keep_hours`, every one that is locked, and every one
that a process on this machine has mapped.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from . import volume
from .cache import MARKER, VersionFolder
from .console import Console
from .lock import claims


def prune(folder: VersionFolder, keep: int, keep_hours: float, console: Console) -> None:
    """Removes what the rule above does not keep. Failing to is a warning, never an error."""
    cutoff = time.time() - keep_hours * 3600
    others = sorted(_versions(folder), key=_last_start, reverse=True)
    try:
        for path in others[keep:]:
            if _last_start(path) < cutoff and not _mapped(path) and _remove(path, cutoff):
                console.info(f"pruned {path}: last started more than {keep_hours:g} hours ago")
        for path in folder.parent.glob(".*.staging-*"):
            lock = path.parent / f"{path.name.split('.staging-')[0]}.lock"
            if os.lstat(path).st_mtime < cutoff and lock != folder.lock and _lock(lock):
                volume.remove(path)
    except OSError as error:
        console.warning(f"old versions could not be pruned ({error.strerror})")


def _versions(folder: VersionFolder) -> Iterator[Path]:
    for path in folder.parent.iterdir():
        other = path.name.isdigit() and path != folder.path
        if other and volume.is_folder(path) and (path / MARKER).is_file():
            yield path


def _last_start(path: Path) -> float:
    try:
        return os.lstat(path / MARKER).st_mtime
    except OSError:
        return time.time()


def _mapped(path: Path) -> bool:
    """Whether a process that can be seen from here has a file of the folder in its memory."""
    needle = f"{path.resolve()}/".encode()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if needle in maps.read_bytes():
                return True
        except OSError:
            continue
    return False


def _remove(path: Path, cutoff: float) -> bool:
    if not _lock(path.parent / f".{path.name}.lock"):
        return False
    away = path.parent / f".{path.name}.pruned-{os.urandom(4).hex()}"
    path.rename(away)
    if _last_start(away) >= cutoff:  # a pod started with it in this very moment
        away.rename(path)
        return False
    volume.remove(away)
    return True


def _lock(path: Path) -> bool:
    """Whether nobody holds the lock of a version now."""
    try:
        fd = volume.open_regular(path, os.O_RDWR | os.O_CREAT, 0o664)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_size == 0 and not claims(path)
    except OSError:
        return False
    finally:
        os.close(fd)
