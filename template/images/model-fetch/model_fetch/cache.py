"""The folder of one model version on the cache volume: staged, whole, or absent.

/cache/<registered model>/<version>/               complete, with its marker
/cache/<registered model>/.<version>.staging-…/    being fetched, or left by a run that was cut
/cache/<registered model>/.<version>.lock          see lock.py
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from . import prepare
from .pin import Pin
from .verify import sha256_of, structure_problem

MARKER = ".model-fetch.json"
FORMAT = 1
CONTENT = (
    *("registered_model", "version", "run_id", "logged_model_id", "artifact_uri"),
    *("files", "conversion"),
)
"""What of a pin decides on the bytes in a version's folder."""


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file as it was when the folder was complete."""

    path: str
    size: int
    """Bytes."""

    mtime_ns: int
    sha256: str | None
    """As it stands here, so after preparation; None where no digest was computed."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What makes a folder complete: which pin it is for, and what its files looked like."""

    fingerprint: str
    source: str
    files: tuple[KnownFile, ...]
    prepared: tuple[str, ...]
    pin: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Marker | None:
        """None when the text is no marker that this version of the program understands."""
        try:
            value = json.loads(text)
            if value.pop("format") != FORMAT:
                return None
            files = tuple(KnownFile(**file) for file in value.pop("files"))
            return cls(files=files, prepared=tuple(value.pop("prepared")), **value)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def fingerprint(pin: Pin) -> str:
    """Names the content of a version folder: the pinned files, where they are from, their preparation."""
    mapping = pin.to_mapping()
    content = {name: mapping.get(name) for name in CONTENT}
    text = json.dumps([content, prepare.REVISION], sort_keys=True)
    return sha256(text.encode()).hexdigest()


class VersionFolder:
    """Where one pinned version lives."""

    def __init__(self, cache: Path, pin: Pin) -> None:
        self.pin = pin
        self.parent = cache / pin.registered_model
        self.path = self.parent / str(pin.version)
        self.lock = self.parent / f".{pin.version}.lock"
        self.fingerprint = fingerprint(pin)

    def marker(self) -> Marker | None:
        """The marker of a complete folder that is this pin's; None when there is none."""
        try:
            marker = Marker.from_json((self.path / MARKER).read_text())
        except (OSError, UnicodeDecodeError):
            return None
        return marker if marker and marker.fingerprint == self.fingerprint else None

    def problem(self, marker: Marker) -> str | None:
        """What has changed since the folder was complete; None when nothing has.

        Looks at names, sizes and times of change, so it costs milliseconds. Only a file whose time
        alone is another (a restored backup) is read and digested.
        """
        present = dict(_files(self.path))
        present.pop(MARKER, None)
        for file in marker.files:
            found = present.pop(file.path, None)
            if found is None:
                return f"{file.path} is missing"
            if found.st_size != file.size:
                return f"{file.path} has {found.st_size:,} bytes instead of {file.size:,}"
            if found.st_mtime_ns != file.mtime_ns and not self._same(file):
                return f"{file.path} was changed after it was verified"
        for path in present:
            return f"{path} does not belong there"
        return None

    def damage(self, marker: Marker) -> str | None:
        """What is wrong with the folder when every byte is read again; None when nothing is."""
        for file in marker.files:
            if file.sha256 is not None and (self.path / file.path).is_file():
                if not self._same(file):
                    return f"{file.path} does not have its recorded SHA-256"
            elif problem := structure_problem(self.path / file.path):
                return f"{file.path}: {problem}"
        return self.problem(marker)

    def _same(self, file: KnownFile) -> bool:
        return file.sha256 is not None and sha256_of(self.path / file.path) == file.sha256

    def stage(self) -> Staging:
        """A private folder to fetch into; takes over what an earlier run left. Needs the lock."""
        mine = self.parent / f".{self.path.name}.staging-{os.urandom(6).hex()}"
        left = sorted(self.parent.glob(f".{self.path.name}.staging-*"))
        for index, folder in enumerate(left):
            # Renaming shuts out a holder that was taken for dead: it can no longer publish.
            if (
                index == 0
                and (folder / "pin").is_file()
                and ((folder / "pin").read_text() == self.fingerprint)
            ):
                folder.rename(mine)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        mine.mkdir(exist_ok=True)
        (mine / "pin").write_text(self.fingerprint)
        (mine / "files").mkdir(exist_ok=True)
        return Staging(mine)

    def publish(self, staging: Staging, marker: Marker, sync: bool) -> None:
        """Gives a staged folder its final name, in one rename. Needs the lock."""
        where = staging.files / MARKER
        where.write_text(marker.to_json())
        if sync:
            _sync_tree(staging.files)
        if self.path.exists() or self.path.is_symlink():
            # Another content under the same version: only after a model was deleted and made anew.
            self.path.rename(staging.path / "replaced")
        staging.files.rename(self.path)
        if sync:
            _sync(self.parent)
        shutil.rmtree(staging.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Staging:
    """A version that is being fetched."""

    path: Path

    @property
    def files(self) -> Path:
        """What becomes the version's folder."""
        return self.path / "files"

    def target(self, path: str) -> Path:
        return self.files / path

    def journal(self, path: str) -> Path:
        return self.path / "journals" / sha256(path.encode()).hexdigest()[:16]

    def present(self) -> dict[str, os.stat_result]:
        """What stands in the folder now, by path."""
        return dict(sorted(_files(self.files), key=lambda item: item[0]))


def link(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to a folder, in one step, whatever it pointed to before.

    Raises: OSError, also when something other than a link is there.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and not link.is_symlink():
        raise FileExistsError(17, "is not a symbolic link and is left alone", str(link))
    fresh = link.with_name(f".{link.name}.{os.urandom(4).hex()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _files(root: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(root / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(root, path)
            else:
                try:
                    yield path, entry.stat()
                except FileNotFoundError:  # a link into a store that has lost the file
                    continue


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if not path.is_symlink():
                _sync(path)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
