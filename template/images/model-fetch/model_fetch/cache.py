"""The folder of one model version on the cache volume: staged, whole, or absent.

/cache/<registered model>/<version>/               complete, with its marker
/cache/<registered model>/.<version>.staging-…/    being fetched, or left by a run that was cut
/cache/<registered model>/.<version>.mounted       what was verified in the mounted store
/cache/<registered model>/.<version>.lock          see lock.py, as for .<version>.claim-…/

Other pods, and other programs, write to the volume too: nothing on it is believed but what this
program would have left there itself.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from . import prepare, reading, volume
from .embedding_model import PinnedFile
from .errors import ConfigurationError
from .pin import Pin
from .verify import digest_file, read_pieces, sha256_of, structure_problem

MARKER = ".model-fetch.json"
FORMAT = 1
LONGEST_MARKER = 8 << 20  # bytes
_OF_NFS = re.compile(r"(.*/)?\.nfs[0-9a-f]{24}")
"""What NFS keeps of a file that was deleted while it was open (Linux, fs/nfs/unlink.c); TEI reads none."""
DIGEST = "[0-9a-f]{64}"
CONTENT = (
    *("registered_model", "version", "run_id", "logged_model_id", "artifact_uri"),
    *("files", "conversion", "input_tokens"),
)
"""What of a pin decides on the bytes in a version's folder; of its files, all but their SHA-256."""


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file as it was when the folder was complete."""

    path: str
    size: int
    """Bytes."""

    mtime_ns: int
    sha256: str | None
    """As it stands here, so after preparation; None where no digest was computed."""

    @classmethod
    def from_value(cls, value: object) -> KnownFile:
        """Raises: UnreadableError."""
        fields = reading.mapping(value, "a file")
        if fields.keys() != {"path", "size", "mtime_ns", "sha256"}:
            raise reading.UnreadableError("a file has other fields")
        digest = fields["sha256"]
        return cls(
            reading.text(fields["path"], "a path"),
            reading.count(fields["size"], "a size"),
            reading.count(fields["mtime_ns"], "a time", most=1 << 63),
            digest if digest is None else reading.text(digest, "a digest", DIGEST),
        )


@dataclass(frozen=True, slots=True)
class Marker:
    """What makes a folder complete: which pin it is for, and what its files looked like."""

    fingerprint: str
    source: str
    files: tuple[KnownFile, ...]
    prepared: tuple[str, ...]
    pin: dict[str, Any]
    read_back: bool = False
    """Whether the files were read from their store again where a kernel's cache proves nothing."""

    fetched: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the pinned files as they came, before any preparation, where it was computed."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, data: bytes) -> Marker | None:
        """None when the text is no marker that this version of the program understands."""
        try:
            value = reading.mapping(reading.document(data, "it", LONGEST_MARKER), "it")
            if value.pop("format") != FORMAT:
                return None
            files = tuple(map(KnownFile.from_value, reading.items(value.pop("files"), "files")))
            prepared = reading.items(value.pop("prepared"), "prepared")
            fetched = reading.mapping(value.pop("fetched", {}), "fetched")
            marker = cls(
                reading.text(value.pop("fingerprint"), "the fingerprint"),
                reading.text(value.pop("source"), "the source"),
                files,
                tuple(reading.text(text, "prepared") for text in prepared),
                reading.mapping(value.pop("pin"), "the pin"),
                value.pop("read_back", False) is True,
                {path: reading.text(d, "a digest", DIGEST) for path, d in fetched.items()},
            )
        except (reading.UnreadableError, KeyError):
            return None
        twins = len({file.path for file in files}) < len(files)
        return None if value or twins else marker


def read_marker(path: Path) -> Marker | None:
    """The marker in a file; None where none can be read."""
    data = volume.read_small(path, LONGEST_MARKER)
    return None if data is None else Marker.from_json(data)


def fingerprint(pin: Pin) -> str:
    """Names the content of a version folder: the pinned files, where they are from, their preparation.

    SHA-256 is compared with the marker instead: it may be pinned after the files were fetched.
    """
    mapping = pin.to_mapping()
    for file in mapping["files"]:
        file.pop("sha256", None)
    content = {name: mapping.get(name) for name in CONTENT}
    text = json.dumps([content, prepare.REVISION], sort_keys=True)
    return sha256(text.encode()).hexdigest()


