"""What a model's files need before TEI can load them.

Called once, after every file was verified and before the folder gets its final name, so a failure
here leaves no folder that looks complete.
"""

from __future__ import annotations

import os
from pathlib import Path

from .pin import Pin

REVISION = 1
"""Raise it when the rules below change: folders that were prepared by older rules are made anew."""


def prepare(folder: Path, pin: Pin) -> list[str]:
    """Transforms the folder in place where TEI needs it.

    folder: holds the pinned files and nothing else. A file may be a symbolic link into a read-only
    store, so never open one for writing: put a new one in its place with `replace`.

    Returns: one sentence per change, for the log and the marker; empty when nothing had to be done.
    Raises: UnsuitableModelError when the model cannot be made loadable.
    """
    return []


def replace(path: Path, content: bytes) -> None:
    """Puts a new file in the place of one, atomically, also where that is a symbolic link."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
