"""The reader of what comes from outside: every kind of thing that does not fit, and what does."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions import reading
from extensions.reading import UnreadableError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(st.characters(codec="utf-8"))
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe{\0}\0", "it is not JSON"),
        (b"\xef\xbb\xbf{}", "it is not JSON"),
        (b"[NaN]", "it has NaN, which is no number of JSON"),
        (b'{"a": -Infinity}', "it has -Infinity, which is no number of JSON"),
        (b"[1e999]", "it has a number that is too large"),
        (b"[" + b"9" * 301 + b"]", "it has a number that is too large"),
        (b"9" * 5000, "it has a number that is too large"),
        (b'{"a": 1, "\\u0061": 2}', "it has a key twice"),
        (b'[{"b": {"a": 1, "a": 1}}]', "it has a key twice"),
        (b'"\\ud800"', "it is not JSON"),
        (b'{"\\uDFFF": 1}', "it is not JSON"),
        (b"[" * 101 + b"]" * 101, "it is nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "it is nested too deeply"),
        (b"[" * 100_000, "it is not JSON"),
        (b" " * 33, "it is longer than 32 bytes"),
    ],
)
def test_what_no_strict_reader_takes_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(UnreadableError) as refusal:
        reading.document(data, longest=32 if b"  " in data else reading.LONGEST)
    assert str(refusal.value) == said


@settings(deadline=None, database=None)
@given(value=JSON)
def test_what_fits_arrives(value: object) -> None:
    assert reading.document(json.dumps(value).encode()) == value
    assert reading.document(json.dumps(value, ensure_ascii=False).encode()) == value


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert reading.document(rb'"\ud83d\ude80"') == "🚀"
    assert reading.document(b"[" * 100 + b"]" * 100)


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (reading.mapping, [{}, {"a": 1}], [None, [], "x", {1: 2}]),
        (reading.items, [[], [None]], [None, {}, "x", ()]),
        (reading.text, ["", "a\nb"], [None, 1, [], "a\0", "x" * 5000, b"x"]),
        (reading.count, [0, 1, 2**53], [None, True, 1.0, -1, 2**53 + 1, "1", 1e3]),
    ],
)
def test_a_value_is_of_its_type(
    read: Callable[[object, str], object], good: list[object], bad: list[object]
) -> None:
    for value in good:
        assert read(value, "x") == value
    for value in bad:
        with pytest.raises(UnreadableError, match=r"^x is not "):
            read(value, "x")
