"""A volume that others write to: whatever they leave is not followed, not believed, not published."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fetchkit.models import PinnedModel
from fetchkit.program import Pod, assert_failed, assert_ready
from fetchkit.store import serve
from model_fetch.cache import fingerprint
from model_fetch.pin import Pin

VICTIM = b"PRECIOUS" * 1000
CONFIG = "files/config.json"


def parent_of(pod: Pod) -> Path:
    parent = pod.cache / "acme-tiny"
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def staging_of(pod: Pod, model: PinnedModel) -> Path:
    """What an earlier run of this program could have left."""
    staging = parent_of(pod) / ".3.staging-aaaa"
    (staging / "files" / "1_Pooling").mkdir(parents=True)
    (staging / "journals").mkdir()
    (staging / "pin").write_text(fingerprint(Pin.from_mapping(model.pin())))
    return staging


def nested(path: Path) -> None:
    """More folders in each other than Python's own removal can take."""
    for _ in range(60):
        path = path / ("d" * 20)
    path.mkdir(parents=True)


@pytest.fixture
def victim(pod: Pod) -> Path:
    folder = pod.folder / "outside"
    folder.mkdir()
    (folder / "victim").write_bytes(VICTIM)
    return folder / "victim"


def journal_name(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:16]


IN_STAGING: dict[str, Callable[[Path, Path], object]] = {
    "a file is a link": lambda s, v: (s / CONFIG).symlink_to(v),
    "a file is a second name": lambda s, v: (s / CONFIG).hardlink_to(v),
    "a file is a pipe": lambda s, v: os.mkfifo(s / CONFIG),
    "a file is a folder": lambda s, v: (s / CONFIG / "x").mkdir(parents=True),
    "a file is a link to itself": lambda s, v: (s / CONFIG).symlink_to("config.json"),
    "a file is another user's": lambda s, v: other_user(s / CONFIG),
    "a file of the same size is a link": lambda s, v: sized_link(s, v),
    "files is a link": lambda s, v: relink(s / "files", v.parent),
    "files is a file": lambda s, v: (shutil.rmtree(s / "files"), (s / "files").write_text("x")),
    "a folder is a link": lambda s, v: relink(s / "files/1_Pooling", v.parent),
    "the journals are a link": lambda s, v: relink(s / "journals", v.parent),
    "a journal is a link": lambda s, v: (s / "journals" / journal_name("config.json")).symlink_to(
        v
    ),
    "a journal to be is a link": lambda s, v: (
        s / "journals" / f"{journal_name('config.json')}.new"
    ).symlink_to(v),
    "a journal is a pipe": lambda s, v: os.mkfifo(s / "journals" / journal_name("config.json")),
    "the pin is a link": lambda s, v: ((s / "pin").unlink(), (s / "pin").symlink_to(v)),
    "the pin is a pipe": lambda s, v: ((s / "pin").unlink(), os.mkfifo(s / "pin")),
    "files that no pin names": lambda s, v: (
        (s / "files/sentence_bert_config.json").write_text('{"max_seq_length": 2}'),
        (s / "files/pytorch_model.bin").write_text("x"),
        (s / "files/1_Pooling/extra").write_text("x"),
        (s / "files/2_Dense").mkdir(),
    ),
    "a prepared file to be is a link": lambda s, v: (s / "files/config.json.new").symlink_to(v),
    "the marker to be is a link": lambda s, v: (s / "files/.model-fetch.json").symlink_to(v),
    "folders without end": lambda s, v: nested(s / "files/deep"),
    "the staging folder is a link": lambda s, v: relink(s, v.parent),
}


