"""safetensors files, read and written in blocks of rows, so that memory never holds a whole model.

Format: 8 bytes little-endian length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"). numpy's own reader of that format cannot read
bfloat16, so the three floating types are widened to float32 here. Reading a header needs the
standard library alone; numpy is imported where numbers are read or written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnsuitableModelError

if TYPE_CHECKING:
    import numpy

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes of one element, by the names that headers use."""

FLOATING = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""What can be read as numbers here; BF16 is read as its 16 bits and widened."""

BLOCK_BYTES = 16 * 1024 * 1024
"""Bytes of float32 in one block of rows: large enough for the disk, small beside a model."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit for a header (safetensors `MAX_HEADER_SIZE`)."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file, not read yet."""

    name: str
    dtype: str
    """The header's name of the type, such as BF16."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Bytes from the start of the file to the first element."""

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements of one row: the product of all dimensions but the first."""
        return math.prod(self.shape[1:])

    def read(self, first: int = 0, last: int | None = None) -> numpy.ndarray:
        """Rows `first` to `last` (exclusive) as float32, of shape (rows, columns).

        Raises: UnsuitableModelError for a type that is not floating point, or a file cut short.
        """
        import numpy

        if self.dtype not in FLOATING:
            raise UnsuitableModelError(
                f"The tensor {self.name} in {self.path.name} is {self.dtype}; only"
                " float32, float16 and bfloat16 weights can be read."
            )
        last = self.rows if last is None else last
        count = (last - first) * self.columns
        start = self.offset + first * self.columns * ITEM_BYTES[self.dtype]
        stored = numpy.fromfile(self.path, FLOATING[self.dtype], count, offset=start)
        if stored.size != count:
            raise UnsuitableModelError(f"{self.path.name} ends inside the tensor {self.name}.")
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            stored = (stored.astype("<u4") << 16).view("<f4")
        return stored.astype("<f4", copy=False).reshape(last - first, self.columns)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name.

    Raises: UnsuitableModelError when the file is not safetensors, or not whole: the header must
        describe exactly the bytes that follow it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _not_whole(path, size)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise _not_whole(path, size) from None
    if not isinstance(header, dict):
        raise _not_whole(path, size)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    try:
        for name, entry in header.items():
            dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
            first, last = entry["data_offsets"]
            if dtype in ITEM_BYTES and last - first != math.prod(shape) * ITEM_BYTES[dtype]:
                raise UnsuitableModelError(
                    f"The tensor {name} in {path.name} has {last - first} bytes, not those of"
                    f" {dtype} {list(shape)}: the file is damaged; register the model again."
                )
            tensors[name] = StoredTensor(name, dtype, shape, path, 8 + length + first)
            end = max(end, last)
    except (KeyError, TypeError, ValueError):
        raise _not_whole(path, size) from None
    if 8 + length + end != size:
        raise UnsuitableModelError(
            f"{path.name} has {size} bytes, but its header describes {8 + length + end}:"
            " the file is damaged or cut short; register the model again."
        )
    return tensors


def read_headers(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of a folder's weights, one file or shards, by name.

    Args: stem: `model` for a model, `adapter_model` for a PEFT adapter.
    Raises: UnsuitableModelError when there are no safetensors weights, or a shard is missing.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        pickled = [
            name for name in ("pytorch_model.bin", f"{stem}.bin") if (folder / name).exists()
        ]
        raise UnsuitableModelError(
            f"The weights are in {pickled[0]} only, a pickle that is never opened here: save the"
            " model with safetensors and register that version."
            if pickled
            else f"There is no {stem}.safetensors in {folder.name}: register the model with its"
            " safetensors weights."
        )
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnsuitableModelError(f"{index.name} has no readable weight_map.") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(shards):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise UnsuitableModelError(f"{index.name} names the shard {shard}, which is missing.")
        tensors |= read_header(folder / shard)
    return tensors


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) rows of blocks of about BLOCK_BYTES of float32."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    blocks: Iterable[numpy.ndarray],
    dtype: str = "F16",
) -> None:
    """Write a safetensors file from blocks of rows, and make sure that it is on the disk.

    Args:
        path: written under this name plus `.partial` and renamed when whole, so that `path`
            is either absent or complete, whenever the process dies.
        shapes: the tensors in the order in which their blocks come.
        blocks: arrays of the stored type, together exactly the tensors' elements.
        dtype: F16 or F32, of all tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the data: keep it aligned
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for block in blocks:
                file.write(block.data)
            file.flush()
            os.fsync(file.fileno())
            written = file.tell() - 8 - len(encoded)
        if written != end:
            raise AssertionError(f"{written} bytes written for a header of {end}")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _not_whole(path: Path, size: int) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{path.name} ({size} bytes) is not a whole safetensors file: it was damaged or cut short"
        " (a Git LFS pointer looks like this too); register the model again."
    )
