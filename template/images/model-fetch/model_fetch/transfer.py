"""Fetches files over HTTP: parallel ranges of several files, digests on the way, resumable.

Each worker owns one connection and takes one chunk after another. The first chunk of a file goes
alone: its answer shows whether the server honours ranges (MLflow 3.4's proxy and MLflow's proxy of
an S3 store do not) and names the version of the file (ETag) that all others must be of. A digest
thread per large file follows the finished chunks in order, on the other core, while they are still
in the page cache.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import Staging
from .chunks import Chunk, Journal, Plan, Progress, boot_id, read_journal
from .console import Console, Meter
from .embedding_model import PinnedFile
from .failures import (
    DeniedError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    VerificationError,
    from_os_error,
)
from .settings import Settings
from .sources import HttpSource
from .stop import Stop
from .transport import ConnectionFailed, Request, Wire, describe, origin
from .verify import Digests, structure_problem

PIECE = 1 << 20  # bytes read at a time
AT_ONCE = 4  # files that are open at a time
CHECKPOINT_EVERY = 5.0  # seconds between two flushes to the disk
MAX_BACKOFF = 20.0  # seconds
MAX_RETRY_AFTER = 120.0  # seconds that a server may ask for
SLOWEST = 1024  # bytes per second, below which a connection counts as stuck
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529})


class _Again(Exception):
    """The same bytes should be asked for again."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _NoRanges(Exception):
    """The server answers a range with something else."""


class _Wrong(Exception):
    """The file in the store is not the one that was pinned, or changes."""


class _Stale(Exception):
    """The file was begun anew meanwhile."""


class _Job:
    """One file on its way. `lock` of the transfer guards everything that changes here."""

    def __init__(self, file: PinnedFile, staging: Staging, chunk_size: int, boot: str) -> None:
        self.file = file
        self.target = staging.target(file.path)
        self._where = staging.journal(file.path)
        self._boot = boot
        self._chunk_size = chunk_size
        self.target.parent.mkdir(parents=True, exist_ok=True)
        progress = self._known() or Progress(chunk_size, None, frozenset())
        self.attempts = 0
        self.generation = 0
        self.finished = False
        self.sha256: str | None = None
        self.journal: Journal | None = None
        self.fd = -1
        self._begin(progress)

    @property
    def present(self) -> int:
        """Bytes of the chunks that are done."""
        return sum(self.plan[index].size for index in self.done)

    def open(self) -> None:
        """Opens the file and its journal, when its turn has come."""
        if self.journal is None:
            self.fd = os.open(self.target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self.fd, self.file.size)
            progress = Progress(self.plan.chunk_size, self.validator, frozenset(self.done))
            self.journal = Journal(self._where, self.file.path, self.file.size, progress, self._boot)

    def restart(self) -> None:
        """Throws everything away that has come so far."""
        self.close()
        self._where.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)
        self._begin(Progress(self._chunk_size, None, frozenset()))
        self.open()

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _begin(self, progress: Progress) -> None:
        self.plan = Plan(self.file.size, progress.chunk_size)
        self.validator = progress.validator
        self.done = set(progress.done)
        self.pending = deque(chunk for chunk in self.plan if chunk.index not in self.done)
        self.generation += 1
        self.probing = False
        self.ranges = False
        self.whole = False

    def _known(self) -> Progress | None:
        """What an earlier run left, if it can be believed."""
        try:
            if self.target.is_symlink() or self.target.stat().st_size != self.file.size:
                return None
            text = self._where.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        progress = read_journal(text, self.file.path, self.file.size, self._boot)
        if progress and progress.validator is None and self.file.sha256 is None:
            return None  # nothing would show that the store has another version by now
        return progress


@dataclass(frozen=True, slots=True)
class _Work:
    job: _Job
    chunk: Chunk
    generation: int


