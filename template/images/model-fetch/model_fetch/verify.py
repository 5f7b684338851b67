"""What makes a file the right one: its length, its digests, and safetensors' own structure."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from .embedding_model import PinnedFile

PIECE = 1 << 20
# safetensors refuses longer headers itself (100 MB, safetensors/src/tensor.rs MAX_HEADER_SIZE).
MAX_HEADER = 100_000_000


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


def read_pieces(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in order, in one buffer that is used again and again."""
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            yield buffer[:count]


def digest_file(path: Path, file: PinnedFile) -> Digests:
    """The digests of a file that is on the disk."""
    digests = Digests(file)
    for piece in read_pieces(path):
        digests.update(piece)
    return digests


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in read_pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def structure_problem(path: Path) -> str | None:
    """What is wrong with a safetensors file's own bookkeeping; None when it adds up.

    Catches a file that was cut or padded without any digest: eight bytes of header length, the
    header and the end of the last tensor make up exactly the file. Other files have no such rule.
    """
    if path.suffix != ".safetensors":
        return None
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return "too short for a safetensors file"
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER, size - 8):
            return "its safetensors header is longer than the file"
        try:
            header = json.loads(stream.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
            data = max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "its safetensors header cannot be read"
    if 8 + length + data != size:
        return f"its safetensors header speaks of {8 + length + data} bytes, the file has {size}"
    return None
