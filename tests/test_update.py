"""The pin over the years: it stays, moves when asked to, and never needs the registry to stay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from demo.registry import connect, free_port
from tests.snapshots import register, snapshot

IDENTITY = {
    "GIT_AUTHOR_NAME": "someone",
    "GIT_AUTHOR_EMAIL": "someone@example.com",
    "GIT_COMMITTER_NAME": "someone",
    "GIT_COMMITTER_EMAIL": "someone@example.com",
}


@dataclass
class Project:
    """A rendered repository under Git, and the template it came from."""

    folder: Path
    template: Path
    home: Path
    registry: str = ""

    def git(self, *arguments: str, where: Path | None = None) -> str:
        command = ["git", "-c", "init.defaultBranch=main", *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), **IDENTITY}
        return subprocess.run(
            command,
            cwd=where or self.folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def commit(self, message: str = "step", where: Path | None = None) -> None:
        self.git("add", "--all", where=where)
        self.git("commit", "--quiet", "--message", message, where=where)

    def copier(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "copier", *arguments]
        registry = {"MLFLOW_TRACKING_URI": self.registry} if self.registry else {}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), **IDENTITY, **registry}
        return subprocess.run(
            command, cwd=self.folder, env=environment | variables, capture_output=True, text=True
        )

    def update(self, *data: str, **variables: str) -> None:
        """Update from what is committed, and commit what came of it."""
        answers = [word for item in data for word in ("-d", item)]
        result = self.copier("update", "--trust", "--defaults", *answers, **variables)
        assert result.returncode == 0, result.stderr
        assert "UU" not in self.git("status", "--porcelain")
        if self.git("status", "--porcelain"):
            self.commit("update")

    @property
    def pin(self) -> dict[str, object]:
        pin: dict[str, object] = json.loads((self.folder / "k8s/base/pin.json").read_text())
        stored = yaml.safe_load((self.folder / ".copier-answers.yml").read_text())
        assert stored["pin"] == pin
        return pin


@pytest.fixture
def project(template: Path, tmp_path: Path, mlflow_proxied: str) -> Project:
    """A project of version 1.0.0 of the template, pinned at version 1 of a model of its own."""
    made = Project(tmp_path / "project", tmp_path / "template", tmp_path / "home", mlflow_proxied)
    made.home.mkdir()
    shutil.copytree(template, made.template, symlinks=True)
    made.git("init", "--quiet", where=made.template)
    made.commit("version 1", where=made.template)
    made.git("tag", "v1.0.0", where=made.template)
    name = f"acme-{tmp_path.name.replace('_', '-')}"
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), name)
    made.folder.mkdir()
    answers = ["-d", f"model_id={name}", "-d", "accelerator=cpu"]
    result = made.copier("copy", "--trust", "--defaults", *answers, str(made.template), ".")
    assert result.returncode == 0, result.stderr
    made.git("init", "--quiet")
    made.commit("first")
    assert made.pin["version"] == "1"
    return made


def new_version(project: Project, tmp_path: Path, **config: object) -> None:
    source = snapshot(tmp_path / "next", sidecars=False, **config)
    register(project.registry, source, str(project.pin["registered_model"]))


def release(project: Project, tag: str, change: Callable[[Path], object]) -> None:
    change(project.template)
    project.commit(tag, where=project.template)
    project.git("tag", tag, where=project.template)


def test_a_pin_moves_only_when_asked(project: Project, tmp_path: Path) -> None:
    name = str(project.pin["registered_model"])
    new_version(project, tmp_path)
    project.update()
    assert project.pin["version"] == "1"
    project.update("refresh=false")
    assert project.pin["version"] == "1"

    project.update("refresh=true")
    assert (project.pin["version"], project.pin["selector"]) == ("2", "latest")
    assert "refresh" not in (project.folder / ".copier-answers.yml").read_text()

    project.update("model_version=1")
    assert (project.pin["version"], project.pin["selector"]) == ("1", "1")

    connect(project.registry).set_registered_model_alias(name, "champion", "2")
    project.update("model_version=@champion")
    assert (project.pin["version"], project.pin["selector"]) == ("2", "@champion")

    register(project.registry, tmp_path / "next", f"{name}-other")
    project.update(f"model_id={name}-other", "model_version=latest")
    assert project.pin["registered_model"] == f"{name}-other"


def test_an_update_needs_no_registry(project: Project) -> None:
    before = project.pin
    connect(project.registry).delete_registered_model(str(before["registered_model"]))
    release(project, "v1.1.0", lambda t: (t / "template/NEWS.md").write_text("news\n"))

    project.update()  # the model is gone
    project.registry = f"http://127.0.0.1:{free_port()}"
    release(project, "v1.2.0", lambda t: (t / "template/NEWS.md").write_text("more news\n"))
    project.update()  # the server is gone
    project.registry = ""
    release(project, "v1.3.0", lambda t: (t / "template/NEWS.md").write_text("last news\n"))
    project.update()  # nobody knows of a server

    assert project.pin == before
    assert (project.folder / "NEWS.md").read_text() == "last news\n"


def test_each_side_of_an_update_runs_its_own_code(project: Project) -> None:
    """Several modules: the old version must not see the new one's, nor the other way round."""

    def change(template: Path) -> None:
        texts = template / "extensions/texts.py"
        source = texts.read_text()
        assert "return shlex.quote(str(text))" in source
        texts.write_text(source.replace("shlex.quote(str(text))", "f'<2: {text}>'"))
        (template / "template/code.txt.jinja").write_text("{{ 'a b' | shell_text }}\n")

    release(project, "v1.1.0", lambda t: (t / "template/code.txt.jinja").write_text(
        "{{ 'a b' | shell_text }}\n"
    ))  # fmt: skip
    project.update()
    assert (project.folder / "code.txt").read_text() == "'a b'\n"
    release(project, "v1.2.0", change)
    project.update()
    assert (project.folder / "code.txt").read_text() == "<2: a b>\n"


