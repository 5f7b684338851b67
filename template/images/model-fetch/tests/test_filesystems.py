"""Real shared file systems: SeaweedFS and JuiceFS, each mount as on a machine of its own.

After every run the bytes are compared through a second mount: what the first one shows may be its
own cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fetchkit.filesystems import Distributed
from fetchkit.models import PinnedModel, contents, embedding_model, large_model, write
from fetchkit.program import PACKAGE, Pod, Run, assert_ready
from fetchkit.store import serve
from model_fetch.verify import read_pieces, sha256_of

MIB = 1 << 20
POD = 10001  # the user of a pod's containers
LARGE = ("--chunk-size", "8", "--connections", "8")  # over what fetchkit says of small models


@pytest.fixture(params=["seaweedfs", "juicefs"])
def shared(request: pytest.FixtureRequest) -> Distributed:
    store: Distributed = request.getfixturevalue(request.param)
    return store


@pytest.fixture(scope="module")
def large() -> PinnedModel:
    return PinnedModel(embedding_model(weights=96 * MIB), "mlflow-artifacts:/model")


@contextmanager
def mounts(store: Distributed, count: int) -> Iterator[list[Path]]:
    with ExitStack() as stack:
        yield [stack.enter_context(store.mount()) for _ in range(count)]


def fresh(mount: Path, name: str) -> Path:
    """A folder for a cache that no other test uses."""
    folder = mount / f"{name}-{time.monotonic_ns()}"
    folder.mkdir()
    return folder


def elsewhere(path: Path, mount: Path, other: Path) -> Path:
    """The same place on another mount."""
    return other / path.relative_to(mount)


def holds(store_view: Path, model: PinnedModel) -> bool:
    return contents(store_view / "acme-tiny" / "3") == dict(model.files)


def test_what_is_published_is_what_the_store_holds(
    shared: Distributed, large: PinnedModel, tmp_path: Path
) -> None:
    with mounts(shared, 2) as (here, there), serve(large.files) as store:
        pod = Pod(tmp_path / "pod", cache=fresh(here, "plain"))
        assert_ready(pod.run(large, store.url, *LARGE, timeout=300), pod, large)
        assert holds(elsewhere(pod.cache, here, there), large)
        verified = pod.run(large, None, "--verify")
        assert verified.code == 0, verified.log
        again = pod.run(large, None)
        assert "already there" in again.last, again.log


def test_a_model_of_1_7_gb_is_right_after_a_takeover(shared: Distributed) -> None:
    """Windows of the digest, flushes and reading back at their real size; the first holder is killed."""
    folder = Path(tempfile.mkdtemp(prefix="large-"))
    try:
        huge = large_model(folder)
        with mounts(shared, 3) as (one, two, there), serve(huge.files) as store:
            cache = fresh(one, "huge")
            first = Pod(folder / "first", cache=cache)
            holder = first.start(huge, store.url, *LARGE)
            while store.sent < 300 * MIB and holder.poll() is None:
                time.sleep(0.05)
            holder.kill()
            holder.communicate()
            second = Pod(folder / "second", cache=elsewhere(cache, one, two))
            run = second.run(huge, store.url, *LARGE, timeout=500)
            assert run.code == 0, run.log
            for path, content in huge.files.items():
                found = sha256_of(read_pieces(elsewhere(cache, one, there) / "acme-tiny/3" / path))
                assert found == hashlib.sha256(content).hexdigest(), path
            shutil.rmtree(cache)
    finally:
        shutil.rmtree(folder)


BUSYBODY = """
import os, sys, time
while True:
    for folder, _, names in os.walk(sys.argv[1]):
        for name in names:
            try:
                os.close(os.open(os.path.join(folder, name), os.O_RDONLY))
            except OSError:
                pass
    time.sleep(0.01)
