"""What a model's files need before TEI can load them.

Called once, after every file was verified and before the folder gets its final name, so a failure
here leaves no folder that looks complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import compatibility, tensors, volume
from .errors import ConfigurationError, UnsuitableModelError
from .pin import JINA_V3, Pin
from .reading import UnreadableError, document

REVISION = 4
"""Raise it when the rules below change: folders that were prepared by older rules are made anew."""

LONGEST_CONFIG = 64 << 20
"""Bytes of the longest JSON file that is read: EmbeddingGemma's tokenizer.json has 33 MB."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

CONVERSION_RECORD = "conversion.json"
"""What a conversion did, beside the converted model. TEI does not read it."""

_CONVERTED = ".converted"


def prepare(folder: Path, pin: Pin, tell: Callable[[str], None] | None = None) -> list[str]:
    """Transforms the folder in place where TEI needs it.

    folder: holds the pinned files and nothing else. A file may be a symbolic link into a read-only
    store, so never open one for writing: put a new one in its place with `volume.write_whole`.
    tell: is called with each remark of the rules, which rendering could not all make: it reads no long
    files.

    Returns: one sentence per change, for the log and the marker; empty when nothing had to be done.
    Raises: UnsuitableModelError when the model cannot be made loadable.
    """
    shutil.rmtree(folder / _CONVERTED, ignore_errors=True)  # of a run that was cut
    conversion = _conversion(pin)
    task = conversion["task"] if conversion else None
    files = read(folder)
    # A repository is only rendered with a pooling, so TEI always gets --pooling.
    pooling = pin.facts.pooling or "as answered"
    findings = compatibility.check(
        files,
        task=task,
        pooling=pooling,
        tensors=None if conversion else _tensors(folder),
        longest=getattr(pin, "input_tokens", None),
    )
    if problem := compatibility.refusal(findings):
        raise UnsuitableModelError(problem)
    for finding in findings:
        if tell and finding.outcome == compatibility.WARNED:
            tell(finding.message)
    if conversion:
        return _convert(folder, conversion)
    changed: dict[str, object] = {}
    for finding in findings:
        changed |= finding.changes
    for path, content in changed.items():
        if content is None:
            (folder / path).unlink()
        else:
            (folder / path).parent.mkdir(exist_ok=True)
            text = json.dumps(content, indent=2, ensure_ascii=False)
            volume.write_whole(folder / path, f"{text}\n".encode())
    return [f.message for f in findings if f.outcome == compatibility.FIXED]


def _tensors(folder: Path) -> dict[str, str | None] | None:
    """Types of the weights by name; None for a pickle. Raises: UnsuitableModelError when damaged."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).exists() for name in names):
        return None
    return {name: tensor.dtype for name, tensor in tensors.read_headers(folder).items()}


def read(folder: Path) -> dict[str, object]:
    """What the rules look at: the small JSON files parsed, the others by name alone.

    Raises: UnsuitableModelError when a JSON file is damaged.
    """
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UnsuitableModelError(
                    f"{name} is a Git LFS pointer, not the file: run `git lfs pull` and register the model"
                    " again."
                )
        read_it = path.suffix == ".json" and path.stat().st_size <= LONGEST_CONFIG
        try:
            files[name] = document(path.read_bytes(), name, LONGEST_CONFIG) if read_it else None
        except UnreadableError as error:
            raise UnsuitableModelError(
                f"{error}: the registered copy is damaged, register it again."
            ) from None
    return files


def _conversion(pin: Pin) -> Mapping[str, Any] | None:
    """The conversion that the pin asks for, as {kind, task}."""
    conversion = getattr(pin, "conversion", None)
    if conversion is None:
        return None
    if (
        not isinstance(conversion, Mapping)
        or conversion.get("kind") != JINA_V3
        or not isinstance(conversion.get("task"), str)
    ):
        raise ConfigurationError(
            f"pin.conversion must be {{kind: {JINA_V3}, task: …}}: resolve the pin again."
        )
    return conversion


def _convert(folder: Path, conversion: Mapping[str, Any]) -> list[str]:
    """Put the converted model in the place of the fetched one."""
    try:
        from . import jina  # rendered for its model alone
    except ImportError:
        raise ConfigurationError(
            f"this image does not convert {JINA_V3}: render the repository for that model"
        ) from None
    converted = folder / _CONVERTED
    try:
        record = jina.convert(folder, conversion["task"], converted)
    except BaseException:
        shutil.rmtree(converted, ignore_errors=True)
        raise
    volume.write_whole(
        converted / CONVERSION_RECORD, (json.dumps(record, indent=2) + "\n").encode()
    )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path != converted:
                shutil.rmtree(path)
        else:
            path.unlink()
    for path in converted.iterdir():
        path.rename(folder / path.name)
    converted.rmdir()
    prompt = f', whose texts begin with "{record["prompt"]}"' if record["prompt"] else ""
    return [
        f"merged the adapter {record['task']}{prompt}, and wrote {record['tensors_written']} tensors"
        f" ({record['dtype']}) for TEI's nomic_bert"
    ]