def test_what_the_owner_changed_survives(project: Project, tmp_path: Path) -> None:
    deployment = project.folder / "k8s/base/deployment.yaml"
    edited = deployment.read_text().replace(
        "      containers:\n", "      priorityClassName: mine\n      containers:\n"
    )
    deployment.write_text(edited)
    (project.folder / "images/tei/README.md").unlink()
    (project.folder / "mine.txt").write_text("mine\n")
    project.commit("my own changes")
    new_version(project, tmp_path)
    release(project, "v1.1.0", lambda t: (t / "template/NEWS.md").write_text("news\n"))

    project.update("refresh=true")

    assert "priorityClassName: mine" in deployment.read_text()
    assert not (project.folder / "images/tei/README.md").exists()
    assert (project.folder / "mine.txt").read_text() == "mine\n"
    assert (project.folder / "NEWS.md").exists()
    assert project.pin["version"] == "2"


def test_a_model_upgrade_is_a_small_diff_and_revert_brings_the_old_pin_back(
    project: Project, tmp_path: Path
) -> None:
    before = project.pin
    new_version(project, tmp_path)
    project.update("refresh=true")

    changed = project.git("diff", "--name-only", "HEAD~1").split()
    assert changed == [
        *(".copier-answers.yml", "README.md", "compose.yaml", "k8s/base/pin.json"),
        *("playground/index.html", "scripts/one_machine.sh"),
        *(f"service/quadlet/text-embeddings{part}.container" for part in ("-fetch", "")),
        "smoke/expected.json",
    ]
    added = [n.split()[0] for n in project.git("diff", "--numstat", "HEAD~1").splitlines()]
    assert max(map(int, added)) < 20
    project.git("revert", "--no-edit", "HEAD")
    assert project.pin == before


def test_a_redeploy_over_the_project_keeps_the_pin(project: Project, tmp_path: Path) -> None:
    """A platform runs `copier copy --force` again, never `copier update`."""
    new_version(project, tmp_path)
    again = ["copy", "--trust", "--force", "-d", f"model_id={project.pin['model_id']}"]
    result = project.copier(*again, str(project.template), ".")
    assert result.returncode == 0, result.stderr
    assert project.pin["version"] == "1"
    result = project.copier(*again, "-d", "refresh=true", str(project.template), ".")
    assert result.returncode == 0, result.stderr
    assert project.pin["version"] == "2"
