"""What makes a file the right one: its length, its digests, and safetensors' own structure."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import tensors, volume
from .embedding_model import PinnedFile
from .errors import UnsuitableModelError


class Digests:
    """The digests of one file, fed with its bytes in order."""

    def __init__(self, file: PinnedFile, always: bool = True) -> None:
        """always: compute SHA-256 also where the pin has none to compare with."""
        self.file = file
        self._sha256 = hashlib.sha256() if always or file.sha256 else None
        self._sha1 = (
            hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
            if file.blob_sha1
            else None
        )

    def __bool__(self) -> bool:
        return bool(self._sha256 or self._sha1)

    def update(self, data: memoryview) -> None:
        if self._sha256:
            self._sha256.update(data)
        if self._sha1:
            self._sha1.update(data)

    @property
    def sha256(self) -> str | None:
        return self._sha256.hexdigest() if self._sha256 else None

    def mismatch(self) -> str | None:
        """What differs from the pin, in words; None when nothing does."""
        pairs = (
            ("SHA-256", self._sha256, self.file.sha256),
            ("Git blob SHA-1", self._sha1, self.file.blob_sha1),
        )
        for name, computed, pinned in pairs:
            if computed and pinned and computed.hexdigest() != pinned.lower():
                return f"{name} is {computed.hexdigest()[:16]}…, pinned is {pinned[:16].lower()}…"
        return None


def digest_file(path: Path, file: PinnedFile) -> Digests:
    """The digests of a file that is on the disk."""
    digests = Digests(file)
    for piece in read_pieces(path):
        digests.update(piece)
    return digests


def read_pieces(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in order; also of one that a link leads to."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield from volume.pieces(fd)
    finally:
        os.close(fd)


def sha256_of(pieces: Iterable[memoryview]) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def structure_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file's own bookkeeping; None when it adds up.

    Catches a file that was cut or padded without any digest: eight bytes of header length, the
    header and the tensors make up exactly the file. Other files have no such rule.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        tensors.read_header(path)
    except UnsuitableModelError as error:
        return f"its safetensors header is wrong: {error}"
    return None
