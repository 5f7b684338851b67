"""What is left when the program ends at a bad moment: kill -9, SIGTERM, a clock that jumps."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fetchkit.models import PinnedModel, contents
from fetchkit.program import Pod, assert_ready
from fetchkit.store import Store, serve

ROUNDS = 100
CHUNK = 128 * 1024
CONNECTIONS = 4


def wait_until_sent(store: Store, count: int, process) -> None:
    while store.sent < count and process.poll() is None:
        time.sleep(0.005)


def test_a_hundred_kills_then_a_run_that_completes(pod: Pod, model: PinnedModel) -> None:
    """Killed at random points of the start, the download, the digest and the publishing."""
    chance = random.Random(20260722)
    total = sum(map(len, model.files.values()))
    killed = 0
    with serve(model.files) as store:
        for _ in range(ROUNDS):
            store.rate = chance.choice([None, 4e6, 1e6])
            process = pod.start(model, store.url)
            try:
                process.wait(timeout=chance.uniform(0.05, 0.45))
            except subprocess.TimeoutExpired:
                killed += 1
            process.kill()
            process.communicate()
            if pod.version_folder().exists():
                assert contents(pod.version_folder()) == dict(model.files)
                shutil.rmtree(pod.version_folder())
                pod.link.unlink(missing_ok=True)
        store.rate = None
        before = store.sent
        assert_ready(pod.run(model, store.url), pod, model)
    assert killed > ROUNDS / 4
    assert store.sent - before <= total
    left = [path.name for path in (pod.cache / "acme-tiny").iterdir()]
    assert sorted(left) == [".3.lock", "3"]


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_kill_costs_at_most_one_chunk_per_connection(
    pod: Pod, mirrored: PinnedModel, share: float
) -> None:
    total = sum(map(len, mirrored.files.values()))
    with serve(mirrored.files, rate=1.5e6) as store:
        process = pod.start(mirrored, store.url)
        wait_until_sent(store, int(total * share), process)
        process.kill()
        process.communicate()
        assert not pod.looks_complete()
        store.rate = None
        sent_before = store.sent
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
    assert store.sent - sent_before <= total * (1 - share) + CONNECTIONS * CHUNK
    assert sent_before >= int(total * share)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_ends_it_and_keeps_what_has_arrived(
    pod: Pod, mirrored: PinnedModel, number: signal.Signals
) -> None:
    total = sum(map(len, mirrored.files.values()))
    with serve(mirrored.files, rate=3e5) as store:
        process = pod.start(mirrored, store.url)
        wait_until_sent(store, total // 3, process)
        process.send_signal(number)
        log, _ = process.communicate(timeout=2)  # two seconds are the promise
        assert process.returncode == 143, log
        assert f"stopped by {number.name}" in log
        assert f"stopped by {number.name}" in pod.termination.read_text()
        assert not pod.looks_complete()
        store.rate = None
        sent_before = store.sent
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
    assert store.sent - sent_before <= total * 2 / 3 + CONNECTIONS * CHUNK


def test_a_signal_ends_it_while_the_server_is_silent(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files, rate=100.0) as store:
        process = pod.start(model, store.url)
        wait_until_sent(store, 1, process)
        process.terminate()
        log, _ = process.communicate(timeout=2)
    assert process.returncode == 143, log


def test_a_clock_that_jumps_changes_nothing(
    pod: Pod, mirrored: PinnedModel, tmp_path: Path
) -> None:
    """Each look at the clock is off by up to ten years, into the past or the future."""
    patch = tmp_path / "clock"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import random, time\n"
        "now, now_ns = time.time, time.time_ns\n"
        "off = lambda: random.choice([-3, -1, 0, 1, 3]) * 1e8\n"
        "time.time = lambda: now() + off()\n"
        "time.time_ns = lambda: now_ns() + int(off() * 1e9)\n"
    )
    path = f"{patch}:{pod.environment(None)['PYTHONPATH']}"
    with serve(mirrored.files, rate=4e6) as store:
        runs = [
            pod.run(mirrored, store.url, "--keep", "0", env={"PYTHONPATH": path}) for _ in range(3)
        ]
        once = store.sent
    for run in runs:
        assert_ready(run, pod, mirrored)
    assert once == sum(map(len, mirrored.files.values()))