"""


def test_pages_that_the_file_system_loses_are_never_published(
    seaweedfs: Distributed, large: PinnedModel, tmp_path: Path
) -> None:
    """SeaweedFS 4.48 loses what is written while another descriptor of the file is closed.

    Here a scanner on the machine opens and closes what it sees. Before model-fetch read the files
    back, it published stretches of zeros as whole, from one process as well.
    """
    with mounts(seaweedfs, 2) as (here, there), serve(large.files) as store:
        pod = Pod(tmp_path / "pod", cache=fresh(here, "lossy"))
        scanner = subprocess.Popen([sys.executable, "-c", BUSYBODY, str(pod.cache)])
        try:
            run = pod.run(large, store.url, *LARGE, timeout=300)
        finally:
            scanner.kill()
            scanner.wait()
        seen = elsewhere(pod.cache, here, there)
        if run.code == 0:
            assert holds(seen, large), run.log
        else:
            assert run.code == 7, run.log
            assert "the volume does not hold what was written to it" in run.last
            assert not (seen / "acme-tiny" / "3").exists()
        assert_ready(pod.run(large, store.url, *LARGE, timeout=300), pod, large)
        assert holds(seen, large)


LOSES = """
import os
real = os.fdatasync
def fdatasync(fd):
    real(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if path.endswith("model.safetensors"):
        here, there = os.environ["LOSES"].split(":")
        with open(path.replace(here, there), "r+b") as file:
            file.seek(1 << 20)
            file.write(bytes(4096))
            os.fsync(file.fileno())
os.fdatasync = fdatasync
"""


def test_a_page_that_is_lost_in_the_flush_is_found_behind_the_cache(
    seaweedfs: Distributed, mirrored: PinnedModel, tmp_path: Path
) -> None:
    """The same for certain: each flush ends with a page of zeros in the store, not in the cache."""
    (tmp_path / "sitecustomize.py").write_text(LOSES)
    with mounts(seaweedfs, 2) as (here, there), serve(mirrored.files) as store:
        pod = Pod(tmp_path / "pod", cache=fresh(here, "zeros"))
        lossy = {"PYTHONPATH": f"{PACKAGE}:{tmp_path}", "LOSES": f"{here}:{there}"}
        process = subprocess.Popen(
            [word for word in pod.command(mirrored) if word != "--no-sync"],
            env=pod.environment(store.url, lossy),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log, _ = process.communicate(timeout=120)
        assert process.returncode == 7, log
        assert "the volume does not hold what was written to it" in log
        assert not elsewhere(pod.version_folder(), here, there).exists()


LOSES_WHAT_WAS_MADE = """
import os, time
real = os.fsync
def fsync(fd):
    real(fd)
    path = os.readlink(f"/proc/self/fd/{fd}")
    here, there = os.environ["LOSES"].split(":")
    if path.startswith(here) and path.endswith(("config.json.new", ".partial")):
        other = path.replace(here, there)
        while not os.path.exists(other):
            time.sleep(0.05)
        with open(other, "r+b") as file:
            file.write(bytes(8))
            real(file.fileno())
        time.sleep(1)  # until the other mount knows
os.fsync = fsync
"""
WRITES = """
import sys, numpy
from pathlib import Path
from model_fetch import tensors
try:
    tensors.write(Path(sys.argv[1]), {"a": (4, 4)}, iter([numpy.ones((4, 4), "<f2")]))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("made", ["a repaired file", "converted weights"])
def test_what_preparation_made_is_read_back_too(
    seaweedfs: Distributed, tmp_path: Path, made: str
) -> None:
    """As above, with what is not fetched: its bytes are compared before it gets its name."""
    (tmp_path / "sitecustomize.py").write_text(LOSES_WHAT_WAS_MADE)
    pooling = json.dumps({"embedding_dimension": 384, "pooling_mode": "mean"}).encode()
    model = PinnedModel(
        embedding_model() | {"1_Pooling/config.json": pooling}, "mlflow-artifacts:/model"
    )
    with mounts(seaweedfs, 2) as (here, there), serve(model.files) as store:
        pod = Pod(tmp_path / "pod", cache=fresh(here, "made"))
        lossy = {"PYTHONPATH": f"{PACKAGE}:{tmp_path}", "LOSES": f"{here}:{there}"}
        if made == "a repaired file":
            lost = pod.run(model, store.url, env=lossy, timeout=120)
            assert lost.code == 7, lost.log
            said = lost.last
            assert not pod.version_folder().exists()
            run = pod.run(model, store.url, timeout=120)
            assert run.code == 0, run.log
            assert "prepared for TEI" in run.log
        else:
            pytest.importorskip("numpy", reason="the conversion needs numpy")
            path = pod.cache / "model.safetensors"
            written = [
                subprocess.run(
                    [sys.executable, "-c", WRITES, str(path)],
                    env=pod.environment(None, environment),
                    capture_output=True,
                    text=True,
                )
                for environment in (lossy, {})
            ]
            said = written[0].stderr
            assert written[0].returncode == 1, said
            assert written[1].returncode == 0, written[1].stderr
            assert elsewhere(path, here, there).read_bytes()[-2:] == b"\0\x3c"
        assert "the volume does not hold what was written to it" in said


def test_two_machines_fetch_once(
    shared: Distributed, mirrored: PinnedModel, tmp_path: Path
) -> None:
    """Where `flock` is each mount's own, and a record that is overwritten is not seen elsewhere."""
    total = sum(map(len, mirrored.files.values()))
    with mounts(shared, 3) as (one, two, three), serve(mirrored.files, rate=3e5) as store:
        cache = fresh(one, "two")
        places = [cache, elsewhere(cache, one, two)]
        group = [Pod(tmp_path / f"pod-{n}", cache=place) for n, place in enumerate(places)]
        lease = ("--lease", "10")
        processes = [pod.start(mirrored, store.url, *lease) for pod in group]
        logs = [process.communicate(timeout=120)[0] for process in processes]
        for pod, process, log in zip(group, processes, logs, strict=True):
            assert_ready(Run(process.returncode, log), pod, mirrored)
        assert store.sent == total, logs
        assert sum("fetched by another process" in log for log in logs) == 1, logs
        assert holds(elsewhere(cache, one, three), mirrored)


def test_a_machine_that_dies_is_taken_over(
    shared: Distributed, mirrored: PinnedModel, tmp_path: Path
) -> None:
    total = sum(map(len, mirrored.files.values()))
    with mounts(shared, 3) as (one, two, three), serve(mirrored.files, rate=3e5) as store:
        cache = fresh(one, "dies")
        first = Pod(tmp_path / "first", cache=cache)
        second = Pod(tmp_path / "second", cache=elsewhere(cache, one, two))
        holder = first.start(mirrored, store.url)
        while store.sent < total // 3:
            time.sleep(0.01)
        waiting = second.start(mirrored, store.url, "--lease", "4")
        time.sleep(1)
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
        store.rate = None
        log, _ = waiting.communicate(timeout=120)
        assert_ready(Run(waiting.returncode, log), second, mirrored)
        assert "waiting for" in log
        assert "taking over from" in log
        assert holds(elsewhere(cache, one, three), mirrored)


def test_who_loses_its_staging_folder_waits_like_everybody(
    seaweedfs: Distributed, mirrored: PinnedModel, tmp_path: Path
) -> None:
    """Stopped for longer than the lease, it wakes up when another one has moved its folder.

    Not on JuiceFS: there its `flock` is seen by every mount, so it is waited for.
    """
    total = sum(map(len, mirrored.files.values()))
    with mounts(seaweedfs, 3) as (one, two, three), serve(mirrored.files, rate=3e5) as store:
        cache = fresh(one, "wakes")
        first = Pod(tmp_path / "first", cache=cache)
        second = Pod(tmp_path / "second", cache=elsewhere(cache, one, two))
        holder = first.start(mirrored, store.url)
        while store.sent < total // 4:
            time.sleep(0.01)
        holder.send_signal(signal.SIGSTOP)
        store.rate = None
        run = second.run(mirrored, store.url, "--lease", "2", timeout=120)
        assert_ready(run, second, mirrored)
        holder.send_signal(signal.SIGCONT)
        log, _ = holder.communicate(timeout=120)
        assert_ready(Run(holder.returncode, log), first, mirrored)
        assert holds(elsewhere(cache, one, three), mirrored)


@pytest.mark.parametrize("user", [None, POD], ids=["root", "pod"])
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_nothing_is_ever_written_to_the_mounted_store(
    shared: Distributed, model: PinnedModel, user: int | None, read_only: bool
) -> None:
    """A start with the mount leaves links in the cache; the next one has no mount, and fetches."""
    broken = {**model.files, "modules.json": b"[["}  # of the same size: noticed after linking
    with ExitStack() as stack:
        here, there = (stack.enter_context(shared.mount()) for _ in range(2))
        folder = fresh(there, "links")
        write(broken, folder / "store" / "model")
        if user is not None:  # whatever the store's permissions would keep apart
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user, user)
        root = elsewhere(folder, there, here) / "store"
        if read_only:
            bind(root, stack)
        before = state(folder / "store")
        pod = Pod(shared.folder / f"pod-{time.monotonic_ns()}", user=user)
        if user is not None:
            os.chown(pod.folder, user, user)
        assert pod.run(model, None, "--mount", str(root)).code == 9
        links = [path for path in pod.cache.rglob("*") if path.is_symlink()]
        assert len(links) == len(model.files), "the first start left its links"
        plant(pod.cache / "acme-tiny", root / "model")
        with serve(model.files) as store:
            run = pod.run(model, store.url, timeout=120)
        assert_ready(run, pod, model)
        assert state(folder / "store") == before
        assert not any(path.is_symlink() for path in pod.version_folder().rglob("*"))


