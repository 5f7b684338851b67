"""`make pin-digests`: what was fetched once decides what every later start must find.

A real MLflow, Copier, make and model-fetch; no registry kept a digest of these weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from extensions.errors import ConfigurationError
from extensions.pin import Pin
from tests.conftest import ROOT, pinned
from tests.snapshots import register, snapshot
from tests.test_update_matrix import Repository, empty, new_release  # noqa: F401

WEIGHTS = "model.safetensors"


@pytest.fixture
def project(empty: Repository, mlflow_proxied: str, tmp_path: Path) -> Repository:  # noqa: F811
    """A repository whose pin has no digest of the weights."""
    name = f"acme-{tmp_path.name.replace('_', '-')}"
    register(mlflow_proxied, snapshot(tmp_path / "snapshot", sidecars=False), name)
    empty.variables["MLFLOW_TRACKING_URI"] = mlflow_proxied
    empty.copy(f"model_id={name}", "accelerator=cpu")
    return empty


def fetch(project: Repository, cache: Path) -> subprocess.CompletedProcess[str]:
    """A start of a pod with that cache."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "model_fetch", "--pin", project.folder / "k8s/base/pin.json"),
            *("--cache", cache, "--link", cache / "current", "--termination-log", "", "--no-sync"),
        ],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "template/images/model-fetch"),
            **project.variables,
        },
        capture_output=True,
        text=True,
    )


def pin_digests(project: Repository, folder: Path) -> subprocess.CompletedProcess[str]:
    copier = f"COPIER={sys.executable} -W ignore -m copier"
    return project.run("make", "--silent", "pin-digests", copier, f"FROM={folder}")


def overwrite(project: Repository, path: str, content: bytes) -> None:
    """Puts other bytes into the registry's store, as whoever may write there can."""
    place = project.pin["artifact_uri"].removeprefix("mlflow-artifacts:")
    url = f"{project.variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow-artifacts/artifacts{place}/{path}"
    urllib.request.urlopen(urllib.request.Request(url, content, method="PUT")).close()


def digests(project: Repository) -> dict[str, str | None]:
    return {file["path"]: file.get("sha256") for file in project.pin["files"]}


def test_weights_get_their_digest_after_the_first_fetch(
    project: Repository, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert digests(project)[WEIGHTS] is None
    said = project.updated("update-model")
    assert f"No digest is known of {WEIGHTS}" in said
    assert "make pin-digests" in said

    assert fetch(project, cache).returncode == 0
    done = pin_digests(project, cache / "current")
    assert done.returncode == 0, done.stderr
    assert "The model stays" in done.stdout
    assert "embed again" not in done.stdout
    right = {
        path: hashlib.sha256((tmp_path / "snapshot" / path).read_bytes()).hexdigest()
        for path in digests(project)
    }
    assert digests(project) == right
    assert "fetched" not in (project.folder / ".copier-answers.yml").read_text()
    project.commit("digests")

    again = fetch(project, cache)
    assert "already there" in again.stderr + again.stdout

    assert "Nothing else changed" in project.updated("update-model")
    project.release("v1.1.0", new_release)
    project.updated()
    assert digests(project) == right


def test_a_changed_byte_is_refused_from_then_on(project: Repository, tmp_path: Path) -> None:
    """Size and structure stay right, so nothing but the digest can tell."""
    assert fetch(project, tmp_path / "cache").returncode == 0
    overwrite(project, WEIGHTS, (tmp_path / "snapshot" / WEIGHTS).read_bytes()[:-1] + b"\1")
    assert fetch(project, tmp_path / "unpinned").returncode == 0

    assert pin_digests(project, tmp_path / "cache/current").returncode == 0
    refused = fetch(project, tmp_path / "second")
    assert refused.returncode == 7
    assert f"{WEIGHTS}: SHA-256 is" in refused.stderr + refused.stdout
    assert not (tmp_path / "second/current").exists()
    # The very folder that an unpinned start had taken, too.
    assert fetch(project, tmp_path / "unpinned").returncode == 7
    # And what was fetched while it was right is served on.
    assert fetch(project, tmp_path / "cache").returncode == 0


def spoilt(marker: dict[str, Any], how: str) -> str:
    if how == "version":
        marker["pin"]["version"] = "2"
    elif how == "place":
        marker["pin"]["artifact_uri"] += "x"
    elif how == "digest":
        marker["fetched"]["config.json"] = "0" * 64
    elif how == "no digest":
        marker["fetched"][WEIGHTS] = "0" * 63 + "G"
    elif how == "types":
        marker["fetched"] = [WEIGHTS]
    elif how == "lines":
        marker["pin"]["registered_model"] = "a\x1b[2J\nb"
    else:
        return how
    return json.dumps(marker)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("version", "deploy what is pinned first"),
        ("place", "deploy what is pinned first"),
        ("digest", "config.json has another SHA-256 than the pin"),
        ("no digest", "no marker of model-fetch"),
        ("types", "no marker of model-fetch"),
        ("lines", "no marker of model-fetch"),
        ("", "nothing that model-fetch left"),
        ("[" * 3000, "nothing that model-fetch left"),
        ("{}", "nothing that model-fetch left"),
    ],
)
def test_what_is_no_marker_of_this_version_changes_nothing(
    project: Repository, tmp_path: Path, how: str, said: str
) -> None:
    folder = tmp_path / "left"
    folder.mkdir()
    marker = {"pin": project.pin, "fetched": {WEIGHTS: "1" * 64}}
    (folder / ".model-fetch.json").write_text(spoilt(marker, how))
    before = project.tree()
    done = pin_digests(project, folder)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert project.tree() == before


