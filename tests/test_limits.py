"""The limits that the docs name are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from extensions import limits

DOC = Path(__file__).parents[1] / "docs" / "limits.md"


def test_the_table_is_the_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([0-9.,]+) \|", DOC.read_text(), re.MULTILINE)
    told = {name: float(value.replace(",", "")) for name, value in rows}
    units = {"KIB", "MIB"}
    kept = {
        name: float(value)
        for name, value in vars(limits).items()
        if name.isupper() and name not in units
    }
    assert told == kept
    assert len(rows) == len(kept)
