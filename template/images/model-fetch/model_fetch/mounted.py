"""The pinned files of a mounted store: linked to where they are, and compared with the pin."""

from __future__ import annotations

from . import volume
from .cache import KnownFile, Marker, Staging, VersionFolder
from .console import MB, Console
from .embedding_model import PinnedFile
from .failures import VerificationError
from .sources import Mounted
from .stop import Stop
from .verify import Digests, read_pieces, structure_problem


class NotAsPinned(VerificationError):
    """A file of the mounted store has other bytes than were pinned; another source may have them."""


def link_files(
    folder: VersionFolder, staging: Staging, source: Mounted, console: Console, stop: Stop
) -> dict[str, str | None]:
    """Links to every pinned file; returns SHA-256 by path, where it was computed.

    Every byte of what has a digest is read once, and then as long as size and time of change stay.
    """
    earlier = folder.mounted()
    known = earlier.files if earlier and earlier.source == source.name else ()
    before = {(file.path, file.size, file.mtime_ns): file.sha256 for file in known}
    files = []
    for file in folder.pin.files:
        stop.check()
        path = source.path(file)
        status = path.stat()
        key = (file.path, status.st_size, status.st_mtime_ns)
        digest = before.get(key)
        if digest is None or digest != (file.sha256 or digest).lower():
            if _has_digest(file):
                console.info(f"reading {path}, {file.size / MB:,.1f} MB, to compare its digest")
            digest = verify(source, file, stop)
        files.append(KnownFile(*key, digest))
        target = staging.target(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        volume.remove(target)
        target.symlink_to(path)
    if tuple(files) != known:
        pin = folder.pin.to_mapping()
        folder.remember(Marker(folder.fingerprint, source.name, tuple(files), (), pin))
    return {file.path: file.sha256 for file in files}


def verify(source: Mounted, file: PinnedFile, stop: Stop | None = None) -> str | None:
    """Compares a file with the pin; returns its SHA-256, None when the pin has no digest of it.

    Raises: NotAsPinned, and what `Mounted.path` does.
    """
    path = source.path(file)
    digests = Digests(file)
    if _has_digest(file):
        for piece in read_pieces(path):
            if stop is not None:
                stop.check()
            digests.update(piece)
    problem = structure_problem(path)
    if _has_digest(file):
        problem = digests.mismatch() or problem
    if problem:
        raise NotAsPinned(f"{path}: {problem}: register the model again")
    return digests.sha256 if _has_digest(file) else None


def _has_digest(file: PinnedFile) -> bool:
    return bool(file.sha256 or file.blob_sha1)
