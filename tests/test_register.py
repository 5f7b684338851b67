"""`make register`: what is registered so gives a pin with a digest of every file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from extensions import pin
from tests.conftest import variables
from tests.snapshots import REVISION, snapshot, write

ROOT = Path(__file__).parent.parent


def register(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "demo/register.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("sidecars", [False, True])
def test_a_registered_folder_is_pinned_with_every_digest(
    mlflow_proxied: str, tmp_path: Path, sidecars: bool
) -> None:
    folder = snapshot(tmp_path / "model", sidecars=sidecars)
    name = f"acme/registered-{sidecars}".lower()

    done = register("--model", name, "--folder", str(folder), MLFLOW_TRACKING_URI=mlflow_proxied)

    assert done.returncode == 0, done.stderr
    assert f"registered {name.replace('/', '-')} version 1" in done.stdout
    with variables({"MLFLOW_TRACKING_URI": mlflow_proxied}):
        found = pin.resolve(name, "latest")
    assert found.revision == (REVISION if sidecars else None)
    assert all(file.sha256 or file.blob_sha1 for file in found.files)
    weights = next(f for f in found.files if f.path == "model.safetensors")
    assert weights.sha256 == hashlib.sha256((folder / weights.path).read_bytes()).hexdigest()


def test_a_file_that_changed_after_its_download_gets_its_own_digest(
    mlflow_proxied: str, tmp_path: Path
) -> None:
    folder = snapshot(tmp_path / "model", sidecars=True)
    changed = folder / "config_sentence_transformers.json"
    write(changed, '{"prompts": {"query": "changed: "}}')
    later = changed.stat().st_mtime + 60
    os.utime(changed, (later, later))

    done = register(
        "--model", "acme/changed", "--folder", str(folder), MLFLOW_TRACKING_URI=mlflow_proxied
    )

    assert done.returncode == 0, done.stderr
    with variables({"MLFLOW_TRACKING_URI": mlflow_proxied}):
        found = pin.resolve("acme/changed", "latest")
    file = next(f for f in found.files if f.path == changed.name)
    assert file.sha256 == hashlib.sha256(changed.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("path", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json"),
        ("config.json", {"model_type": "t5"}, "TEI has no implementation of t5"),
        ("config.json", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, "pools by mean and cls"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_uploaded(
    tmp_path: Path, path: str, content: dict[str, object] | None, says: str
) -> None:
    folder = snapshot(tmp_path / "model")
    file = folder / path
    if content is None:
        file.unlink()
    else:
        write(file, json.dumps(json.loads(file.read_text()) | content))
    # Nobody listens there: it is refused before that is noticed.
    done = register(
        "--model", "acme/bad", "--folder", str(folder), MLFLOW_TRACKING_URI="http://127.0.0.1:9"
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ([], {}, "set MLFLOW_TRACKING_URI"),
        (["--folder", "/nowhere"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "is no folder"),
    ],
)
def test_what_is_missing_is_one_line(
    arguments: list[str], environment: dict[str, str], says: str
) -> None:
    done = register("--model", "acme/model", *arguments, **environment)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.reference
def test_a_reference_for_parity_is_made_of_the_same_folder(
    mlflow_proxied: str, tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    from tests.contract import tiny

    saved = tiny.saved_today("bert", tmp_path / "first", tmp_path / "saved", "mean")
    reference = tmp_path / "reference.json"
    arguments = ("--model", "acme/parity", "--folder", str(saved), "--parity", str(reference))
    done = register(*arguments, MLFLOW_TRACKING_URI=mlflow_proxied)
    assert done.returncode == 0, done.stderr
    said = json.loads(reference.read_text())
    weights = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert said["files"]["model.safetensors"] == weights
    assert len(said["groups"]) == 5

    (saved / "modules.json").unlink()
    none = tmp_path / "none.json"
    done = register(*arguments[:-1], str(none), MLFLOW_TRACKING_URI=mlflow_proxied)
    assert done.returncode == 1
    assert "does not say how it pools" in done.stderr
    assert "registered" not in done.stdout
    assert not none.exists()
