"""Files of a volume that others write to as well, and file systems that are not the kernel's own.

Nothing is opened through a link, nor anything but a regular file, so that whatever was left on a
volume can neither lead a write elsewhere nor make an open wait for ever.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from .failures import VerificationError

PIECE = 1 << 20  # bytes that are read at a time

# What this kernel itself writes to a disk or to memory (linux/magic.h, OpenZFS' zfs_vfsops.c): ext,
# XFS, Btrfs, tmpfs, ramfs, overlay, ZFS, F2FS, bcachefs. Behind every other is a program or machine.
LOCAL = frozenset(
    {
        *(0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x858458F6),
        *(0x794C7630, 0x2FC12FC1, 0xF2F52010, 0xCA451A4E),
    }
)


def is_local(path: Path) -> bool:
    """Whether the kernel itself holds the file system, so that its cache and the disk agree."""
    import ctypes  # 10 ms, so only where something is fetched

    buffer = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None).statfs(os.fsencode(path), buffer) != 0:
        return False
    return int.from_bytes(buffer.raw[:4], sys.byteorder) in LOCAL


def open_regular(path: Path, flags: int, mode: int = 0o644) -> int:
    """Opens a regular file, and nothing else; never follows a link at its end.

    Raises: OSError, FileExistsError when something else is there.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileExistsError(17, "is no regular file", str(path))
    return fd


def write_new(path: Path, content: bytes) -> None:
    """Makes a file of that name, in the place of whatever stands there."""
    remove(path)
    fd = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with open(fd, "wb") as stream:
        stream.write(content)


def write_whole(path: Path, content: bytes) -> None:
    """Puts a file in the place of whatever stands there, in one step, and sees that it is in its store.

    Raises: OSError, VerificationError.
    """
    fresh = path.with_name(path.name + ".new")
    written = Written(path.parent)
    write_new(fresh, content)
    written.add(content)
    written.check(fresh)
    os.replace(fresh, path)


class Written:
    """What is written to a file, so that it can be compared with what its store then has."""

    def __init__(self, folder: Path) -> None:
        """folder: of the file; where this kernel itself holds it, nothing is compared"""
        self._crc = None if is_local(folder) else 0

    def add(self, data: bytes | memoryview) -> None:
        """These bytes were written next."""
        if self._crc is not None:
            self._crc = zlib.crc32(data, self._crc)

    def check(self, path: Path) -> None:
        """Flushes the file, which is closed, and compares it.

        Raises: OSError, VerificationError.
        """
        if self._crc is None:
            return sync(path)
        found = 0
        for piece in read_back(path):
            found = zlib.crc32(piece, found)
        if found == self._crc:
            return None
        raise VerificationError(
            f"{path}: the volume does not hold what was written to it: use another volume for the "
            "cache, or mend this one"
        )


def read_small(path: Path, most: int) -> bytes | None:
    """A small file, whole; None where there is none, or none of that kind and size."""
    try:
        fd = open_regular(path, os.O_RDONLY)
    except OSError:
        return None
    with open(fd, "rb", buffering=0) as stream:
        try:
            content = stream.read(most + 1)
        except OSError:
            return None
    return content if len(content) <= most else None


def is_folder(path: Path) -> bool:
    """Whether a folder is there, and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def make_folder(path: Path) -> None:
    """Makes a folder where none is.

    Raises: OSError, NotADirectoryError when a link or a file is in its place.
    """
    try:
        path.mkdir()
    except FileExistsError:
        if not is_folder(path):
            raise NotADirectoryError(20, "is a link or a file: remove it", str(path)) from None


def remove(path: Path) -> None:
    """Removes a file, a link (never what it leads to) or a folder, as far as that goes."""
    try:
        if is_folder(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except (OSError, RecursionError):  # 1,000 folders in each other
        pass


def entries(root: Path, names: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """What stands below a folder, by path, as it is (lstat).

    names: only the folders that lead to these are looked into; others are entries themselves
    """
    folders = {"", *(name[:at] for name in names for at, c in enumerate(name) if c == "/")}
    ahead = [""]
    while ahead:
        below = ahead.pop()
        with os.scandir(root / below) as found:
            for entry in found:
                path = f"{below}/{entry.name}" if below else entry.name
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISDIR(status.st_mode) and path in folders:
                    ahead.append(path)
                else:
                    yield path, status


def keep_only(root: Path, names: Collection[str], owner: int) -> list[str]:
    """Removes all below a folder but the named regular files of one user that have no second name.

    Returns: what was removed.
    """
    removed = []
    for path, status in list(entries(root, names)):
        if not (path in names and is_own(status, owner)):
            remove(root / path)
            removed.append(path)
    return removed


def is_own(status: os.stat_result, owner: int) -> bool:
    """Whether a file can be written without writing to anything else."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == owner


def pieces(fd: int) -> Iterator[memoryview]:
    """The bytes of an open file, in order, in one buffer that is used again and again."""
    buffer = memoryview(bytearray(PIECE))
    position = 0
    while count := os.preadv(fd, [buffer], position):
        yield buffer[:count]
        position += count


def read_back(path: Path) -> Iterator[memoryview]:
    """The bytes of a file as its store has them: flushed, and past this kernel's cache."""
    fd = open_regular(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        yield from pieces(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Flushes a folder with all that is in it; what links lead to is not flushed."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                sync(path)
        sync(Path(folder))