def relink(path: Path, target: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(target)


def other_user(path: Path) -> None:
    path.write_bytes(b"x")
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(path, 12345, 12345)


def sized_link(staging: Path, victim: Path) -> None:
    """As large as the pinned file, with a journal that says that it has begun."""
    target = staging / "files/model.safetensors"
    target.symlink_to(victim)


@pytest.mark.parametrize("what", IN_STAGING)
def test_a_planted_staging_folder(pod: Pod, model: PinnedModel, victim: Path, what: str) -> None:
    IN_STAGING[what](staging_of(pod, model), victim)
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url, timeout=30), pod, model)
    assert victim.read_bytes() == VICTIM
    assert os.listdir(victim.parent) == ["victim"]
    found = [path for path in pod.version_folder().rglob("*") if path.name != ".model-fetch.json"]
    names = {path.relative_to(pod.version_folder()).as_posix() for path in found}
    assert names == {*model.files, "1_Pooling"}
    assert not any(path.is_symlink() for path in [pod.version_folder(), *found])


@pytest.mark.parametrize("name", [".3.lock", ".3.claim-1", ".3.claim-999999999", ".3.mounted", "3"])
@pytest.mark.parametrize("kind", ["link", "folder link", "pipe", "large", "folder", "second name"])
def test_a_planted_name_beside_the_version(
    pod: Pod, model: PinnedModel, victim: Path, name: str, kind: str
) -> None:
    path = parent_of(pod) / name
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "folder link":
        path.symlink_to(victim.parent)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        (path / "beat").mkdir(parents=True)
    elif kind == "second name":
        path.hardlink_to(victim)
    else:
        path.touch()
        os.truncate(path, 2 << 30)
    with serve(model.files) as store:
        run = pod.run(model, store.url, "--lease", "1", "--lock-timeout", "20", timeout=40)
    assert_ready(run, pod, model)
    assert victim.read_bytes() == VICTIM
    assert os.listdir(victim.parent) == ["victim"]
    assert not list(parent_of(pod).glob(".3.claim-*"))
    assert pod.version_folder().is_dir()
    assert not pod.version_folder().is_symlink()


def test_a_link_in_the_place_of_the_model_s_folder_is_refused(
    pod: Pod, model: PinnedModel, victim: Path
) -> None:
    pod.cache.mkdir()
    (pod.cache / "acme-tiny").symlink_to(victim.parent)
    with serve(model.files) as store:
        assert_failed(pod.run(model, store.url), pod, 2)
    assert os.listdir(victim.parent) == ["victim"]


@pytest.mark.parametrize(
    "record",
    [
        b'{"token":"x","boot":"b","beat":1,"bytes":"x"}',
        b'{"token":"x","boot":"b","beat":1,"bytes":1' + b"0" * 400 + b"}",
        b'{"token":7,"boot":"b","beat":1,"bytes":1}',
        b'{"token":"\\u001b[2Jx","boot":"b","beat":1,"bytes":1}',
        b"[" * 500,
        b"\xff\xfe",
        b"",
    ],
)
@pytest.mark.parametrize("where", [".3.lock", ".3.claim-1/beat"])
def test_a_record_that_no_holder_wrote(
    pod: Pod, model: PinnedModel, record: bytes, where: str
) -> None:
    path = parent_of(pod) / where
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(record)
    lock = parent_of(pod) / ".3.lock"
    lock.touch()
    with lock.open() as held, serve(model.files) as store:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = pod.run(model, store.url, "--lock-timeout", "1")
        assert_failed(run, pod, 8)
        assert "\x1b" not in run.log
        fcntl.flock(held, fcntl.LOCK_UN)
        assert_ready(pod.run(model, store.url, "--lease", "1"), pod, model)


def marker_of(pod: Pod) -> Path:
    return pod.version_folder() / ".model-fetch.json"


def edited(pod: Pod, edit: Callable[[dict], object]) -> None:
    """A marker that says something else, about files that are as it says."""
    value = json.loads(marker_of(pod).read_text())
    edit(value)
    marker_of(pod).write_text(json.dumps(value))


