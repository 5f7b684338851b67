"""safetensors headers: what this program takes, the format's own library takes, and TEI's version."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fetch import tensors
from model_fetch.errors import UnsuitableModelError

safetensors = pytest.importorskip("safetensors", reason="there is no safetensors to compare with")

TOO_NEW = {"F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Types that safetensors 0.8.0 has and 0.4.5, which TEI has, does not (tensor.rs, Dtype)."""


def file_of(header: Any, data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def ours(path: Path) -> bool:
    try:
        tensors.read_header(path)
    except UnsuitableModelError as error:
        return len(str(error)) > 600  # as good as no line
    return True


def theirs(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "numpy"):
            return True
    except safetensors.SafetensorError:
        return False


def tensor(dtype: str, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = tensor("F32", [1], [0, 4])
LIES: dict[str, tuple[Any, int]] = {
    "overlap": ({"a": ONE, "b": ONE}, 4),
    "half an overlap": ({"a": tensor("F32", [2], [0, 8]), "b": tensor("F32", [1], [4, 8])}, 8),
    "hole": ({"a": ONE, "b": tensor("F32", [1], [8, 12])}, 12),
    "not from 0": ({"b": tensor("F32", [1], [8, 12])}, 12),
    "negative offsets": ({"a": tensor("F32", [1], [-4, 0]), "b": ONE}, 4),
    "backwards": ({"a": tensor("F32", [1], [4, 0])}, 4),
    "negative shape": ({"a": tensor("F32", [-1, -1], [0, 4])}, 4),
    "shape of a fraction": ({"a": tensor("F32", [1.5], [0, 4])}, 4),
    "shape 1.0": ({"a": tensor("F32", [1.0], [0, 4])}, 4),
    "shape of texts": ({"a": tensor("F32", ["1"], [0, 4])}, 4),
    "shape of truth": ({"a": tensor("F32", [True], [0, 4])}, 4),
    "no list": ({"a": tensor("F32", 1, [0, 4])}, 4),
    "unknown dtype": ({"a": tensor("XX", [1], [0, 4])}, 4),
    "dtype in lower case": ({"a": tensor("f32", [1], [0, 4])}, 4),
    "dtype a list": ({"a": tensor(["F32"], [1], [0, 4])}, 4),  # type: ignore[arg-type]
    "offsets of floats": ({"a": tensor("F32", [1], [0.0, 4.0])}, 4),
    "offsets of texts": ({"a": tensor("F32", [1], ["0", "4"])}, 4),
    "offsets of null": ({"a": tensor("F32", [1], [0, None])}, 4),
    "three offsets": ({"a": tensor("F32", [1], [0, 4, 4])}, 4),
    "one offset": ({"a": tensor("F32", [1], [4])}, 4),
    "too long for its shape": ({"a": tensor("F32", [1], [0, 8])}, 8),
    "product beyond 64 bits": ({"a": tensor("F32", [2**40, 2**40, 0], [0, 0])}, 0),
    "huge shape": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', 4),
    "bytes behind the last": ({"a": ONE}, 8),
    "bytes missing": ({"a": ONE}, 3),
    "metadata a number": ({"__metadata__": 5, "a": ONE}, 4),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": ONE}, 4),
    "metadata a list": ({"__metadata__": ["pt"], "a": ONE}, 4),
    "tensor a number": ({"a": 1}, 0),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "a list": ([], 0),
    "nothing": (b"", 0),
    "UTF-16": (json.dumps({"a": ONE}).encode("utf-16"), 4),
    "not UTF-8": (b'{"\xff":' + json.dumps(ONE).encode() + b"}", 4),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "a key twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "50,000 brackets": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 4),
    "a comment behind it": (json.dumps({"a": ONE}).encode() + b" // x", 4),
}


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    header, data = LIES[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, data))
    assert not theirs(path), "the format's own library takes it"
    assert not ours(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, 0),
        ({"a": ONE}, 4),
        ({"b": tensor("F16", [2, 1], [4, 8]), "a": ONE}, 8),
        ({"a": tensor("F32", [], [0, 4])}, 4),
        ({"a": tensor("F32", [0, 5], [0, 0]), "b": ONE}, 4),
        ({"__metadata__": {"format": "pt"}, "a": ONE}, 4),
        (json.dumps({"a": ONE}).encode() + b"      ", 4),
        ({"ä ": tensor("BF16", [1, 2], [0, 4])}, 4),
        ({"a": tensor("BOOL", [4], [0, 4])}, 4),
    ],
    ids=str,
)
def test_an_honest_header_is_taken(tmp_path: Path, header: Any, data: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, data))
    assert theirs(path)
    assert ours(path)


NUMBERS = st.integers(-2, 12) | st.sampled_from([1.0, 2**53, 2**63, 2**64, "4", None, True])
DTYPES = st.sampled_from([*tensors.ITEM_BYTES, *sorted(TOO_NEW), "F128", 4])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES,
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
        "more": st.none(),
    },
)


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Headers of tensors side by side, in which one thing may be wrong."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(sorted(tensors.ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        first, end = end, end + (tensors._bytes_of(dtype, tuple(shape)) or 0)
        header[name] = tensor(dtype, shape, [first, end])
    if header and draw(st.booleans()):
        header[draw(st.sampled_from(sorted(header)))] = draw(ENTRIES)
    return header, draw(st.sampled_from([end, end + 1, max(end - 1, 0)]))


@settings(deadline=None, max_examples=400)
@given(case=nearly_right() | st.tuples(st.dictionaries(st.text(max_size=3), ENTRIES), NUMBERS))
def test_nothing_is_taken_that_the_format_s_own_library_refuses(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], Any]
) -> None:
    header, data = case
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    path.write_bytes(file_of(header, data if type(data) is int and 0 <= data < 99 else 0))
    new = any(isinstance(e, dict) and e.get("dtype") in TOO_NEW for e in header.values())
    assert ours(path) == (theirs(path) and not new)
