"""`make update` runs the template that the repository came from, and no other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, program

PROGRAM = ROOT / "template/scripts/update.py"
ANSWERS = (
    "# Changes\n_commit: v1.0.0\n_src_path: gh:acme/template\naccelerator: cpu\ncomponents: []\n"
)
IDENTITY = {
    f"GIT_{who}_{what}": f"x@{what}"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in IDENTITY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TEMPLATE", raising=False)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, ANSWERS)
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def read(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path, answers: str) -> None:
    (folder / ".copier-answers.yml").write_text(answers)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def problem(folder: Path) -> str:
    update = program(PROGRAM)
    try:
        update.Repository(folder).must_know_its_template()
    except update.Stop as stop:
        return str(stop)
    return ""


def test_the_first_template_is_known(repository: Path) -> None:
    assert problem(repository) == ""
    commit(repository, ANSWERS.replace("v1.0.0", "v1.2.0-rc.1-5-gabcdef").replace("cpu", "'l4'"))
    assert problem(repository) == ""


@pytest.mark.parametrize(
    "spoilt",
    [
        ANSWERS.replace("gh:acme/template", "gh:evil/template"),
        ANSWERS + "_src_path: gh:evil/template\n",
        ANSWERS + '"_src_path": gh:evil/template\n',
        ANSWERS + "'_src_path': gh:evil/template\n",
        ANSWERS + '"\\x5fsrc_path": gh:evil/template\n',
        ANSWERS + "? _src_path\n: gh:evil/template\n",
        ANSWERS + "_src_path : gh:evil/template\n",
        ANSWERS + "!!str _src_path: gh:evil/template\n",
        ANSWERS + "&a _src_path: gh:evil/template\n",
        ANSWERS + "<<: {_src_path: gh:evil/template}\n",
        ANSWERS + "---\n_src_path: gh:evil/template\n",
        "{_src_path: gh:evil/template}\n",
        "  _src_path: gh:evil/template\n",
        'a: "\n_src_path: gh:acme/template\n"\n_src_path: gh:evil/template\n',
        ANSWERS.replace("gh:acme/template", "*a") + "b: &a gh:evil/template\n",
        ANSWERS.replace("gh:acme/template", "|\n  gh:evil/template"),
        ANSWERS.replace("gh:acme/template", "ext::sh -c id"),
        ANSWERS.replace("gh:acme/template", "--upload-pack=id"),
        ANSWERS.replace("v1.0.0", "--upload-pack=id"),
        ANSWERS.replace("_src_path", "src_path"),
        "",
    ],
)
def test_another_template_is_never_run(repository: Path, spoilt: str) -> None:
    (repository / ".copier-answers.yml").write_text(spoilt)  # not committed: check looks at it too
    assert problem(repository)
    commit(repository, spoilt)
    assert problem(repository)


def test_history_that_was_joined_from_elsewhere_makes_nothing_known(repository: Path) -> None:
    evil = ANSWERS.replace("gh:acme/template", "gh:evil/template")
    git(repository, "branch", "base")
    git(repository, "checkout", "--quiet", "--orphan", "other")
    commit(repository, evil)
    words = ("--no-edit", "--allow-unrelated-histories", "--strategy=ours")
    git(repository, "merge", "--quiet", *words, "base")
    assert "names another template" in problem(repository)


def test_a_shallow_clone_knows_no_first_commit(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(repository, ANSWERS.replace("gh:acme/template", "gh:evil/template"))
    clone = tmp_path_factory.mktemp("shallow") / "clone"
    git(repository, "clone", "--quiet", "--depth=1", f"file://{repository}", str(clone))
    assert "whole history" in problem(clone)
    monkeypatch.setenv("TEMPLATE", "gh:evil/template")  # its owner says so
    assert problem(clone) == ""
    monkeypatch.setenv("TEMPLATE", "gh:acme/template")
    assert "names another template" in problem(clone)


@pytest.mark.parametrize("spelt", ["{}", "v1.0.0-1-g{}", "refs/pull/7/head", "{}^0"])
def test_a_pull_request_of_the_template_is_never_run(
    repository: Path, tmp_path_factory: pytest.TempPathFactory, spelt: str
) -> None:
    """A server has the commits of all pull requests, and Copier mirrors what a server has."""
    template = tmp_path_factory.mktemp("template")
    git(template, "init", "--quiet")
    commit(template, "a: 1\n")
    git(template, "tag", "v1.0.0")
    commit(template, "a: 2\n")
    later = read(template, "describe", "--tags")
    git(template, "checkout", "--quiet", "--detach")
    commit(template, "a: evil\n")
    evil = read(template, "rev-parse", "HEAD")
    git(template, "update-ref", "refs/pull/7/head", "HEAD")
    git(template, "checkout", "--quiet", "-")
    answers = ANSWERS.replace("gh:acme/template", f"git+file://{template}")
    for good in ("v1.0.0", later):
        commit(repository, answers.replace("v1.0.0", good))
        program(PROGRAM).Repository(repository).must_know_its_commit()
    (repository / ".copier-answers.yml").write_text(answers.replace("v1.0.0", spelt.format(evil)))
    update = program(PROGRAM)
    with pytest.raises(update.Stop, match=r"no branch and no tag|not as Copier"):
        update.Repository(repository).must_know_its_commit()


@pytest.mark.parametrize("how", ["absolute", "relative", "home"])
def test_a_template_on_this_machine_is_its_owner_s(
    repository: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "template").mkdir()
    monkeypatch.setenv("HOME", str(repository))
    path = {"absolute": f"{repository}/template", "relative": "./template", "home": "~/template"}
    commit(repository, ANSWERS.replace("gh:acme/template", path[how]).replace("v1.0.0", "0" * 40))
    program(PROGRAM).Repository(repository).must_know_its_commit()


def test_the_versions_that_run_are_those_that_are_tested() -> None:
    tested = dict(
        re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    )
    run = dict(re.findall(r"([\w-]+)(?:==|@)([\d.]+)", program(PROGRAM).COPIER))
    assert run == {
        "copier-template-extensions": tested["copier-template-extensions"],
        "mlflow-skinny": tested["mlflow"],
        "copier": tested["copier"],
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pin.json", "{}"), ("pin.json", "[" * 100_000), ("pin.json", "null"), ("pin.json", "[]"),
        ("pin.json", '{"facts": 1, "files": []}'), ("pin.json", '{"facts": {}, "files": [{"path": "a"}]}'),
        ("pin.json", '{"model_id": "a", "files": {}}'), ("pin.json", "9" * 5000),
        ("pin.json", '{"facts": {}, "files": [{"path": [], "size": "x"}]}'), ("pin.json", "\udcff"),
        ("deployment.yaml", '            - "--auto-truncate=\\x41"\n'),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_pin_that_was_edited_by_hand_cannot_be_compared(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = tmp_path / "k8s/base"
    folder.mkdir(parents=True)
    pin = '{"model_id": "a", "version": "1", "selector": "1", "run_id": null, "facts": {}, "files": []}'
    files = {"pin.json": pin, "deployment.yaml": '            - "--port=80"\n'}
    for path, text in files.items():
        (folder / path).write_text(text)
    repository = program(PROGRAM).Repository(tmp_path)
    assert repository.state().flags == {"--port": "80"}
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert repository.state() is None