def replaced(pod: Pod, path: str, more: Callable[[dict], object] = lambda value: None) -> None:
    """Another file of the same size, and a marker that agrees with it."""
    target = pod.version_folder() / path
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)

    def agree(value: dict) -> None:
        for file in value["files"]:
            if file["path"] == path:
                file["sha256"] = hashlib.sha256(content).hexdigest()
                file["mtime_ns"] = target.stat().st_mtime_ns
                value["fetched"][path] = file["sha256"]
        more(value)

    edited(pod, agree)


def emptied(pod: Pod) -> None:
    edited(pod, lambda value: value.update(files=[]))
    for path in pod.version_folder().rglob("*"):
        if path.is_file() and path != marker_of(pod):
            path.unlink()


def first(value: dict) -> dict:
    return value["files"][0]


MARKERS: dict[str, Callable[[Pod], object]] = {
    "no file, and none there": emptied,
    "all but the weights": lambda pod: (
        edited(
            pod, lambda v: v.update(files=[f for f in v["files"] if "model.s" not in f["path"]])
        ),
        (pod.version_folder() / "model.safetensors").unlink(),
    ),
    "another file more": lambda pod: (
        (pod.version_folder() / "pytorch_model.bin").write_bytes(b""),
        edited(pod, lambda v: v["files"].append({**first(v), "path": "pytorch_model.bin"})),
    ),
    "a size that is a text": lambda pod: edited(pod, lambda v: first(v).update(size="x")),
    "a size that is true": lambda pod: edited(pod, lambda v: first(v).update(size=True)),
    "a path that is a list": lambda pod: edited(pod, lambda v: first(v).update(path=["a"])),
    "a field more": lambda pod: edited(pod, lambda v: first(v).update(extra=1)),
    "files twice": lambda pod: edited(pod, lambda v: v["files"].append(first(v))),
    "prepared is a number": lambda pod: edited(pod, lambda v: v.update(prepared=5)),
    "the pin is a list": lambda pod: edited(pod, lambda v: v.update(pin=[])),
    "deep": lambda pod: marker_of(pod).write_text("[" * 100_000),
    "not UTF-8": lambda pod: marker_of(pod).write_bytes(b"\xff\xfe{}"),
    "a pipe": lambda pod: (marker_of(pod).unlink(), os.mkfifo(marker_of(pod))),
    "a folder": lambda pod: (marker_of(pod).unlink(), marker_of(pod).mkdir()),
    "a link to itself beside it": lambda pod: (pod.version_folder() / "loop").symlink_to("loop"),
    "a pipe beside it": lambda pod: os.mkfifo(pod.version_folder() / "pipe"),
    "an empty folder beside it": lambda pod: (pod.version_folder() / "onnx").mkdir(),
    "folders without end beside it": lambda pod: nested(pod.version_folder() / "deep"),
    "a file that became a link": lambda pod: (
        shutil.move(pod.version_folder() / "config.json", pod.folder / "config.json"),
        (pod.version_folder() / "config.json").symlink_to(pod.folder / "config.json"),
    ),
    "other weights than pinned": lambda pod: replaced(pod, "model.safetensors"),
    "other weights, said to be prepared": lambda pod: replaced(
        pod, "model.safetensors", lambda value: value.update(prepared=["repaired"])
    ),
}


@pytest.mark.parametrize("what", MARKERS)
def test_a_planted_marker_is_none(pod: Pod, mirrored: PinnedModel, what: str) -> None:
    with serve(mirrored.files) as store:
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
        MARKERS[what](pod)
        verified = pod.run(mirrored, None, "--verify", timeout=20)
        assert verified.code in (3, 7), verified.log
        assert_ready(pod.run(mirrored, store.url, timeout=30), pod, mirrored)


def test_verify_compares_with_the_pin_not_with_the_marker(pod: Pod, mirrored: PinnedModel) -> None:
    """Small files are pinned by Git's digest, which a marker does not hold."""
    with serve(mirrored.files) as store:
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
    replaced(pod, "tokenizer.json")
    run = pod.run(mirrored, None, "--verify")
    assert run.code == 7, run.log
    assert "Git blob SHA-1" in run.last


