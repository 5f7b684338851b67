"""One connection that fetches one chunk after another."""

from __future__ import annotations

import http.client
import time
from typing import Protocol

from . import limits, responses
from .failures import DeniedError
from .job import Work
from .patience import Patience, Reasons
from .receive import PIECE, ReadFailed, Receiver
from .responses import Again, Wrong
from .settings import Settings
from .sources import HttpSource
from .stop import Stop
from .transport import Answer, ConnectionFailed, Request, Wire

MAX_REFUSALS = 3  # in a row; the first one alone leads to a login


class Stale(Exception):
    """The file was begun anew meanwhile, so this work is nobody's any more."""


class Cut(Again):
    """A body ended early."""

    def __init__(self, reason: str, position: int) -> None:
        """position: behind the last byte that is in the file."""
        super().__init__(reason)
        self.position = position


class Observer(Protocol):
    """Who is told what a worker does."""

    def received(self, count: int) -> None:
        """So many bytes came in and are in the file."""

    def answered(self, work: Work, validator: str | None) -> None:
        """A good answer began. Raises Wrong when it is not of the version that was begun."""

    def done(self, work: Work, index: int) -> None:
        """The chunk of this index is in the file."""

    def whole_again(self, work: Work) -> Work:
        """A stream without ranges was cut: the work that begins it anew."""


class Worker:
    """Fetches what it is given over its own connection."""

    def __init__(
        self,
        source: HttpSource,
        settings: Settings,
        stop: Stop,
        reasons: Reasons,
        observer: Observer,
    ) -> None:
        self.wire = Wire(source.trust, settings.timeout)
        self._source, self._settings, self._stop = source, settings, stop
        self._reasons, self._observer = reasons, observer
        self._receiver = Receiver(settings.timeout)

    def close(self) -> None:
        self.wire.close()
        self._receiver.close()

    def fetch(self, work: Work) -> None:
        """Brings a chunk into the file, with as many requests as it takes.

        Raises: NoRanges, Wrong, Stale, TemplateErrors, OSError, and what `stop` was set with.
        """
        position = work.chunk.start
        patience = Patience(work.job.file.path, self._settings, self._stop, self._reasons)
        refusals = 0
        while True:
            self._check(work)
            request: Request | None = None
            try:
                request = self._source.request(work.job.file)
                self._receive(request, work, position)
                return
            except DeniedError:
                refusals += 1
                if request is None or refusals == MAX_REFUSALS:
                    raise
                if not self._source.refused(work.job.file, request, login=refusals == 1):
                    raise
            except (Again, ConnectionFailed) as error:
                reached = error.position if isinstance(error, Cut) else position
                if reached > position and not work.job.whole:
                    patience.progress()
                refusals = 0
                patience.wait(error)
                position = reached
                if work.job.whole and reached:
                    work, position = self._observer.whole_again(work), 0

    def _receive(self, request: Request, work: Work, position: int) -> None:
        """One request for the rest of a chunk."""
        job, end = work.job, work.chunk.end
        everything = position == 0 and end == job.file.size
        if not everything:
            request = request.with_headers(
                **{"Range": f"bytes={position}-{end - 1}", **responses.if_range(job.validator)}
            )
        response = self.wire.send(request)
        try:
            responses.check_status(response, job.file, self._source)
            if not everything:
                responses.check_range(response, position, end, job.file.size)
            self._observer.answered(work, responses.validator(response))
            responses.check_length(response, end - position)
            self._copy(response, work, position)
            if everything and response.length is None and self._more(response):
                raise Wrong(f"the store sends more than {end:,} bytes")
        except Cut:
            self.wire.close()  # what is left would come as slowly
            raise
        finally:
            self.wire.finish(response)

    def _more(self, response: Answer) -> bool:
        """Whether a body of unknown length goes on; one that only does not end has all there is."""
        try:
            return bool(response.small(1, limits.DRAIN_SECONDS))
        except (OSError, http.client.HTTPException, ValueError):
            self.wire.close()
            return False

    def _copy(self, response: Answer, work: Work, position: int) -> None:
        """Writes a body to the file."""
        end, plan = work.chunk.end, work.job.plan
        since, count_since = time.monotonic(), 0
        response.within(self._settings.timeout, PIECE)
        pieces = self._receiver.receive(response, self.wire.raw, work.sink, position, end)
        try:
            for count in pieces:
                self._check(work)
                response.within(self._settings.timeout, PIECE)
                self._observer.received(count)
                before, position = position, position + count
                for index in plan.ends_within(before, position):
                    self._observer.done(work, index)
                count_since += count
                elapsed = time.monotonic() - since
                if elapsed > self._settings.timeout:
                    if count_since < limits.SLOWEST * elapsed:
                        raise Cut("next to nothing arrives", position)
                    since, count_since = time.monotonic(), 0
        except ReadFailed as error:
            raise Cut(str(error), position) from None

    def _check(self, work: Work) -> None:
        self._stop.check()
        if work.job.generation != work.generation:
            raise Stale
