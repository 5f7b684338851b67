"""A run from the pin to the link: recognise, or lock, fetch, verify, prepare, publish; then link."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from . import cache, lock, mounted, sources, volume
from . import pin as pins
from .cache import KnownFile, Marker, Staging, VersionFolder
from .console import MB, Console, Meter
from .failures import (
    ConfigurationError,
    NoSpaceError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    VerificationError,
    from_os_error,
)
from .lock import Hold, LockLost
from .pin import Pin
from .prepare import prepare
from .prune import prune
from .settings import Settings
from .sources import ClientStore, HttpSource, Mounted, Source
from .stop import Stop
from .transfer import Transfer
from .verify import digest_file, structure_problem

TAKEOVERS = 20  # of one run's lock by others, until something else must be wrong
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
    if pin.workspace:
        os.environ["MLFLOW_WORKSPACE"] = pin.workspace  # MLflow's client reads it by itself
    try:
        found = pins.resolve(pin.model_id, pin.selector)
    except UnreachableError:
        # A number names the same version for ever; of a name, what was true last is served.
        known = _known_version(pin, settings)
        if known is None:
            raise
        console.warning(
            f"MLflow is out of reach; version {known.version} is here, so it is not needed"
        )
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
    folder = _folder(pin, settings)
    for _ in range(TAKEOVERS):
        try:
            outcome = _obtain_anywhere(folder, settings, console, Stop(stop))
            break
        except LockLost:
            console.warning("another process has taken over, after this one had stood still")
        except OSError as error:
            raise from_os_error(error, folder.parent) from error
    else:
        raise UnreachableError(
            f"{folder.parent} changes under this process again and again: look what else writes there"
        )
    cache.link(settings.link, outcome.folder)
    if settings.keep is not None and outcome.folder == folder.path:
        prune(folder, settings.keep, settings.keep_hours, console)
    return outcome


def check(pin: Pin, settings: Settings) -> str:
    """Reads every byte of a complete version again; returns a line that says it is right.

    Raises: NotFoundError, VerificationError, and what is wrong with a mounted store. Changes nothing.
    """
    folder = _folder(pin, settings)
    marker = folder.marker()
    if marker is not None:
        if problem := folder.damage(marker):
            raise VerificationError(f"{folder.path}: {problem}: fetch it again")
        digests = sum(file.sha256 is not None for file in marker.files)
        return (
            f"{folder.path} is as it was: {len(marker.files)} files, {digests} with their SHA-256"
        )
    source = sources.mounted(pin, settings)
    if source is None:
        raise NotFoundError(f"{folder.path} is not there or is not complete: fetch it first")
    digests = sum(mounted.verify(source, file) is not None for file in pin.files)
    return (
        f"{source.root} is as pinned: {len(pin.files)} files, {digests} compared with their digest"
    )


def _folder(pin: Pin, settings: Settings) -> VersionFolder:
    return VersionFolder(settings.cache or settings.link.parent, pin, settings.mount)


def _obtain_anywhere(
    folder: VersionFolder, settings: Settings, console: Console, stop: Stop
) -> Outcome:
    """Obtains the version from the next source, where the mounted store has other bytes."""
    try:
        return _obtain(folder, settings, console, stop)
    except mounted.NotAsPinned as error:
        if settings.mount is None:
            raise
        console.warning(f"{error}; trying the next source")
        try:
            return _obtain(folder, replace(settings, mount=None), console, stop)
        except ConfigurationError:  # there is none
            raise error from None


def _obtain(folder: VersionFolder, settings: Settings, console: Console, stop: Stop) -> Outcome:
    if _complete(folder, console):
        return Outcome(folder.path, "already there")
    pin = folder.pin
    source = sources.choose(pin, settings, console, stop)
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
    folder.make_parent()
    meter = Meter(console, size, settings.interval)
    with lock.held(
        folder.lock,
        lease=settings.lease,
        timeout=settings.lock_timeout,
        console=console,
        stop=stop,
        done=lambda: _is_whole(folder),
        progress=lambda: meter.present,
    ) as hold:
        if hold is None or _complete(folder, console):
            return Outcome(folder.path, "fetched by another process")
        staging = folder.stage()
        try:
            return _make(folder, staging, hold, source, settings, console, stop, meter)
        except Exception:
            # Who takes the lock over moves the folder, whatever error that looks like here.
            if hold.lost or not volume.is_folder(staging.path):
                raise LockLost from None
            raise


def _make(
    folder: VersionFolder,
    staging: Staging,
    hold: Hold,
    source: Source,
    settings: Settings,
    console: Console,
    stop: Stop,
    meter: Meter,
) -> Outcome:
    """Fills, prepares and publishes the folder. Needs the lock."""
    digests = _fill(folder, staging, source, settings, console, stop, meter)
    seconds = meter.seconds
    before = _exactly_pinned(staging, folder.pin, isinstance(source, Mounted), console)
    changes = tuple(
        prepare(staging.files, folder.pin, lambda said: console.info(f"remark: {said}"))
    )
    for change in changes:
        console.info(f"prepared for TEI: {change}")
    straight = _straight(source, folder.pin)
    if straight is not None and not changes:
        volume.remove(staging.path)
        return Outcome(straight, "used in place")
    marker = Marker(
        folder.fingerprint,
        source.name,
        _known_files(staging, before, digests),
        changes,
        folder.pin.to_mapping(),
        read_back=not staging.local,
        fetched={path: digest for path, digest in digests.items() if digest},
    )
    stop.check()
    if hold.lost:
        raise LockLost
    folder.publish(staging, marker, settings.sync or not staging.local)
    how = "linked to the mounted store" if isinstance(source, Mounted) else "fetched"
    return Outcome(folder.path, how, meter.received, seconds)


def _exactly_pinned(
    staging: Staging, pin: Pin, links: bool, console: Console
) -> dict[str, os.stat_result]:
    """What was fetched, by path: the pin's names, each a file of its own, and nothing beside them.

    links: whether they are links into the mounted store instead
    """
    names = {file.path for file in pin.files}
    for path, status in list(volume.entries(staging.files, names)):
        right = stat.S_ISLNK(status.st_mode) if links else volume.is_own(status, staging.owner)
        if path in names and right:
            names.discard(path)
        else:
            console.warning(f"{path} came from elsewhere and is removed")
            volume.remove(staging.target(path))
    if names:
        raise VerificationError(f"{min(names)} was taken away while it was fetched: start again")
    return staging.present()


def _complete(folder: VersionFolder, console: Console) -> bool:
    """Whether the folder is whole and unchanged. Touches it first, so it is not pruned now."""
    marker = folder.marker()
    if marker is None:
        return False
    try:
        os.utime(folder.path / cache.MARKER, follow_symlinks=False)
    except OSError:
        pass  # a read-only volume
    problem = folder.problem(marker)
    if problem is None and not marker.read_back and not volume.is_local(folder.path):
        problem = _read_back(folder, marker, console)
    if problem:
        console.warning(f"{folder.path}: {problem}; fetching the version again")
    return problem is None


def _is_whole(folder: VersionFolder) -> bool:
    marker = folder.marker()
    return marker is not None and folder.problem(marker) is None


def _read_back(folder: VersionFolder, marker: Marker, console: Console) -> str | None:
    """What is wrong with a version that was never read back: version 0.1.0 did not."""
    console.info(f"{folder.path} was never read back from its volume: reading it, once")
    problem = folder.damage(marker)
    if problem is None:
        try:
            folder.renew(replace(marker, read_back=True))
        except OSError:
            pass  # a read-only volume: the next start reads it, too
    return problem


def _known_version(pin: Pin, settings: Settings) -> Pin | None:
    """The pin of a complete version that will do: the number asked for, else the newest so resolved."""
    if settings.cache is None:
        return None
    folder = settings.cache / pin.registered_model
    numbers = [pin.selector]
    if not pin.selector.isdigit():
        there = (path.name for path in folder.glob("*"))
        numbers = sorted((name for name in there if name.isdecimal()), key=int, reverse=True)
    for number in numbers:
        marker = cache.read_marker(folder / number / cache.MARKER)
        try:
            known = Pin.from_mapping(marker.pin) if marker else None
        except TemplateError:
            continue
        asked = (pin.model_id, pin.registered_model, number)
        if known is None or (known.model_id, known.registered_model, known.version) != asked:
            continue
        # What an alias named is not simply the newest; the latest is.
        if pin.selector in (number, "latest", known.selector):
            return known
    return None


def _fill(
    folder: VersionFolder,
    staging: Staging,
    source: Source,
    settings: Settings,
    console: Console,
    stop: Stop,
    meter: Meter,
) -> dict[str, str | None]:
    """Brings all pinned files into the staging folder; returns SHA-256 by path."""
    if isinstance(source, Mounted):
        return mounted.link_files(folder, staging, source, console, stop)
    if isinstance(source, ClientStore):
        return _download_files(staging, source, folder.pin, meter, stop)
    assert isinstance(source, HttpSource)
    transfer = Transfer(source, folder.pin.files, staging, settings, console, stop)
    _check_space(staging.path, transfer.missing)
    with meter:
        return transfer.run(meter)


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
            volume.remove(target)
            source.download(file, target)
            size = target.stat().st_size
            digests = digest_file(target, file)
            problem = digests.mismatch() or structure_problem(target)
            if size != file.size:
                problem = f"the store sends {size:,} bytes, the pin says {file.size:,}"
            if not staging.local and staging.digest(file.path) != digests.sha256:
                problem = "the volume does not hold what was written to it"
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
        digest = digests.get(path) if same else staging.digest(path)
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