def test_the_running_pod_is_asked_where_nothing_is_named(
    project: Repository, tmp_path: Path
) -> None:
    """By kubectl's exec, which runs nothing but `cat` in the image of TEI."""
    tools = tmp_path / "tools"
    tools.mkdir()
    marker = {"pin": project.pin, "fetched": {WEIGHTS: "1" * 64}}
    (tmp_path / "marker").write_text(json.dumps(marker))
    (tools / "kubectl").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path / "asked"}\nexec cat {tmp_path / "marker"}\n'
    )
    (tools / "kubectl").chmod(0o755)
    for name in ("docker", "docker-compose", "podman-compose"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    project.variables["PATH"] = f"{tools}:{os.environ['PATH']}"
    done = project.make("pin-digests")
    assert done.returncode == 0, done.stderr
    assert digests(project)[WEIGHTS] == "1" * 64
    assert (tmp_path / "asked").read_text().split("--container")[1] == (
        " tei -- cat /model/current/.model-fetch.json\n"
    )


# The pin alone


def pin(**changes: Any) -> Pin:
    return Pin.from_mapping(pinned("BAAI/bge-base-en-v1.5") | changes)


def files(**digests: str | None) -> list[dict[str, Any]]:
    return [
        {"path": f"{name}.bin", "from": f"{name}.bin", "size": 4, "sha256": digest}
        for name, digest in digests.items()
    ]


def test_a_refresh_of_the_same_version_keeps_what_is_known() -> None:
    one, other = "1" * 64, "2" * 64
    earlier = pin(files=files(a=one, b=one, c=None))
    fresh = pin(files=files(a=None, b=other, c=None))
    kept = fresh.with_digests_of(earlier)
    assert [file.sha256 for file in kept.files] == [one, other, None]
    for change in ({"version": "99"}, {"run_id": "other"}, {"artifact_uri": "s3://b/other"}):
        moved = pin(files=files(a=None), **change)
        assert moved.with_digests_of(earlier) == moved
    longer = pin(files=[files(a=None)[0] | {"size": 5}])
    assert longer.with_digests_of(earlier) == longer


def test_nothing_is_completed_where_nothing_is_pinned() -> None:
    unpinned = pin(version=None)
    marker = {"pin": pin().to_mapping(), "fetched": {}}
    with pytest.raises(ConfigurationError, match="Nothing is pinned yet"):
        unpinned.with_fetched(marker)
