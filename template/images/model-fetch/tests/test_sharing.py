"""Several pods on one volume: one fetches, the others wait and say so."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fetchkit.models import PinnedModel
from fetchkit.program import Pod, Run, assert_ready
from fetchkit.store import serve
from model_fetch import lock
from model_fetch.chunks import boot_id
from model_fetch.console import Console
from model_fetch.failures import LockTimeout
from model_fetch.lock import LockLost
from model_fetch.stop import Stop


def pods(count: int, folder: Path) -> list[Pod]:
    """So many pods, each with its own link, on one volume."""
    return [Pod(folder / f"pod-{n}", cache=folder / "cache") for n in range(count)]


@pytest.mark.parametrize("count", [2, 8])
def test_several_at_once_fetch_once(tmp_path: Path, mirrored: PinnedModel, count: int) -> None:
    total = sum(map(len, mirrored.files.values()))
    with serve(mirrored.files, rate=2e6) as store:
        group = pods(count, tmp_path)
        processes = [pod.start(mirrored, store.url) for pod in group]
        logs = [process.communicate(timeout=90)[0] for process in processes]
    for pod, process, log in zip(group, processes, logs, strict=True):
        assert_ready(Run(process.returncode, log), pod, mirrored)
    assert store.sent == total
    assert (
        sum("fetched by another process" in log or "already there" in log for log in logs)
        == count - 1
    )
    assert any("waiting for " in log for log in logs)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_the_lock_of_a_dead_holder_is_taken_over(
    tmp_path: Path, mirrored: PinnedModel, end: signal.Signals
) -> None:
    first, second = pods(2, tmp_path)
    total = sum(map(len, mirrored.files.values()))
    with serve(mirrored.files, rate=4e5) as store:
        holder = first.start(mirrored, store.url)
        while store.sent < total // 4:
            time.sleep(0.01)
        waiting = second.start(mirrored, store.url, "--lease", "600")
        time.sleep(0.5)
        holder.send_signal(end)
        holder.communicate()
        store.rate = None
        log, _ = waiting.communicate(timeout=60)
    assert_ready(Run(waiting.returncode, log), second, mirrored)
    assert store.sent <= total + 4 * 128 * 1024 + 65536 * 4  # what was under way to the first


def test_a_holder_on_another_machine_is_dead_when_its_sign_of_life_stands_still(
    pod: Pod, mirrored: PinnedModel
) -> None:
    path = pod.cache / "acme-tiny" / ".3.lock"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"token": "other:1:abc", "boot": "elsewhere", "beat": 7, "bytes": 9})
    )
    with serve(mirrored.files) as store:
        run = pod.run(mirrored, store.url, "--lease", "1")
    assert_ready(run, pod, mirrored)
    assert "taking over from other:1:abc" in run.log


def test_a_holder_on_another_machine_that_lives_is_waited_for(
    pod: Pod, mirrored: PinnedModel
) -> None:
    """The file system grants the flock to everybody, so only the sign of life speaks."""
    path = pod.cache / "acme-tiny" / ".3.lock"
    path.parent.mkdir(parents=True)
    quit = threading.Event()

    def record(count: int) -> None:
        text = json.dumps(
            {"token": "other:1:abc", "boot": "elsewhere", "beat": count, "bytes": 5_000_000}
        )
        with path.open("r+" if path.exists() else "w") as stream:
            stream.write(text.ljust(512))

    def beat() -> None:
        count = 1
        while not quit.wait(0.1):
            count += 1
            record(count)

    record(1)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with serve(mirrored.files) as store:
            run = pod.run(mirrored, store.url, "--lease", "1", "--lock-timeout", "3")
    finally:
        quit.set()
        thread.join()
    assert run.code == 8, run.log
    assert "waiting for other:1:abc" in run.log
    assert "5 MB so far" in run.log
    assert store.sent == 0


def test_a_holder_that_stood_still_and_wakes_up_does_no_harm(
    tmp_path: Path, mirrored: PinnedModel
) -> None:
    """Its machine was taken for dead: the other one has moved the folder and published."""
    first, second = pods(2, tmp_path)
    total = sum(map(len, mirrored.files.values()))
    with serve(mirrored.files, rate=4e5) as store:
        holder = first.start(mirrored, store.url)
        while store.sent < total // 4:
            time.sleep(0.01)
        holder.send_signal(signal.SIGSTOP)
        # Another machine's lock: a file of its own under the same name, which shares no flock.
        (first.cache / "acme-tiny" / ".3.lock").unlink()
        beat = first.cache / "acme-tiny" / ".3.claim-1" / "beat"
        beat.write_bytes(beat.read_bytes().replace(boot_id().encode(), b"elsewhere"))
        store.rate = None
        assert_ready(second.run(mirrored, store.url, "--lease", "1"), second, mirrored)
        holder.send_signal(signal.SIGCONT)
        log, _ = holder.communicate(timeout=60)
    assert holder.returncode == 0, log
    assert first.holds(mirrored)
    assert second.holds(mirrored)


def hold(path: Path, **more):
    settings = {
        "lease": 0.4,
        "timeout": 5.0,
        "console": Console(stream=io.StringIO()),
        "stop": Stop(),
        "done": lambda: False,
        "progress": lambda: 0,
    }
    return lock.held(path, **{**settings, **more})


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_flock_has_the_sign_of_life_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "x.lock"
    with hold(path) as first:
        assert first is not None
        with pytest.raises(LockTimeout), hold(path, timeout=1.0):
            pass
    with hold(path) as again:
        assert again is not None


def test_who_loses_the_lock_is_told(tmp_path: Path) -> None:
    path, stop = tmp_path / ".3.lock", Stop()
    with hold(path, stop=stop) as held:
        assert held is not None
        (tmp_path / ".3.claim-2").mkdir()
        with pytest.raises(LockLost):
            stop.sleep(10)
        assert held.lost
    assert lock.claims(path)[-1].number == 2


def test_a_number_that_was_given_out_anew_is_not_one_s_own(tmp_path: Path) -> None:
    """This one stood still; another took over, ended, and a third one has the same number now."""
    path, stop = tmp_path / ".3.lock", Stop()
    with hold(path, stop=stop) as held:
        assert held is not None
        record = json.loads((tmp_path / ".3.claim-1/beat").read_text())
        (tmp_path / ".3.claim-1/beat").write_text(json.dumps({**record, "token": "third"}))
        with pytest.raises(LockLost):
            stop.sleep(10)
    assert json.loads((tmp_path / ".3.claim-1/beat").read_text())["token"] == "third"
