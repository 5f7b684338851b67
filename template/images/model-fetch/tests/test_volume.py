"""The volume: full, read-only, changed by somebody, with old versions on it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fetchkit.models import LARGE, PinnedModel, embedding_model, large_model
from fetchkit.program import Pod, assert_failed, assert_ready
from fetchkit.store import serve

MIB = 1 << 20


@contextmanager
def small_volume(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own; needs the right to mount."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here: that needs root and CAP_SYS_ADMIN")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_volume_that_is_too_small_is_noticed_before_the_first_byte(
    pod: Pod, model: PinnedModel
) -> None:
    with small_volume(pod.cache, "size=12m"), serve(model.files) as store:
        run = pod.run(model, store.url)
        assert_failed(run, pod, 6)
        assert "MB free" in run.last
        assert store.sent == 0


def test_a_volume_that_fills_up_meanwhile(pod: Pod) -> None:
    """Another pod writes to it while the model comes in; then makes room again."""
    big = PinnedModel(embedding_model(weights=8 * MIB), "mlflow-artifacts:/model", sha256=True)
    with small_volume(pod.cache, "size=40m") as volume, serve(big.files, rate=2e6) as store:
        process = pod.start(big, store.url)
        while store.sent < 2 * MIB:
            time.sleep(0.01)
        hog = volume / "somebody-else"
        with hog.open("wb") as stream:
            try:
                while True:
                    stream.write(bytes(256 * 1024))
                    stream.flush()
            except OSError:
                pass
        log, _ = process.communicate(timeout=60)
        assert process.returncode == 6, log
        assert f"no space left at {pod.cache}" in log
        assert not pod.looks_complete()
        hog.unlink()
        store.rate = None
        assert_ready(pod.run(big, store.url), pod, big)
        pod.link.unlink()


def test_a_read_only_volume_is_said(pod: Pod, model: PinnedModel) -> None:
    with small_volume(pod.cache, "size=40m,ro"), serve(model.files) as store:
        run = pod.run(model, store.url)
        assert_failed(run, pod, 2)
    assert "read-write" in run.last


def test_a_read_only_volume_with_the_whole_version_is_enough(pod: Pod, model: PinnedModel) -> None:
    with small_volume(pod.cache, "size=40m") as volume, serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
        subprocess.run(["mount", "-o", "remount,ro", str(volume)], check=True)
        pod.link.unlink()
        assert_ready(pod.run(model, None), pod, model)
        pod.link.unlink()


def test_a_model_of_1_7_gb_is_gone_on_with_after_a_kill(pod: Pod) -> None:
    """Generated: what counts are its hundred chunks, on a real disk."""
    large = large_model(pod.folder)
    weights = large.files["model.safetensors"]
    with serve(large.files) as store:
        first = pod.start(large, store.url, "--chunk-size", "16")
        while store.sent < LARGE // 3 and first.poll() is None:
            time.sleep(0.01)
        first.kill()
        first.communicate()
        before = store.sent
        run = pod.run(large, store.url, "--chunk-size", "16", timeout=240)
        assert run.code == 0, run.log
        assert store.sent - before < LARGE - LARGE // 3 + 5 * 16 * MIB
    marker = json.loads((pod.version_folder() / ".model-fetch.json").read_text())
    known = {file["path"]: file["sha256"] for file in marker["files"]}
    assert known["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    verified = pod.run(large, None, "--verify", timeout=240)
    assert verified.code == 0, verified.log
    shutil.rmtree(pod.folder)


def test_the_second_start_fetches_and_reads_nothing(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    weights = pod.version_folder() / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns))
    run = pod.run(model, None)  # no server, no address of one
    assert_ready_without_reading = weights.stat().st_atime_ns == 0
    assert_ready(run, pod, model)
    assert assert_ready_without_reading
    assert "already there" in run.last


@pytest.mark.parametrize("change", ["flip", "shorten", "remove", "add", "marker"])
def test_a_changed_folder_is_noticed_and_made_anew(
    pod: Pod, model: PinnedModel, change: str
) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
        weights = pod.version_folder() / "model.safetensors"
        content = bytearray(weights.read_bytes())
        if change == "flip":
            content[5000] ^= 1
            weights.write_bytes(content)
        elif change == "shorten":
            weights.write_bytes(content[:-8])
        elif change == "remove":
            (pod.version_folder() / "config.json").unlink()
        elif change == "add":
            (pod.version_folder() / "model.onnx").write_bytes(b"TEI would load this first")
        else:
            (pod.version_folder() / ".model-fetch.json").write_text("{")
        assert_ready(pod.run(model, store.url), pod, model)


@pytest.mark.parametrize(
    ("left", "harmless"),
    [
        (".nfs00000000000c31a200000007", True),
        (".nfs.json", False),
        (".nfs00000000000c31a200000007.onnx", False),
        (".DS_Store", False),
    ],
)
def test_what_nfs_keeps_of_a_deleted_file_costs_no_fetch(
    pod: Pod, model: PinnedModel, left: str, harmless: bool
) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    (pod.version_folder() / left).write_bytes(b"deleted while it was open")
    run = pod.run(model, None)  # no server
    assert ("already there" in run.last) is harmless
    assert (run.code == 0) is harmless


def test_a_restored_backup_is_read_once_and_kept(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    for path in pod.version_folder().rglob("*.json"):
        if path.name != ".model-fetch.json":
            os.utime(path, (1, 1))
    assert_ready(pod.run(model, None), pod, model)


def test_verify_finds_a_flipped_bit_that_nobody_can_see(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    assert pod.run(model, None, "--verify").code == 0
    weights = pod.version_folder() / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run = pod.run(model, None, "--verify")
    assert run.code == 7, run.log
    assert "model.safetensors" in run.last


def test_a_model_that_was_deleted_and_made_anew_replaces_the_old_one(
    pod: Pod, model: PinnedModel
) -> None:
    """MLflow counts a re-created model's versions from 1 again."""
    anew = PinnedModel(embedding_model(seed=2), model.artifact_uri, more={"run_id": "another"})
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    with serve(anew.files) as store:
        assert_ready(pod.run(anew, store.url), pod, anew)