class VersionFolder:
    """Where one pinned version lives."""

    def __init__(self, cache: Path, pin: Pin, store: Path | None = None) -> None:
        """store: a mounted store, into which links may lead."""
        self.pin = pin
        self.parent = cache / pin.registered_model
        self.path = self.parent / str(pin.version)
        self.lock = self.parent / f".{pin.version}.lock"
        self.fingerprint = fingerprint(pin)
        self._store = store
        self._mounted = self.parent / f".{pin.version}.mounted"

    def marker(self) -> Marker | None:
        """The marker of a complete folder that is this pin's; None when there is none."""
        if not volume.is_folder(self.parent) or not volume.is_folder(self.path):
            return None
        return self._of_this_pin(read_marker(self.path / MARKER))

    def mounted(self) -> Marker | None:
        """What an earlier run saw when it read the pinned files in the mounted store."""
        if not volume.is_folder(self.parent):
            return None
        return self._of_this_pin(read_marker(self._mounted))

    def remember(self, marker: Marker) -> None:
        """Keeps what was seen in the mounted store. Needs the lock."""
        replace_file(self._mounted, marker.to_json().encode())

    def renew(self, marker: Marker) -> None:
        """Puts another marker into the complete folder."""
        replace_file(self.path / MARKER, marker.to_json().encode())

    def _of_this_pin(self, marker: Marker | None) -> Marker | None:
        return marker if marker and marker.fingerprint == self.fingerprint else None

    def problem(self, marker: Marker) -> str | None:
        """What has changed since the folder was complete; None when nothing has.

        Looks at names, sizes and times of change, so it costs milliseconds. Only a file whose time
        alone is another (a restored backup) is read and digested.
        """
        if problem := self._uncovered(marker):
            return problem
        known = {file.path: file for file in marker.files}
        for path, status in volume.entries(self.path, known):
            if path == MARKER:
                continue
            file = known.pop(path, None)
            if file is None and _OF_NFS.fullmatch(path) and stat.S_ISREG(status.st_mode):
                continue
            if file is None:
                return f"{path} does not belong there"
            if problem := self._changed(file, status):
                return f"{path} {problem}"
        return f"{next(iter(known))} is missing" if known else None

    def _uncovered(self, marker: Marker) -> str | None:
        """What of the pin the marker does not account for: the pin wins over any marker."""
        known = {file.path: file for file in marker.files}
        for pinned in self.pin.files:
            came, file = marker.fetched.get(pinned.path), known.get(pinned.path)
            problem = f"its marker has another {pinned.path} than the pin"
            if pinned.sha256 and pinned.sha256 != came:
                return problem
            if self.may_differ(marker, pinned.path):
                continue
            if file is None:
                return f"its marker does not name {pinned.path}"
            if (file.size, file.sha256) != (pinned.size, came):
                return problem
        if self.pin.conversion is not None:
            return (
                None if "config.json" in known and len(known) > 1 else "its marker names no model"
            )
        extra = known.keys() - {pinned.path for pinned in self.pin.files}
        if any(not self.may_differ(marker, path) for path in extra):
            return f"its marker names {min(extra)}, which is not pinned"
        return None

    def may_differ(self, marker: Marker, path: str) -> bool:
        """Whether preparation may have made, changed or removed a file."""
        if self.pin.conversion is not None:
            return True
        return bool(marker.prepared) and path.endswith(".json")

    def _changed(self, file: KnownFile, status: os.stat_result) -> str | None:
        if stat.S_ISLNK(status.st_mode):
            path = self.path / file.path
            try:
                inside = self._store and path.resolve().is_relative_to(self._store.resolve())
                status = path.stat()
            except (OSError, RuntimeError):  # a loop
                return "is missing"
            if not inside:
                return "is a link that leads out of the mounted store"
        if not stat.S_ISREG(status.st_mode):
            return "is no file"
        if status.st_size != file.size:
            return f"has {status.st_size:,} bytes instead of {file.size:,}"
        if status.st_mtime_ns != file.mtime_ns and not self._same(file):
            return "was changed after it was verified"
        return None

    def damage(self, marker: Marker) -> str | None:
        """What is wrong with the folder when every byte is read again; None when nothing is."""
        if problem := self.problem(marker):
            return problem
        pinned = {file.path: file for file in self.pin.files}
        for file in marker.files:
            path = self.path / file.path
            as_pinned = pinned.get(file.path)
            if as_pinned is None or self.may_differ(marker, file.path):
                as_pinned = PinnedFile(file.path, file.path, file.size)
            digests = digest_file(path, as_pinned)
            if file.sha256 not in (None, digests.sha256):
                return f"{file.path} does not have its recorded SHA-256"
            if problem := digests.mismatch() or structure_problem(path):
                return f"{file.path}: {problem}"
        return None

    def _same(self, file: KnownFile) -> bool:
        return file.sha256 is not None and (
            sha256_of(read_pieces(self.path / file.path)) == file.sha256
        )

    def make_parent(self) -> None:
        """Makes the folder of the registered model.

        Raises: ConfigurationError when something else stands in its place, OSError.
        """
        self.parent.parent.mkdir(parents=True, exist_ok=True)
        try:
            volume.make_folder(self.parent)
        except NotADirectoryError:
            raise ConfigurationError(
                f"{self.parent} is a link or a file, where the model's folder is to be: remove it"
            ) from None

    def stage(self) -> Staging:
        """A private folder to fetch into; takes over what an earlier run left. Needs the lock."""
        left = sorted(self.parent.glob(f".{self.path.name}.staging-*"))
        mine = self.parent / f".{self.path.name}.staging-{os.urandom(6).hex()}"
        mine.mkdir()
        owner = os.lstat(mine).st_uid  # whatever the file system makes of ours
        taken = next((folder for folder in left if self._is_staging(folder, owner)), None)
        if taken is not None:
            # Renaming shuts out a holder that was taken for dead: it can no longer publish.
            mine.rmdir()
            taken.rename(mine)
        for folder in left:
            if folder != taken:
                volume.remove(folder)
        staging = Staging(mine, owner, volume.is_local(mine))
        names = {f"files/{file.path}" for file in self.pin.files}
        names |= {f"journals/{staging.journal(file.path).name}" for file in self.pin.files}
        volume.keep_only(mine, names | {"pin"}, owner)
        for name in ("files", "journals"):
            (mine / name).mkdir(exist_ok=True)
        if taken is None:
            volume.write_new(mine / "pin", self.fingerprint.encode())
        return staging

    def _is_staging(self, folder: Path, owner: int) -> bool:
        try:
            status = os.lstat(folder)
        except OSError:
            return False
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner:
            return False
        return volume.read_small(folder / "pin", 64) == self.fingerprint.encode()

    def publish(self, staging: Staging, marker: Marker, sync: bool) -> None:
        """Gives a staged folder its final name, in one rename. Needs the lock."""
        volume.write_new(staging.files / MARKER, marker.to_json().encode())
        if sync:
            volume.sync_tree(staging.files)
        if os.path.lexists(self.path):
            # Another content under the same version: only after a model was deleted and made anew.
            self.path.rename(staging.path / f"replaced-{os.urandom(4).hex()}")
        staging.files.rename(self.path)
        if sync:
            volume.sync(self.parent)
        volume.remove(staging.path)


