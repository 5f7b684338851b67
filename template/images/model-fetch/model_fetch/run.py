"""A run from the pin to the link: recognise, or lock, fetch, verify, prepare, publish; then link."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from . import cache, lock, sources
from .cache import Marker, Staging, VersionFolder
from .console import MB, Console, Meter
from .failures import ConfigurationError, NoSpaceError, VerificationError
from .pin import Pin
from .prepare import prepare
from .settings import Settings
from .sources import ClientStore, HttpSource, Mounted, Source
from .stop import Stop
from .transfer import Transfer
from .verify import digest_file, structure_problem

SPARE = 16 << 20  # bytes to leave free on the volume, for journals and the file system's own


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did."""

    folder: Path
    bytes: int
    """Of the model."""

    received: int
    """Bytes that came over the network in this run."""

    seconds: float
    how: str
    """`already there`, `fetched`, `fetched by another process`, or `in place`."""

    prepared: tuple[str, ...] = ()

    def summary(self, pin: Pin) -> str:
        size = f"{self.bytes / MB:,.0f} MB"
        text = f"{pin.registered_model} version {pin.version} is ready: {size} {self.how}"
        if self.received:
            rate = self.received / MB / max(self.seconds, 1e-3)
            text += f", {self.received / MB:,.0f} MB received in {self.seconds:.1f} s ({rate:,.0f} MB/s)"
        return text


def make_ready(pin: Pin, settings: Settings, console: Console, stop: Stop) -> Outcome:
    """Makes the link point to the pinned version, complete and verified."""
    began = time.monotonic()
    size = sum(file.size for file in pin.files)
    folder = VersionFolder(settings.cache or settings.link.parent, pin)
    how, received = "already there", 0
    marker = _complete(folder, console)
    if marker is None:
        source = sources.choose(pin, settings, console)
        console.info(
            f"{pin.registered_model} version {pin.version}: {len(pin.files)} files, "
            f"{size / MB:,.0f} MB, {source.name}",
            model=pin.registered_model,
            version=pin.version,
        )
        straight = _straight(source, pin)
        if settings.cache is None and not isinstance(source, Mounted):
            raise ConfigurationError("--cache is missing: the model has to be fetched somewhere")
        marker, how, received, in_place = _obtain(
            folder, source, straight, settings, console, stop
        )
        if in_place is not None:
            cache.link(settings.link, in_place)
            return Outcome(in_place, size, 0, time.monotonic() - began, "in place")
    os.utime(folder.path / cache.MARKER) if os.access(folder.path, os.W_OK) else None
    cache.link(settings.link, folder.path)
    seconds = time.monotonic() - began
    return Outcome(folder.path, size, received, seconds, how, marker.prepared)


def _complete(folder: VersionFolder, console: Console) -> Marker | None:
    """The marker of the folder when it is whole and unchanged."""
    marker = folder.marker()
    if marker is None:
        return None
    problem = folder.problem(marker)
    if problem:
        console.warning(f"{folder.path}: {problem}; fetching it again")
        return None
    return marker


def _obtain(
    folder: VersionFolder,
    source: Source,
    straight: Path | None,
    settings: Settings,
    console: Console,
    stop: Stop,
) -> tuple[Marker, str, int, Path | None]:
    meter = Meter(console, sum(file.size for file in folder.pin.files), settings.interval)
    with lock.held(
        folder.lock,
        lease=settings.lease,
        timeout=settings.lock_timeout,
        console=console,
        stop=stop,
        done=lambda: folder.marker() is not None,
        progress=lambda: meter.present,
    ) as mine:
        marker = folder.marker()
        if marker is not None and folder.problem(marker) is None:
            return marker, "fetched by another process", 0, None
        assert mine
        staging = folder.stage()
        digests = _fill(staging, source, folder.pin, settings, console, stop, meter)
        prepared = tuple(prepare(staging.files, folder.pin))
        for change in prepared:
            console.info(f"prepared for TEI: {change}")
        marker = Marker(
            folder.fingerprint,
            source.name,
            staging.known_files(digests),
            prepared,
            folder.pin.to_mapping(),
        )
        if straight is not None and not prepared:
            shutil.rmtree(staging.path, ignore_errors=True)
            return marker, "in place", 0, straight
        stop.check()
        folder.publish(staging, marker, settings.sync)
    return marker, "fetched", meter.received, None


def _fill(
    staging: Staging,
    source: Source,
    pin: Pin,
    settings: Settings,
    console: Console,
    stop: Stop,
    meter: Meter,
) -> dict[str, str | None]:
    """Brings all pinned files into the staging folder; SHA-256 by path."""
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
            raise VerificationError(f"{path}: {problem}")
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
                problem = f"has {size:,} bytes, the pin says {file.size:,}"
            if problem:
                target.unlink()
                raise VerificationError(f"{file.path}: {problem}")
            meter.add(size)
            found[file.path] = digests.sha256
    return found


def _straight(source: Source, pin: Pin) -> Path | None:
    """The mounted folder that can be used as it is; None when the files must be put together."""
    if not isinstance(source, Mounted):
        return None
    prefixes = {
        file.source.removesuffix(file.path) if file.source.endswith(file.path) else None
        for file in pin.files
    }
    prefix = prefixes.pop()
    if prefixes or prefix is None or (prefix and not prefix.endswith("/")):
        return None
    return source.root / prefix


def _check_space(where: Path, needed: int) -> None:
    stat = os.statvfs(where)
    free = stat.f_bavail * stat.f_frsize
    if needed and free < needed + SPARE:
        raise NoSpaceError(
            f"{where.parent.parent} has {free / MB:,.0f} MB free, "
            f"{(needed + SPARE) / MB:,.0f} MB are needed: make the volume larger or prune old versions"
        )