def test_verify_after_the_weights_were_deleted(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    (pod.version_folder() / "model.safetensors").unlink()
    run = pod.run(model, None, "--verify")
    assert run.code == 7, run.log


def test_another_model_s_marker_does_not_stand_in_for_a_registry(
    pod: Pod, model: PinnedModel
) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    edited(pod, lambda value: value["pin"].update(registered_model="other"))
    unpinned = {**model.pin(), "version": None, "selector": "3", "files": [], "artifact_uri": None}
    pod.link.unlink()
    run = pod.run(unpinned, "http://127.0.0.1:9")
    assert run.code == 5, run.log


@pytest.mark.parametrize("size", [10**13, 10**15, 2**53])
def test_a_file_that_fits_nowhere_costs_nothing(pod: Pod, model: PinnedModel, size: int) -> None:
    pin = model.pin()
    pin["files"][0]["size"] = size
    with serve(model.files) as store:
        run = pod.run(pin, store.url, "--chunk-size", "0.015625", timeout=20)
        assert_failed(run, pod, 6)
        assert store.sent == 0


class TestMounted:
    """What is mounted is compared with the pin, too."""

    @pytest.fixture
    def root(self, pod: Pod, mirrored: PinnedModel) -> Path:
        root = pod.folder / "store"
        for path, content in mirrored.files.items():
            (root / "model" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "model" / path).write_bytes(content)
        return root

    @staticmethod
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    @pytest.mark.parametrize("path", ["model.safetensors", "tokenizer.json"])
    def test_other_bytes_than_pinned(
        self, pod: Pod, mirrored: PinnedModel, root: Path, path: str
    ) -> None:
        self.flip(root / "model" / path)
        for options in ((), ("--verify",), ("--cache", "")):
            run = pod.run(mirrored, None, "--mount", str(root), *options)
            assert run.code == 7, run.log
            assert path in run.last

    def test_they_are_read_once(self, pod: Pod, mirrored: PinnedModel, root: Path) -> None:
        reading = "to compare its digest"
        first = pod.run(mirrored, None, "--mount", str(root))
        assert_ready(first, pod, mirrored)
        assert first.log.count(reading) == len(mirrored.files)
        second = pod.run(mirrored, None, "--mount", str(root))
        assert_ready(second, pod, mirrored)
        assert reading not in second.log
        self.flip(root / "model" / "model.safetensors")
        assert pod.run(mirrored, None, "--mount", str(root)).code == 7

    def test_verify(self, pod: Pod, mirrored: PinnedModel, root: Path) -> None:
        run = pod.run(mirrored, None, "--mount", str(root), "--verify")
        assert run.code == 0, run.log
        assert "5 files, 5 compared with their digest" in run.last
        (root / "model" / "config.json").unlink()
        assert pod.run(mirrored, None, "--mount", str(root), "--verify").code == 3

    def test_without_a_digest_the_structure_is_checked(
        self, pod: Pod, model: PinnedModel, root: Path
    ) -> None:
        run = pod.run(model, None, "--mount", str(root), "--verify")
        assert run.code == 0, run.log
        assert "0 compared with their digest" in run.last
        weights = root / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:8][::-1] + weights.read_bytes()[8:])
        assert pod.run(model, None, "--mount", str(root), "--verify").code == 7

    def test_a_mount_that_is_not_there_and_no_tracking_address_are_both_said(
        self, pod: Pod, mirrored: PinnedModel
    ) -> None:
        run = pod.run(mirrored, None, "--mount", str(pod.folder / "nothing"))
        assert_failed(run, pod, 2)
        assert "MLFLOW_TRACKING_URI is missing" in run.last
        assert "there is no folder" in run.last
