"""safetensors files, read and written in blocks of rows, so that memory never holds a whole model.

Format: 8 bytes little-endian length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"). numpy's own reader of that format cannot read
bfloat16, so the three floating types are widened to float32 here. Reading a header needs the
standard library alone; numpy is imported where numbers are read or written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import reading, volume
from .errors import UnsuitableModelError
from .reading import UnreadableError

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
    def end(self) -> int:
        """Byte of the file behind the last element."""
        return self.offset + math.prod(self.shape) * ITEM_BYTES[self.dtype]

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

    Raises: UnsuitableModelError for all that safetensors' own reader refuses (0.4.5, which TEI has:
        tensor.rs, SafeTensors::read_metadata and Metadata::validate), in words about the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _not_whole(path, size)
        text = file.read(length)
    try:
        header = reading.mapping(reading.document(text, "it", MAX_HEADER_BYTES), "it")
        metadata = header.pop("__metadata__", None)
        if metadata is not None:
            texts = reading.mapping(metadata, "its __metadata__").values()
            if not all(isinstance(value, str) for value in texts):
                raise UnreadableError("its __metadata__ is not of texts")
        tensors = {name: _stored(name, entry, path, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.end)):
            if tensor.offset != end:
                raise UnreadableError(f"has a gap or an overlap before the tensor {tensor.name}")
            end = tensor.end
    except UnreadableError as error:
        raise _not_whole(path, size, str(error)) from None
    if end != size:
        raise _not_whole(path, size, f"its header describes {end:,} bytes")
    return tensors


def _stored(name: str, entry: object, path: Path, data: int) -> StoredTensor:
    """A header's entry, checked by itself. data: where the tensors' bytes begin."""
    fields = reading.mapping(entry, f"the tensor {name}")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnreadableError(f"the tensor {name} has no dtype that TEI knows")
    lengths = tuple(
        reading.count(n, f"the tensor {name}'s shape")
        for n in reading.items(shape, f"the tensor {name}'s shape")
    )
    where = f"the tensor {name}'s data_offsets"
    bounds = [reading.count(offset, where) for offset in reading.items(offsets, where)]
    if len(bounds) != 2 or bounds[1] - bounds[0] != _bytes_of(dtype, lengths):
        raise UnreadableError(f"{where} do not fit its shape")
    return StoredTensor(name, dtype, lengths, path, data + bounds[0])


def _bytes_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None when a product on the way leaves 64 bits, as in Rust."""
    count = 1
    for length in (*shape, ITEM_BYTES[dtype]):
        count *= length
        if count >= 1 << 64:
            return None
    return count


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
        weights = reading.mapping(reading.document(index.read_bytes()), "it")["weight_map"]
        shards = {reading.text(name, "it") for name in reading.mapping(weights, "it").values()}
    except (OSError, UnreadableError, KeyError):
        shards = set()
    if not shards:
        raise UnsuitableModelError(
            f"{index.name} has no readable weight_map: register the model again."
        )
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
    """Write a safetensors file from blocks of rows, and make sure that it is in its store.

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
        written = volume.Written(path.parent)
        with partial.open("wb") as file:
            for piece in chain([len(encoded).to_bytes(8, "little"), encoded], blocks):
                data = memoryview(piece)
                file.write(data)
                written.add(data)
            size = file.tell() - 8 - len(encoded)
        if size != end:
            raise AssertionError(f"{size} bytes written for a header of {end}")
        written.check(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _not_whole(path: Path, size: int, why: str = "its header is missing") -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{path.name} ({size:,} bytes) is not a whole safetensors file ({why}): the file is damaged or"
        " cut short, or a Git LFS pointer; register the model again."
    )