@dataclass(frozen=True, slots=True)
class Staging:
    """A version that is being fetched."""

    path: Path
    owner: int
    """User of the files that this process makes here."""

    local: bool
    """Whether what the kernel's cache holds is what the volume holds; see volume.py."""

    @property
    def files(self) -> Path:
        """What becomes the version's folder."""
        return self.path / "files"

    def target(self, path: str) -> Path:
        return self.files / path

    def journal(self, path: str) -> Path:
        return self.path / "journals" / sha256(path.encode()).hexdigest()[:16]

    def digest(self, path: str) -> str:
        """The SHA-256 of a file as the volume holds it."""
        target = self.target(path)
        return sha256_of(read_pieces(target) if self.local else volume.read_back(target))

    def present(self) -> dict[str, os.stat_result]:
        """What stands in the folder now, by path; of links, what they lead to."""
        found = {}
        for folder, _, names in os.walk(self.files):
            for name in names:
                path = Path(folder, name)
                found[path.relative_to(self.files).as_posix()] = path.stat()
        return dict(sorted(found.items()))


def replace_file(path: Path, content: bytes) -> None:
    """Puts a file in the place of whatever stands there, in one step."""
    fresh = path.with_name(f".{path.name.lstrip('.')}.{os.urandom(4).hex()}")
    volume.write_new(fresh, content)
    os.replace(fresh, path)


def link(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to a folder, in one step, whatever it pointed to before.

    Raises: OSError, also when something other than a link is there.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(link) and not link.is_symlink():
        raise FileExistsError(17, "is not a symbolic link and is left alone", str(link))
    fresh = link.with_name(f".{link.name}.{os.urandom(4).hex()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)
