"""What a person or a pod says to the program, and what it says back."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fetchkit.models import PinnedModel, write
from fetchkit.program import PACKAGE, Pod, assert_failed, assert_ready
from fetchkit.store import serve
from model_fetch import failures
from model_fetch.cli import _parser


def test_help_names_every_option_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parser({}).parse_args(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--pin", "--cache", "--link", "--mount", "--connections", "--verify", "--keep"):
        assert option in text
    codes = {code for _, code in failures.EXIT_CODES} | {failures.INTERNAL, failures.INTERRUPTED}
    assert all(re.search(rf"\b{code}\b", text) for code in codes)


def test_options_come_from_the_environment_too(pod: Pod, model: PinnedModel) -> None:
    assert _parser({"MODEL_FETCH_CHUNK_SIZE": "2"}).parse_args([]).chunk_size == 2
    assert (
        _parser({"MODEL_FETCH_CHUNK_SIZE": "2"}).parse_args(["--chunk-size", "3"]).chunk_size == 3
    )
    assert _parser({"MODEL_FETCH_NO_SYNC": "true"}).parse_args([]).no_sync
    assert _parser({"MODEL_FETCH_MOUNT": ""}).parse_args([]).mount is None
    run = pod.run(model, "http://127.0.0.1:9", env={"MODEL_FETCH_ATTEMPTS": "many"})
    assert run.code == 2
    assert "MODEL_FETCH_ATTEMPTS" in run.last


@pytest.mark.parametrize(
    "options",
    [
        ("--connections", "0"),
        ("--chunk-size", "x"),
        ("--log-format", "xml"),
        ("--nonsense",),
        ("extra",),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line(pod: Pod, model: PinnedModel, options: tuple[str, ...]) -> None:
    run = pod.run(model, None, *options)
    assert run.code == 2
    assert run.log.count("\n") == 1
    assert "--help" in run.last


def changed(**more: Any):
    return lambda pin: pin.update(more)


def in_file(**more: Any):
    return lambda pin: pin["files"][0].update(more)


BAD_PINS = {
    "a file above the folder": in_file(path="../model.safetensors"),
    "a file deep above the folder": in_file(path="1_Pooling/../../x"),
    "a source above the artifact": in_file(**{"from": "../../secret"}),
    "an absolute file": in_file(path="/etc/passwd"),
    "an absolute source": in_file(**{"from": "/etc/passwd"}),
    "a backslash": in_file(path="..\\x"),
    "a control character": in_file(path="a\nb"),
    "an empty path": in_file(path=""),
    "a folder": in_file(path="1_Pooling/"),
    "a negative size": in_file(size=-1),
    "a size that is none": in_file(size="big"),
    "a digest that is none": in_file(sha256="xyz"),
    "a name above the cache": changed(registered_model="../../etc"),
    "a name with a slash": changed(registered_model="a/b"),
    "a version that is none": changed(version="../1"),
    "an address that was not resolved": changed(artifact_uri="runs:/x/model"),
    "no files": changed(files=[]),
    "files that are none": changed(files="all"),
    "no address": changed(artifact_uri=None),
    "twice the same path": lambda pin: pin["files"].append(pin["files"][0]),
}


@pytest.mark.parametrize("bad", BAD_PINS)
def test_a_pin_that_is_none_is_refused_and_nothing_is_touched(
    pod: Pod, model: PinnedModel, bad: str
) -> None:
    pin = model.pin()
    BAD_PINS[bad](pin)
    with serve(model.files) as store:
        run = pod.run(pin, store.url)
    assert_failed(run, pod, 2)
    assert run.log.count("\n") == 1
    assert not pod.cache.exists()
    assert store.requests == []


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"pin"', "{}", "\x00", "[" * 100_000])
def test_a_file_that_is_no_pin_is_refused(pod: Pod, model: PinnedModel, content: str) -> None:
    command = pod.command(model)
    pod.pin_file.write_text(content)
    done = subprocess.run(command, env=pod.environment(None), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1


def test_names_with_odd_characters_are_fetched_as_they_are(pod: Pod, model: PinnedModel) -> None:
    odd = {
        "a b%20c/ü?x=1&y#z+%.json": b"{}",
        "1_Pooling/ \u2028ok'\";$(x).txt".replace("\u2028", ""): b"1",
    }
    strange = replace(model, files={**model.files, **odd})
    with serve(strange.files) as store:
        assert_ready(pod.run(strange, store.url), pod, strange)


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_an_artifact_that_is_gone(pod: Pod, model: PinnedModel, gone: str) -> None:
    left = {path: content for path, content in model.files.items() if path != gone}
    with serve(left) as store:
        run = pod.run(model, store.url)
    assert_failed(run, pod, 3)
    assert gone in run.last


def test_an_empty_file_is_a_file(pod: Pod, model: PinnedModel) -> None:
    empty = replace(model, files={**model.files, "empty.txt": b""})
    with serve(empty.files) as store:
        assert_ready(pod.run(empty, store.url), pod, empty)


def test_a_log_of_json(pod: Pod, mirrored: PinnedModel) -> None:
    with serve(mirrored.files, rate=4e5) as store:
        run = pod.run(mirrored, store.url, "--log-format", "json", "--interval", "0.2")
    assert_ready(run, pod, mirrored)
    lines = [json.loads(line) for line in run.log.splitlines()]
    progress = [line for line in lines if "bytes_per_second" in line]
    total = sum(map(len, mirrored.files.values()))
    assert len(progress) >= 3
    assert all(line["total_bytes"] == total and line["bytes"] <= total for line in progress)
    assert [line["bytes"] for line in progress] == sorted(line["bytes"] for line in progress)
    assert lines[-1]["how"] == "fetched"
    assert lines[-1]["received"] == total
    assert all({"time", "level", "message"} <= line.keys() for line in lines)


def test_a_log_of_text_has_lines_and_a_terminal_has_a_bar(pod: Pod, mirrored: PinnedModel) -> None:
    with serve(mirrored.files, rate=4e5) as store:
        run = pod.run(mirrored, store.url, "--interval", "0.2")
        assert_ready(run, pod, mirrored)
        assert re.search(r"[\d,]+ of [\d,]+ MB \(\d+%\), [\d,]+ MB/s, .* left", run.log)
        assert "\r" not in run.log
        assert pod.termination.read_text() == run.last
        assert "is ready" in run.last

        other = Pod(pod.folder / "other")
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            other.command(mirrored), env=other.environment(store.url), stderr=theirs
        ) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    data = os.read(ours, 65536)
                except OSError:
                    break
                shown += data
        os.close(ours)
    assert process.returncode == 0, shown
    assert b"\r[###" in shown


def test_a_conversion_of_the_pin_makes_another_folder(pod: Pod, model: PinnedModel) -> None:
    """What decides on the bytes is part of what makes a folder complete."""
    from model_fetch.cache import fingerprint
    from model_fetch.pin import Pin

    pin = model.pin()
    names = {fingerprint(Pin.from_mapping(pin))}
    for more in ({"run_id": "other"}, {"version": "4"}, {"artifact_uri": "mlflow-artifacts:/b"}):
        names.add(fingerprint(Pin.from_mapping({**pin, **more})))
    assert len(names) == 4
    assert fingerprint(Pin.from_mapping({**pin, "selector": "@champion"})) in names


def test_the_marker_holds_the_pin_and_the_digests(pod: Pod, mirrored: PinnedModel) -> None:
    with serve(mirrored.files) as store:
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
    marker = json.loads((pod.version_folder() / ".model-fetch.json").read_text())
    pinned = {file["path"]: file for file in mirrored.pin()["files"]}
    assert marker["pin"]["version"] == "3"
    for file in marker["files"]:
        assert file["size"] == pinned[file["path"]]["size"]
        assert re.fullmatch("[0-9a-f]{64}", file["sha256"])
        if "sha256" in pinned[file["path"]]:
            assert file["sha256"] == pinned[file["path"]]["sha256"]


def test_a_digest_that_is_pinned_later_is_compared_with_what_was_fetched(
    pod: Pod, model: PinnedModel, mirrored: PinnedModel
) -> None:
    """`make pin-digests` of a rendered repository: nothing is fetched again, unless it is another."""
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url), pod, model)
    marker = json.loads((pod.version_folder() / ".model-fetch.json").read_text())
    right = {path: hashlib.sha256(content).hexdigest() for path, content in model.files.items()}
    assert marker["fetched"] == right

    pin = model.pin()
    for file in pin["files"]:
        file["sha256"] = right[file["path"]]
    there = pod.run(pin, None)
    assert there.code == 0, there.log
    assert "already there" in there.log

    pin["files"][0]["sha256"] = "0" * 64
    with serve(model.files) as store:
        wrong = pod.run(pin, store.url, "--attempts", "1")
    assert wrong.code == 7, wrong.log
    assert "its marker has another model.safetensors than the pin" in wrong.log


def test_digests_only_where_pinned(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files) as store:
        assert_ready(pod.run(model, store.url, "--digests", "pinned"), pod, model)
    marker = json.loads((pod.version_folder() / ".model-fetch.json").read_text())
    assert {file["sha256"] for file in marker["files"]} == {None}


class TestMounted:
    """The artifact store is a folder: nothing is copied."""

    @pytest.fixture
    def mount(self, tmp_path: Path, model: PinnedModel) -> Path:
        write(model.files, tmp_path / "mount" / "artifacts/1/run/artifacts/model")
        return tmp_path / "mount"

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://mlflow/artifacts/1/run/artifacts/model",
            "mlflow-artifacts:/artifacts/1/run/artifacts/model",
            "mlflow-artifacts:/1/run/artifacts/model",
        ],
    )
    def test_it_is_used_in_place(self, pod: Pod, model: PinnedModel, mount: Path, uri: str) -> None:
        run = pod.run(replace(model, artifact_uri=uri), None, "--mount", str(mount))
        assert_ready(run, pod, model)
        assert pod.link.resolve() == mount / "artifacts/1/run/artifacts/model"
        assert not pod.version_folder().exists()
        assert "used in place" in run.last

    def test_no_cache_is_needed(self, pod: Pod, model: PinnedModel, mount: Path) -> None:
        uri = "s3://mlflow/artifacts/1/run/artifacts/model"
        run = pod.run(replace(model, artifact_uri=uri), None, "--mount", str(mount), "--cache", "")
        assert_ready(run, pod, model)
        assert not pod.cache.exists()

    def test_a_file_uri_is_a_mount(self, pod: Pod, model: PinnedModel, mount: Path) -> None:
        uri = f"file://{mount}/artifacts/1/run/artifacts/model"
        assert_ready(pod.run(replace(model, artifact_uri=uri), None), pod, model)

    def test_files_in_several_folders_are_put_together(
        self, pod: Pod, model: PinnedModel, mount: Path
    ) -> None:
        """MLflow's layout of a logged pipeline: weights in one folder, tokenizer in another."""
        root = mount / "artifacts/1/run/artifacts/model"
        (root / "components/tokenizer").mkdir(parents=True)
        (root / "tokenizer.json").rename(root / "components/tokenizer/tokenizer.json")
        pin = replace(model, artifact_uri="s3://mlflow/artifacts/1/run/artifacts/model").pin()
        for file in pin["files"]:
            if file["path"] == "tokenizer.json":
                file["from"] = "components/tokenizer/tokenizer.json"
        run = pod.run(pin, None, "--mount", str(mount))
        assert_ready(run, pod, model)
        assert (pod.link / "model.safetensors").is_symlink()
        again = pod.run(pin, None, "--mount", str(mount))
        assert "already there" in again.last

    def test_other_bytes_than_pinned_are_fetched_from_elsewhere(
        self, pod: Pod, mirrored: PinnedModel, tmp_path: Path
    ) -> None:
        """Without another source it ends with 7, and nothing is linked."""
        weights = write(mirrored.files, tmp_path / "mount/model") / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        mount = ("--mount", str(tmp_path / "mount"))
        assert_failed(pod.run(mirrored, None, *mount), pod, 7)
        with serve(mirrored.files) as store:
            run = pod.run(mirrored, store.url, *mount)
            assert_ready(run, pod, mirrored)
            assert "SHA-256 is" in run.log
            assert "trying the next source" in run.log
            received = store.sent
            again = pod.run(mirrored, store.url, *mount)
            assert "already there" in again.last
            assert store.sent == received

    @pytest.mark.parametrize("damage", ["gone", "short", "torn"])
    def test_a_file_that_is_not_as_pinned(
        self, pod: Pod, model: PinnedModel, mount: Path, damage: str
    ) -> None:
        uri = f"file://{mount}/artifacts/1/run/artifacts/model"
        weights = mount / "artifacts/1/run/artifacts/model/model.safetensors"
        content = bytearray(weights.read_bytes())
        if damage == "gone":
            weights.unlink()
        elif damage == "short":
            weights.write_bytes(content[:-1])
        else:
            content[0] ^= 0xFF
            weights.write_bytes(content)
        run = pod.run(replace(model, artifact_uri=uri), None)
        assert_failed(run, pod, 3 if damage == "gone" else 7)

    def test_a_symbolic_link_out_of_the_store_is_refused(
        self, pod: Pod, model: PinnedModel, mount: Path, tmp_path: Path
    ) -> None:
        weights = mount / "artifacts/1/run/artifacts/model/model.safetensors"
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
        uri = "s3://mlflow/artifacts/1/run/artifacts/model"
        run = pod.run(replace(model, artifact_uri=uri), None, "--mount", str(mount))
        assert_failed(run, pod, 2)
        assert "leads out" in run.last

    def test_a_mount_without_the_model_is_passed_over(
        self, pod: Pod, model: PinnedModel, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        with serve(model.files) as store:
            run = pod.run(model, store.url, "--mount", str(tmp_path / "empty"))
        assert_ready(run, pod, model)
        assert "not used: there is no folder" in run.log


def test_it_can_be_run_as_a_module_and_says_its_version() -> None:
    import sys

    command = [sys.executable, "-m", "model_fetch", "--version"]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True)
    assert done.stdout.startswith("model-fetch ")