def plant(parent: Path, model: Path) -> None:
    """Beside the links that were left: the lock, a claim, and journals that lead into the store."""
    staging = next(parent.glob(".3.staging-*"))
    for path in (
        parent / ".3.lock",
        parent / ".3.claim-1",
        parent / ".3.mounted",
        staging / "files" / "modules.json.new",
        *(staging / "journals" / f"{n:016x}" for n in range(2)),
    ):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(model / "config.json")


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, size and time of change of every file below, seen from this mount."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def bind(folder: Path, stack: ExitStack) -> None:
    """Mounts a folder over itself, read-only."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def test_a_mount_whose_program_has_died_is_said_and_the_next_source_is_tried(
    juicefs: Distributed, mirrored: PinnedModel, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        here = stack.enter_context(juicefs.mount())
        write(mirrored.files, here / "stale" / "model")
        pod = Pod(tmp_path / "pod")
        assert pod.run(mirrored, None, "--mount", str(here / "stale")).code == 0
        juicefs.services[-1].end(signal.SIGKILL)
        run = pod.run(mirrored, None, "--mount", str(here / "stale"))
        assert run.code == 5, run.log
        assert "restart" in run.last
        cached = Pod(tmp_path / "cached", cache=here / "cache")
        with serve(mirrored.files) as store:
            run = cached.run(mirrored, store.url)
            assert run.code == 5, run.log
            assert "restart" in run.last
            assert_ready(
                pod.run(mirrored, store.url, "--mount", str(here / "stale")), pod, mirrored
            )


def test_a_store_that_this_user_may_not_read_is_said_and_the_next_source_is_tried(
    seaweedfs: Distributed, mirrored: PinnedModel
) -> None:
    """As SeaweedFS' S3 leaves its objects: 0660, of root."""
    with seaweedfs.mount() as here:
        root = fresh(here, "private")
        write(mirrored.files, root / "model")
        for path in root.rglob("*"):
            path.chmod(0o771 if path.is_dir() else 0o660)
        pod = Pod(seaweedfs.folder / f"pod-{time.monotonic_ns()}", user=POD)
        os.chown(pod.folder, POD, POD)
        run = pod.run(mirrored, None, "--mount", str(root))
        assert run.code == 2, run.log
        assert f"cannot be read by uid {POD}" in run.last
        with serve(mirrored.files) as store:
            run = pod.run(mirrored, store.url, "--mount", str(root))
        assert_ready(run, pod, mirrored)
        assert f"cannot be read by uid {POD}" in run.log
