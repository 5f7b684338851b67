"""Text Embeddings Inference itself: its releases, and the edits that the built image has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_TABLE = Path(__file__).parent / "data" / "tei.yaml"


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit of TEI's sources."""

    name: str
    """Name of its file in images/tei/patches, and in what /info says: `queue`."""

    without: str
    """What happens where it is not made."""

    upstream: str | None = None
    """Number of the issue at huggingface/text-embeddings-inference; None: not reported."""

    accelerator: str | None = None
    """The one that it is for; None: for each."""


@cache
def _table() -> Mapping[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_TABLE.read_text())
    return loaded


def releases() -> tuple[Mapping[str, Any], ...]:
    """The commits that are known, oldest first."""
    return tuple(_table()["releases"])


def release(commit: str) -> Mapping[str, Any] | None:
    """What is known of the TEI at that commit; None where nothing is."""
    return next((row for row in releases() if row["commit"] == commit), None)


def flags() -> Mapping[str, str]:
    """What TEI is given, and the release that first takes it."""
    return {name: str(first) for name, first in _table()["flags"].items()}


def problem(commit: str) -> str | None:
    """Why the TEI at that commit does not take our flags, in one sentence; None where nothing is known."""
    if (known := release(commit)) is None:
        return None
    late = {
        name: first for name, first in flags().items() if _number(first) > _number(known["version"])
    }
    if not late:
        return None
    newest = max(late.values(), key=_number)
    return (
        f"tei_ref: {commit[:12]} is TEI {known['version']}, which does not take "
        f"{' and '.join(sorted(late))} as given here: use {newest} or newer."
    )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in str(version).split("."))


def environment() -> Mapping[str, str]:
    """Variables that every TEI is given, whether its release knows them or not."""
    return {name: row["value"] for name, row in _table()["environment"].items()}


def every_edit(accelerator: str | None = None) -> tuple[Edit, ...]:
    """The edits for an accelerator, in the order in which they are made; for any where none is named."""
    rows = (Edit(name, **row) for name, row in _table()["edits"].items())
    return tuple(
        row for row in rows if not (accelerator and row.accelerator not in (None, accelerator))
    )


def edits(given: Mapping[str, Any]) -> tuple[Edit, ...]:
    """The edits that the image of these answers has: Hugging Face's own has none."""
    made = given["tei_image"] == "build" and given.get("tei_edits", True)
    return every_edit(given["accelerator"]) if made else ()
