"""A run from the pin to the link: recognise, or lock, fetch, verify, prepare, publish; then link."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from . import cache, lock, sources
from . import pin as pins
from .cache import KnownFile, Marker, Staging, VersionFolder
from .console import MB, Console, Meter
from .failures import (
    ConfigurationError,
    NoSpaceError,
    NotFoundError,
    UnreachableError,
    VerificationError,
)
from .lock import Hold, LockLost
from .pin import Pin
from .prepare import prepare
from .prune import prune
from .settings import Settings
from .sources import ClientStore, HttpSource, Mounted, Source
from .stop import Stop
from .transfer import Transfer
from .verify import digest_file, sha256_of, structure_problem

SPARE = 16 << 20  # bytes to leave free on the volume, for journals and the file system's own


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    folder: Path
    """Where the link points."""

    how: str
    """`already there`, `fetched`, `fetched by another process`, or `used in place`."""

    received: int = 0
    """Bytes that came over the network in this run."""

    seconds: float = 0.0
    """Of the transfer."""

    def summary(self, pin: Pin) -> str:
        """One line for the log and the termination message."""
        size = sum(file.size for file in pin.files) / MB
        text = f"{pin.registered_model} version {pin.version} is ready: {size:,.1f} MB {self.how}"
        if self.received:
            received = self.received / MB
            text += f"; received {received:,.1f} MB in {self.seconds:.1f} s"
            text += f" ({received / max(self.seconds, 1e-3):,.0f} MB/s)"
        return text


def resolve(pin: Pin, settings: Settings, console: Console) -> Pin:
    """A pin with a version: the one that was given, or what the registry says now."""
    if pin.version is not None:
        return pin
    try:
        found = pins.resolve(pin.model_id, pin.selector)
    except UnreachableError:
        # A number names the same version for ever, so a complete one needs no registry.
        known = _known_version(pin, settings)
        if known is None:
            raise
        console.warning("MLflow is out of reach; the version is here, so it is not needed")
        return known
    console.info(
        f"{pin.registered_model} {pin.selector} is version {found.version}",
        model=found.registered_model,
        version=found.version,
    )
    return replace(found, conversion=pin.conversion)


def make_ready(pin: Pin, settings: Settings, console: Console, stop: Stop) -> Outcome:
    """Makes the link point to the pinned version, complete and verified.

    pin: with a version
    Raises: TemplateErrors, OSError, and what `stop` is set with.
    """
    folder = VersionFolder(settings.cache or settings.link.parent, pin)
    while True:
        try:
            outcome = _obtain(folder, settings, console, Stop(stop))
            break
        except LockLost:
            console.warning("another process has taken over, after this one had stood still")
    cache.link(settings.link, outcome.folder)
    if settings.keep is not None and outcome.folder == folder.path:
        prune(folder, settings.keep, settings.keep_hours, console)
    return outcome


def check(pin: Pin, settings: Settings) -> str:
    """Reads every byte of a complete version again; returns a line that says it is right.

    Raises: NotFoundError, VerificationError. Changes nothing.
    """
    folder = VersionFolder(settings.cache or settings.link.parent, pin)
    marker = folder.marker()
    if marker is None:
        raise NotFoundError(f"{folder.path} is not there or is not complete: fetch it first")
    problem = folder.damage(marker)
    if problem:
        raise VerificationError(f"{folder.path}: {problem}: fetch it again")
    digests = sum(file.sha256 is not None for file in marker.files)
    return f"{folder.path} is as it was: {len(marker.files)} files, {digests} with their SHA-256"


def _obtain(folder: VersionFolder, settings: Settings, console: Console, stop: Stop) -> Outcome:
    if _complete(folder, console):
        return Outcome(folder.path, "already there")
    pin = folder.pin
    source = sources.choose(pin, settings, console)
    size = sum(file.size for file in pin.files)
    console.info(
        f"{pin.registered_model} version {pin.version}: {len(pin.files)} files, "
        f"{size / MB:,.1f} MB, {source.name}",
        model=pin.registered_model,
        version=pin.version,
        files=len(pin.files),
        bytes=size,
    )
    if settings.cache is None and not isinstance(source, Mounted):
        raise ConfigurationError("--cache is missing: the model must be fetched to some place")
    meter = Meter(console, size, settings.interval)
    with lock.held(
        folder.lock,
        lease=settings.lease,
        timeout=settings.lock_timeout,
        console=console,
        stop=stop,
        done=lambda: folder.marker() is not None,
        progress=lambda: meter.present,
    ) as hold:
        if hold is None or _complete(folder, console):
            return Outcome(folder.path, "fetched by another process")
        try:
            return _make(folder, source, settings, console, stop, meter)
        except Exception:
            _unless_lost(hold)
            raise


def _make(
    folder: VersionFolder,
    source: Source,
    settings: Settings,
    console: Console,
    stop: Stop,
    meter: Meter,
) -> Outcome:
    """Fills, prepares and publishes the folder. Needs the lock."""
    staging = folder.stage()
    digests = _fill(staging, source, folder.pin, settings, console, stop, meter)
    seconds = meter.seconds
    before = staging.present()
    changes = tuple(prepare(staging.files, folder.pin))
    for change in changes:
        console.info(f"prepared for TEI: {change}")
    straight = _straight(source, folder.pin)
    if straight is not None and not changes:
        shutil.rmtree(staging.path, ignore_errors=True)
        return Outcome(straight, "used in place")
    marker = Marker(
        folder.fingerprint,
        source.name,
        _known_files(staging, before, digests),
        changes,
        folder.pin.to_mapping(),
    )
    stop.check()
    folder.publish(staging, marker, settings.sync)
    how = "linked to the mounted store" if isinstance(source, Mounted) else "fetched"
    return Outcome(folder.path, how, meter.received, seconds)


def _complete(folder: VersionFolder, console: Console) -> bool:
    """Whether the folder is whole and unchanged. Touches it first, so it is not pruned now."""
    marker = folder.marker()
    if marker is None:
        return False
    try:
        os.utime(folder.path / cache.MARKER)
    except OSError:
        pass  # a read-only volume
    problem = folder.problem(marker)
    if problem:
        console.warning(f"{folder.path}: {problem}; fetching the version again")
    return problem is None


def _known_version(pin: Pin, settings: Settings) -> Pin | None:
    """The pin of a complete version whose number was asked for."""
    if not pin.selector.isdigit() or settings.cache is None:
        return None
    try:
        path = settings.cache / pin.registered_model / pin.selector / cache.MARKER
        marker = Marker.from_json(path.read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return Pin.from_mapping(marker.pin) if marker else None


def _unless_lost(hold: Hold) -> None:
    """An error after the lock was lost is no error: the other process has moved the folder."""
    if hold.lost:
        raise LockLost from None


def _fill(
    staging: Staging,
    source: Source,
    pin: Pin,
    settings: Settings,
    console: Console,
    stop: Stop,
    meter: Meter,
) -> dict[str, str | None]:
    """Brings all pinned files into the staging folder; returns SHA-256 by path."""
    if isinstance(source, Mounted):
        return _link_files(staging, source, pin)
    if isinstance(source, ClientStore):
        return _download_files(staging, source, pin, meter, stop)
    assert isinstance(source, HttpSource)
    transfer = Transfer(source, pin.files, staging, settings, console, stop)
    _check_space(staging.path, transfer.missing)
    with meter:
        return transfer.run(meter)


def _link_files(staging: Staging, source: Mounted, pin: Pin) -> dict[str, str | None]:
    for file in pin.files:
        path = source.path(file)
        problem = structure_problem(path)
        if problem:
            raise VerificationError(f"{path}: {problem}: register the model again")
        target = staging.target(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(path)
    return {}


def _download_files(
    staging: Staging, source: ClientStore, pin: Pin, meter: Meter, stop: Stop
) -> dict[str, str | None]:
    _check_space(staging.path, sum(file.size for file in pin.files))
    found: dict[str, str | None] = {}
    with meter:
        for file in pin.files:
            stop.check()
            target = staging.target(file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.download(file, target)
            size = target.stat().st_size
            digests = digest_file(target, file)
            problem = digests.mismatch() or structure_problem(target)
            if size != file.size:
                problem = f"the store sends {size:,} bytes, the pin says {file.size:,}"
            if problem:
                target.unlink()
                raise VerificationError(f"{file.path}: {problem}: pin the model again")
            meter.add(size)
            found[file.path] = digests.sha256
    return found


def _known_files(
    staging: Staging, before: dict[str, os.stat_result], digests: dict[str, str | None]
) -> tuple[KnownFile, ...]:
    """The folder's files as they stand; those that preparation made are digested anew."""
    known = []
    for path, now in staging.present().items():
        was = before.get(path)
        same = was is not None and (was.st_ino, was.st_mtime_ns) == (now.st_ino, now.st_mtime_ns)
        digest = digests.get(path) if same else sha256_of(staging.target(path))
        known.append(KnownFile(path, now.st_size, now.st_mtime_ns, digest))
    return tuple(known)


def _straight(source: Source, pin: Pin) -> Path | None:
    """The mounted folder that is the model's as it is; None when files must be put together."""
    if not isinstance(source, Mounted):
        return None
    tops = {
        file.source[: -len(file.path)] if f"/{file.source}".endswith(f"/{file.path}") else None
        for file in pin.files
    }
    top = tops.pop()
    return None if tops or top is None else source.root / top


def _check_space(where: Path, needed: int) -> None:
    """Raises NoSpaceError when `needed` bytes do not fit, before the first one is fetched."""
    stat = os.statvfs(where)
    free = stat.f_bavail * stat.f_frsize
    if needed and free < needed + SPARE:
        raise NoSpaceError(
            f"{where.parent.parent} has {free / MB:,.0f} MB free and needs "
            f"{(needed + SPARE) / MB:,.0f} MB: make the volume larger or prune old versions"
        )