def test_a_link_that_is_a_folder_is_left_alone(pod: Pod, model: PinnedModel) -> None:
    pod.link.mkdir(parents=True)
    (pod.link / "mine").write_text("x")
    with serve(model.files) as store:
        run = pod.run(model, store.url)
    assert run.code == 2, run.log
    assert (pod.link / "mine").read_text() == "x"


class TestPruning:
    """Off unless asked for; never a version that may be in use."""

    @staticmethod
    def versions(pod: Pod, model: PinnedModel, hours_ago: dict[str, float]) -> None:
        """Versions whose last start was so many hours ago."""
        with serve(model.files) as store:
            for version, hours in hours_ago.items():
                of = replace(model, version=version)
                assert pod.run(of, store.url).code == 0
                at = time.time() - hours * 3600
                os.utime(pod.version_folder(version) / ".model-fetch.json", (at, at))

    @staticmethod
    def left(pod: Pod) -> list[str]:
        return sorted(
            path.name for path in pod.version_folder().parent.iterdir() if path.name.isdigit()
        )

    def test_nothing_is_removed_unless_asked(self, pod: Pod, model: PinnedModel) -> None:
        self.versions(pod, model, {"1": 900, "2": 800, "3": 0})
        assert pod.run(model, None).code == 0
        assert self.left(pod) == ["1", "2", "3"]

    def test_the_ones_that_were_started_last_are_kept(self, pod: Pod, model: PinnedModel) -> None:
        self.versions(pod, model, {"1": 700, "2": 900, "3": 0, "4": 800})
        assert pod.run(model, None, "--keep", "1").code == 0
        assert self.left(pod) == ["1", "3"]

    def test_a_recent_start_or_one_in_the_future_keeps_a_version(
        self, pod: Pod, model: PinnedModel
    ) -> None:
        self.versions(pod, model, {"1": 900, "2": 23, "3": 0, "4": -900})
        assert pod.run(model, None, "--keep", "0").code == 0
        assert self.left(pod) == ["2", "3", "4"]

    def test_a_mapped_version_is_kept(self, pod: Pod, model: PinnedModel) -> None:
        """As TEI maps its weights."""
        self.versions(pod, model, {"1": 900, "2": 900, "3": 0})
        with (
            (pod.version_folder("1") / "model.safetensors").open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ),
        ):
            assert pod.run(model, None, "--keep", "0").code == 0
        assert self.left(pod) == ["1", "3"]

    def test_a_locked_version_is_kept(self, pod: Pod, model: PinnedModel) -> None:
        import fcntl

        self.versions(pod, model, {"1": 900, "2": 900, "3": 0})
        with (pod.version_folder().parent / ".2.lock").open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            assert pod.run(model, None, "--keep", "0").code == 0
        assert self.left(pod) == ["2", "3"]

    def test_an_old_download_that_was_given_up_goes_too(self, pod: Pod, model: PinnedModel) -> None:
        self.versions(pod, model, {"3": 0})
        old = pod.version_folder().parent / ".1.staging-abc"
        shutil.copytree(pod.version_folder(), old / "files")
        os.utime(old, (1, 1))
        assert pod.run(model, None, "--keep", "0").code == 0
        assert not old.exists()
