"""Fetches files over HTTP: parallel ranges of several files, digests on the way, resumable.

The first chunk of a file goes alone: its answer shows whether the server honours ranges (MLflow
3.4's proxy and MLflow's proxy of an S3 store do not), and names the version of the file (ETag) that
all further answers must be of.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from . import limits
from .cache import Staging
from .chunks import Chunk
from .console import Console, Meter, duration
from .embedding_model import PinnedFile
from .failures import UnreachableError, VerificationError, from_os_error
from .follow import Follower, ReadBack, Told
from .job import Job, Work
from .patience import Reasons
from .ramp import Ramp
from .responses import NoRanges, Wrong
from .settings import Settings
from .sources import HttpSource
from .stop import Stop
from .verify import Digests, structure_problem
from .worker import Stale, Worker

AT_ONCE = 4  # files that are fetched side by side
CHECKPOINT_EVERY = 5.0  # seconds between two flushes to the disk
STORE = "the store does not hold what was pinned; pin the model again or mend the store"
VOLUME = "use another volume for the cache, or mend this one"


class _Standstill:
    """Sees that a whole transfer stands still, though each of its connections brings a little."""

    def __init__(self, meter: Meter, timeout: float) -> None:
        self.seconds = limits.STANDSTILL * timeout
        self._meter = meter
        self._since, self._received = time.monotonic(), meter.received

    def lasts(self) -> bool:
        elapsed = time.monotonic() - self._since
        if elapsed < self.seconds:
            return False
        received = self._meter.received - self._received
        self._since, self._received = time.monotonic(), self._meter.received
        return received < limits.SLOWEST * elapsed


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
        self._settings, self._console, self._stop = settings, console, stop
        self._sync = settings.sync or not staging.local
        largest_first = sorted(files, key=lambda file: -file.size)
        self._jobs = [Job(file, staging, settings.chunk_size) for file in largest_first]
        reasons = Reasons(console)
        self._workers = [
            Worker(source, settings, stop, reasons, self) for _ in range(settings.connections)
        ]
        self._condition = threading.Condition(threading.RLock())
        self._followers: list[Follower] = []
        self._ended = threading.Event()
        self._meter: Meter

    @property
    def missing(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(job.file.size - job.present for job in self._jobs)

    def run(self, meter: Meter) -> dict[str, str | None]:
        """Fetches and verifies everything.

        Returns: SHA-256 by path, None where none was computed.
        Raises: TemplateErrors, and what `stop` was set with. What can be resumed stays.
        """
        self._meter = meter
        meter.found(sum(job.present for job in self._jobs))
        ramp = Ramp(len(self._workers))
        standstill = _Standstill(meter, self._settings.timeout)
        threads: list[threading.Thread] = []
        flush = threading.Thread(target=self._flush, name="flush", daemon=True)
        self._stop.call(self._abort)
        try:
            if self._sync:
                flush.start()
            with self._condition:
                while not self._over():
                    wanted = ramp.connections(meter.received, time.monotonic())
                    for worker in self._workers[len(threads) : wanted]:
                        name = f"fetch-{len(threads)}"
                        threads.append(
                            threading.Thread(
                                target=self._work, args=(worker,), name=name, daemon=True
                            )
                        )
                        threads[-1].start()
                    self._condition.wait(0.5)
                    if standstill.lasts() and self.missing:
                        self._stop.set(
                            UnreachableError(
                                "next to nothing has arrived for "
                                f"{duration(standstill.seconds)}: look at the store and the network"
                            )
                        )
            self._stop.check()
        finally:
            self._stop.forget(self._abort)
            self._ended.set()
            for follower in self._followers:
                follower.cancel()
            for thread in threads:
                thread.join()
            if flush.is_alive():
                flush.join()
            for follower in self._followers:
                follower.join()
            if self._stop.is_set() and self._sync:
                self._keep()
            for job in self._jobs:
                job.close()
        return {job.file.path: job.sha256 for job in self._jobs}

    def _keep(self) -> None:
        """Flushes what has arrived, so that a pod on another machine can go on with it."""
        for job in self._jobs:
            try:
                job.checkpoint()
            except OSError:
                return

    # What a worker tells (worker.Observer)

    def received(self, count: int) -> None:
        self._meter.add(count)

    def answered(self, work: Work, validator: str | None) -> None:
        job = work.job
        with self._condition:
            self._check(work)
            if validator is not None and job.validator is None:
                job.validator = validator
                assert job.journal is not None
                job.journal.validator(validator)
            elif validator is not None and job.validator != validator:
                raise Wrong("the store's file has changed since it was begun")
            if not job.ranges:
                job.ranges = True
                self._condition.notify_all()

    def done(self, work: Work, index: int) -> None:
        with self._condition:
            self._check(work)
            work.job.arrived(index)
        work.follower.arrived(index)

    def whole_again(self, work: Work) -> Work:
        """The work that fetches a file as one stream, from its beginning."""
        job = work.job
        with self._condition:
            self._check(work)
            self._begin_anew(job, whole=True)
            assert job.follower is not None
            everything = Chunk(0, 0, job.file.size)
            return Work(job, everything, job.generation, job.sink, job.follower)

    # The workers' threads

    def _over(self) -> bool:
        return self._stop.is_set() or all(job.finished for job in self._jobs)

    def _check(self, work: Work) -> None:
        if work.job.generation != work.generation:
            raise Stale

    def _take(self) -> Work | None:
        """The next chunk to fetch; None when there is no more."""
        with self._condition:
            while not self._over():
                unfinished = [job for job in self._jobs if not job.finished][:AT_ONCE]
                # The file with the fewest chunks taken goes first, so digests run side by side.
                for job in sorted(unfinished, key=lambda job: len(job.plan) - job.pending):
                    if job.journal is None:
                        job.open()
                        self._follow(job)
                    work = job.take()
                    if work is not None:
                        return work
                self._condition.wait(0.5)
            return None

    def _work(self, worker: Worker) -> None:
        try:
            while (work := self._take()) is not None:
                try:
                    self._fetch(worker, work)
                except Stale:
                    pass
                except OSError as error:
                    raise from_os_error(error, work.job.target) from None
                finally:
                    with self._condition:
                        work.job.active -= 1
        except BaseException as error:
            self._fail(error)
        finally:
            worker.close()

    def _fetch(self, worker: Worker, work: Work) -> None:
        try:
            try:
                worker.fetch(work)
            except NoRanges:
                self._console.info(
                    f"{work.job.file.path}: the server sends no ranges, so it comes as one stream"
                )
                work = self.whole_again(work)
                worker.fetch(work)
        except Wrong as reason:
            self._wrong(work.job, str(reason), STORE)

    def _abort(self) -> None:
        for worker in self._workers:
            worker.wire.abort()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, OSError):
            error = from_os_error(error)
        self._stop.set(error)
        with self._condition:
            self._condition.notify_all()

    # Verification

    def _caught_up(self) -> None:
        """A digest has advanced, so its file may be open to more connections again."""
        with self._condition:
            self._condition.notify_all()

    def _follow(self, job: Job) -> None:
        digests = Digests(job.file, self._settings.digests == "always")
        verify = partial(self._verify, job, digests, job.generation)
        told = Told(self._caught_up, verify, self._fail)
        sums = job.sink.sums
        if sums is None:
            job.follower = Follower(digests, job.sink.fd, job.plan, job.done, told)
        else:
            seal = partial(job.seal, job.generation)
            job.follower = ReadBack(digests, job.target, job.plan, job.done, told, sums, seal)
        self._followers.append(job.follower)
        job.follower.start()

    def _verify(self, job: Job, digests: Digests, generation: int, lost: str | None) -> None:
        """Called by a file's follower when all bytes have been digested.

        lost: what the volume does not hold as it was written
        """
        problem = lost or digests.mismatch() or structure_problem(job.target)
        before = job.verified_before
        if not problem and before and digests.sha256 and before != digests.sha256:
            problem = "it was changed after an earlier run had verified it"
        journal = job.journal
        if not problem and journal is not None:
            if digests.sha256:
                journal.verified(digests.sha256)
            if self._sync:
                job.checkpoint()
        with self._condition:
            if job.generation != generation:
                return
            if problem:
                self._wrong(job, problem, VOLUME if lost else STORE)
                return
            job.sha256 = digests.sha256
            job.finished = True
            self._condition.notify_all()

    def _wrong(self, job: Job, problem: str, advice: str) -> None:
        """Begins a file anew because what came is not what was pinned, a bounded number of times."""
        with self._condition:
            job.attempts += 1
            if job.attempts >= self._settings.attempts:
                job.delete()
                raise VerificationError(
                    f"{job.file.path}: {problem}, {job.attempts} times: {advice}"
                )
            self._console.warning(f"{job.file.path}: {problem}; fetching it again")
            self._begin_anew(job, whole=False)
            self._condition.notify_all()

    def _begin_anew(self, job: Job, whole: bool) -> None:
        self._meter.found(-job.present)
        job.restart(whole)
        self._follow(job)

    def _flush(self) -> None:
        """Lets the disk keep up with the network, so that little is left to flush at the end."""
        try:
            while not self._ended.wait(CHECKPOINT_EVERY):
                for job in self._jobs:
                    job.checkpoint()
        except OSError as error:
            self._fail(error)