class Transfer:
    """One run over all files of a pin."""

    def __init__(
        self,
        source: HttpSource,
        files: tuple[PinnedFile, ...],
        staging: Staging,
        settings: Settings,
        console: Console,
        stop: Stop,
    ) -> None:
        self._source, self._settings, self._console, self._stop = source, settings, console, stop
        boot = boot_id()
        largest_first = sorted(files, key=lambda file: -file.size)
        self._jobs = [_Job(file, staging, settings.chunk_size, boot) for file in largest_first]
        self._condition = threading.Condition()
        self._wires = [Wire(source.context, settings.timeout) for _ in range(settings.connections)]
        self._meter: Meter | None = None

    @property
    def missing(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(job.file.size - job.present for job in self._jobs)

    def run(self, meter: Meter) -> dict[str, str | None]:
        """Fetches and verifies everything.

        Returns: SHA-256 by path, None where none was computed.
        Raises: TemplateErrors, and what `stop` was set with.
        """
        self._meter = meter
        meter.found(sum(job.present for job in self._jobs))
        threads = [
            threading.Thread(target=self._work, args=(wire,), name=f"fetch-{n}", daemon=True)
            for n, wire in enumerate(self._wires)
        ]
        flusher = threading.Thread(target=self._flush, name="flush", daemon=True)
        self._stop.call(self._abort)
        try:
            for thread in threads:
                thread.start()
            if self._settings.sync:
                flusher.start()
            with self._condition:
                while not self._over():
                    self._condition.wait(0.5)
            self._stop.check()
        finally:
            self._stop.forget(self._abort)
            for thread in threads:
                thread.join()
            for job in self._jobs:
                job.close()
            for wire in self._wires:
                wire.close()
        return {job.file.path: job.sha256 for job in self._jobs}

    # Scheduling

    def _over(self) -> bool:
        return self._stop.is_set() or all(job.finished for job in self._jobs)

    def _abort(self) -> None:
        for wire in self._wires:
            wire.abort()

    def _take(self) -> _Work | None:
        """The next chunk to fetch; None when there is no more."""
        with self._condition:
            while not self._over():
                for job in self._active():
                    work = self._next(job)
                    if work is not None:
                        return work
                self._condition.wait(0.5)
            return None

    def _active(self) -> Iterator[_Job]:
        """The files whose turn it is, the one with the fewest chunks done first: side by side."""
        unfinished = [job for job in self._jobs if not job.finished][:AT_ONCE]
        return iter(sorted(unfinished, key=lambda job: len(job.plan) - len(job.pending)))

    def _next(self, job: _Job) -> _Work | None:
        if job.journal is None:
            job.open()
            self._follow(job)
        if not job.pending or job.whole or (job.probing and not job.ranges):
            return None
        job.probing = True
        return _Work(job, job.pending.popleft(), job.generation)

    def _work(self, wire: Wire) -> None:
        buffer = memoryview(bytearray(PIECE))
        try:
            while (work := self._take()) is not None:
                try:
                    self._fetch(wire, work, buffer)
                except _Stale:
                    continue
                except _Wrong as reason:
                    self._again(work.job, work.generation, str(reason))
        except TemplateError as error:
            self._stop.set(error)
        except OSError as error:
            self._stop.set(from_os_error(error))
        except BaseException as error:
            self._stop.set(error)
        finally:
            with self._condition:
                self._condition.notify_all()

    def _again(self, job: _Job, generation: int, reason: str) -> None:
        """Begins a file anew because what came is wrong, a bounded number of times."""
        with self._condition:
            if job.generation != generation or job.finished:
                return
            job.attempts += 1
            if job.attempts >= self._settings.attempts:
                job.close()
                job.target.unlink(missing_ok=True)
                job._where.unlink(missing_ok=True)
                raise VerificationError(
                    f"{job.file.path}: {reason}, {job.attempts} times: the store does not hold "
                    "what was pinned; pin the model again or repair the store"
                )
            self._console.warning(f"{job.file.path}: {reason}; fetching it again")
            if self._meter:
                self._meter.found(-job.present)
            job.restart()
            self._follow(job)
            self._condition.notify_all()

    # Fetching

    def _fetch(self, wire: Wire, work: _Work, buffer: memoryview) -> None:
        """One chunk, with as many requests as it takes."""
        job, chunk = work.job, work.chunk
        position = chunk.start
        failures = refusals = 0
        while position < chunk.end:
            self._current(work)
            request = self._source.request(job.file)
            try:
                position = self._receive(wire, request, work, position, buffer)
                failures = refusals = 0
            except _NoRanges:
                self._fetch_whole(wire, work, buffer)
                return
            except DeniedError:
                refusals += 1
                if refusals > 2 or not self._source.refused(job.file, request):
                    raise
            except _Short as short:
                failures = 1 if short.position > position else failures + 1
                position = short.position
                self._pause(job, failures, short.again)
            except (_Again, ConnectionFailed) as error:
                failures += 1
                self._pause(job, failures, error)
        self._done(work, chunk)

    def _receive(
        self, wire: Wire, request: Request, work: _Work, position: int, buffer: memoryview
    ) -> int:
        """One request for the rest of a chunk; returns the position behind its last byte."""
        job, chunk = work.job, work.chunk
        everything = position == 0 and chunk.end == job.file.size
        if not everything:
            ranged = {"Range": f"bytes={position}-{chunk.end - 1}"}
            if job.validator and job.validator.startswith('"'):
                ranged["If-Range"] = job.validator
            request = request.with_headers(**ranged)
        response = wire.send(request)
        try:
            self._check_status(response, job)
            if response.status == 206 and not everything:
                if not _right_range(response, position, chunk.end, job.file.size):
                    raise _NoRanges
            elif not everything:
                raise _NoRanges
            self._check_version(response, work)
            with self._condition:
                if not everything and not job.ranges:
                    job.ranges = True
                    self._condition.notify_all()
            _check_length(response, chunk.end - position)
            return self._copy(response, work, position, chunk.end, buffer)
        finally:
            wire.finish(response)

    def _fetch_whole(self, wire: Wire, work: _Work, buffer: memoryview) -> None:
        """The whole file as one stream: the server has no ranges."""
        job = work.job
        with self._condition:
            if job.generation != work.generation or job.whole:
                raise _Stale
            job.whole = True
            job.pending.clear()
            if self._meter:
                self._meter.found(-job.present)
            job.done.clear()
        self._console.info(f"{job.file.path}: the server sends no ranges, so one stream it is")
        failures = refusals = 0
        while True:
            self._current(work)
            request = self._source.request(job.file)
            try:
                response = wire.send(request)
                try:
                    self._check_status(response, job)
                    self._check_version(response, work)
                    _check_length(response, job.file.size)
                    self._copy(response, work, 0, job.file.size, buffer)
                    if response.length is None and response.read(1):
                        raise _Wrong(f"the store sends more than {job.file.size:,} bytes")
                finally:
                    wire.finish(response)
                break
            except DeniedError:
                refusals += 1
                if refusals > 2 or not self._source.refused(job.file, request):
                    raise
            except (_Short, _Again, ConnectionFailed) as error:
                failures += 1
                if self._meter and isinstance(error, _Short):
                    self._meter.found(-error.position)
                self._pause(job, failures, error)
        for chunk in job.plan:
            self._done(work, chunk)

    def _copy(
        self,
        response: http.client.HTTPResponse,
        work: _Work,
        position: int,
        end: int,
        buffer: memoryview,
    ) -> int:
        """Writes the body to the file. Raises _Short with the position that was reached."""
        assert self._meter is not None
        window_at, window_bytes = time.monotonic(), 0
        while position < end:
            try:
                count = response.readinto(buffer[: min(len(buffer), end - position)])
            except (OSError, http.client.HTTPException) as error:
                raise _Short(position, _Again(describe(error))) from None
            if not count:
                raise _Short(position, _Again("the connection was cut"))
            self._current(work)
            written = 0
            while written < count:
                written += os.pwrite(work.job.fd, buffer[written:count], position + written)
            position += count
            self._meter.add(count)
            window_bytes += count
            elapsed = time.monotonic() - window_at
            if elapsed > self._settings.timeout:
                if window_bytes < SLOWEST * elapsed:
                    raise _Short(position, _Again("next to nothing arrives"))
                window_at, window_bytes = time.monotonic(), 0
        return position

    def _current(self, work: _Work) -> None:
        self._stop.check()
        if work.job.generation != work.generation:
            raise _Stale

    def _pause(self, job: _Job, failures: int, reason: Exception) -> None:
        """Waits before the next try; raises UnreachableError when there was one too many."""
        if failures > self._settings.retries:
            raise UnreachableError(
                f"{job.file.path} could not be fetched, {failures} tries in a row: {reason}"
            )
        after = getattr(reason, "after", None)
        if after is None:
            after = min(0.1 * 2**failures, MAX_BACKOFF) * random.uniform(0.5, 1.0)
        self._stop.sleep(min(after, MAX_RETRY_AFTER))

    def _check_status(self, response: http.client.HTTPResponse, job: _Job) -> None:
        status, where = response.status, self._source.name
        if status in (200, 206):
            kind = response.headers.get_content_type() if "Content-Type" in response.headers else ""
            if kind == "text/html" and not job.file.path.endswith((".html", ".htm")):
                raise UnreachableError(
                    f"{where} answers with a web page instead of {job.file.path}: a login or an "
                    "ingress stands in between; check MLFLOW_TRACKING_URI and the credentials"
                )
            return
        if status in (404, 410):
            raise NotFoundError(
                f"{job.file.source} is gone ({where} answers {status}): register the model again"
            )
        if status in (401, 403):
            if b"Invalid Host header" in response.read(4096):
                raise DeniedError(
                    f"{where} refuses the host name that it was called by: start MLflow with "
                    "--allowed-hosts"
                )
            raise DeniedError(
                f"{where} refuses {job.file.source} ({status}): check the credentials and their "
                "permission to read"
            )
        if status == 416:
            raise _Wrong("the store's file is shorter than pinned")
        if status in RETRYABLE:
            raise _Again(f"{where} answers {status}", _retry_after(response))
        raise UnreachableError(f"{where} answers {status} for {job.file.source}")

    def _check_version(self, response: http.client.HTTPResponse, work: _Work) -> None:
        """Holds on to one version of the file, as far as the store names versions."""
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        job = work.job
        if validator is None:
            return
        with self._condition:
            if job.generation != work.generation:
                raise _Stale
            if job.validator is None:
                job.validator = validator
                if job.journal is not None:
                    job.journal.validator(validator)
            elif job.validator != validator:
                raise _Wrong("the store's file has changed since it was begun")

    def _done(self, work: _Work, chunk: Chunk) -> None:
        with self._condition:
            if work.job.generation != work.generation:
                raise _Stale
            assert work.job.journal is not None
            work.job.journal.done(chunk.index)
            work.job.done.add(chunk.index)
            self._condition.notify_all()

    # Digests

    def _follow(self, job: _Job) -> None:
        threading.Thread(
            target=self._digest, args=(job, job.generation), name="digest", daemon=True
        ).start()

    def _digest(self, job: _Job, generation: int) -> None:
        """Computes the file's digests as its chunks come in, then verifies it."""
        try:
            digests = Digests(job.file, self._settings.digests == "always")
            buffer = memoryview(bytearray(PIECE))
            for chunk in job.plan:
                with self._condition:
                    while chunk.index not in job.done and job.generation == generation:
                        if self._stop.is_set():
                            return
                        self._condition.wait(0.5)
                    if job.generation != generation:
                        return
                if digests:
                    _read_into(digests, job.fd, chunk, buffer)
                self._stop.check()
            problem = digests.mismatch() or structure_problem(job.target)
            if problem:
                self._again(job, generation, problem)
                return
            if self._settings.sync and job.journal is not None:
                job.journal.checkpoint(job.fd)
            with self._condition:
                job.sha256 = digests.sha256
                job.finished = True
                job.close()
                self._condition.notify_all()
        except OSError as error:
            self._stop.set(from_os_error(error))
        except BaseException as error:
            self._stop.set(error)

    def _flush(self) -> None:
        """Lets the disk keep up with the network, so that little is left to flush at the end."""
        try:
            while not self._over():
                self._stop.sleep(CHECKPOINT_EVERY)
                for job in self._jobs:
                    journal, fd = job.journal, job.fd
                    if journal is not None and not job.finished and fd >= 0:
                        journal.checkpoint(fd)
        except (OSError, Exception):
            return


class _Short(Exception):
    """A body that ended early."""

    def __init__(self, position: int, again: _Again) -> None:
        super().__init__(str(again))
        self.position, self.again = position, again


def _read_into(digests: Digests, fd: int, chunk: Chunk, buffer: memoryview) -> None:
    position = chunk.start
    while position < chunk.end:
        count = os.preadv(fd, [buffer[: min(len(buffer), chunk.end - position)]], position)
        if not count:
            raise OSError(5, "the file became shorter while it was fetched")
        digests.update(buffer[:count])
        position += count


_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def _right_range(response: http.client.HTTPResponse, start: int, end: int, size: int) -> bool:
    """Whether a 206 is what was asked for. s3rver answers bytes=0-0 with everything."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not match:
        return False
    if match[3] != "*" and int(match[3]) != size:
        raise _Wrong(f"the store's file has {int(match[3]):,} bytes, the pin says {size:,}")
    return (int(match[1]), int(match[2])) == (start, end - 1)


def _check_length(response: http.client.HTTPResponse, expected: int) -> None:
    if response.length is not None and response.length != expected:
        raise _Wrong(f"the store sends {response.length:,} bytes where {expected:,} are due")


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None
