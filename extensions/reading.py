"""What comes from outside, read by type: an answer, a file of a model, a record on a shared volume.

Everything that does not fit raises UnreadableError, whose text says what in a few printable words;
who reads knows which of its own errors that is. Only the standard library.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

MOST_COUNTED = 1 << 53
"""Sizes and numbers above are nobody's; up to here a float holds each of them exactly."""

LONGEST = 8 << 20
DEEPEST = 100
"""Brackets in each other; serde_json (TEI, safetensors) stops at 128."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """What was read is not what it must be."""


def document(data: bytes | str, name: str = "it", longest: int = LONGEST) -> Any:
    """The JSON text `data`, as strict readers take it: serde_json's rules, so that TEI agrees.

    Refused: more than `longest` bytes, other encodings than UTF-8, a byte order mark, NaN and
    Infinity, numbers beyond a float, a key given twice, half a surrogate pair, more than DEEPEST
    brackets in each other.
    """
    if len(data) > longest:
        raise UnreadableError(f"{name} is longer than {longest} bytes")
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_whole,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnreadableError as error:
        raise UnreadableError(f"{name} {error}") from None
    except (ValueError, RecursionError):
        raise UnreadableError(f"{name} is not JSON") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = (
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        )
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return value
    raise UnreadableError(f"{name} is nested too deeply")


def mapping(value: object, name: str) -> dict[str, Any]:
    """A JSON object."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise UnreadableError(f"{name} is not a mapping")


def items(value: object, name: str) -> list[Any]:
    """A JSON list."""
    if isinstance(value, list):
        return value
    raise UnreadableError(f"{name} is not a list")


def text(value: object, name: str, pattern: str = r"[^\0]*", longest: int = 4096) -> str:
    """A text that matches all of `pattern`, in at most `longest` characters."""
    if not isinstance(value, str):
        raise UnreadableError(f"{name} is not a text")
    if len(value) > longest or not re.fullmatch(pattern, value, re.DOTALL):
        raise UnreadableError(f"{name} is not what it must be")
    return value


def count(value: object, name: str, most: int = MOST_COUNTED) -> int:
    """A whole number from 0 to `most`; true and 1.0 are none."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    raise UnreadableError(f"{name} is not a whole number from 0 to {most}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise UnreadableError("has a key twice")
    return values


def _no_number(text: str) -> float:
    raise UnreadableError(f"has {text}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise UnreadableError("has a number that is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 300:  # 10^308 is the largest float
        raise UnreadableError("has a number that is too large")
    return int(text)
