"""`make update` in a repository that people have edited, with the oldest Copier and the newest.

What comes out is compared exactly: a three-way merge has one right result.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import yaml

from demo.registry import connect, free_port
from tests.conftest import ROOT, environment, pinned, program
from tests.snapshots import register, snapshot
from tests.test_update import IDENTITY

MODEL = "BAAI/bge-base-en-v1.5"
DEPLOYMENT = "k8s/base/deployment.yaml"
MOUNTS_TOKEN = "      automountServiceAccountToken: false\n"
OLDEST = yaml.safe_load((ROOT / "copier.yml").read_text())["_min_copier_version"]
NEWEST = next(
    line.removeprefix("copier==")
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    if line.startswith("copier==")
)


@dataclass
class Repository:
    """A rendered repository under Git, the template it came from, and a Copier."""

    folder: Path
    template: Path
    home: Path
    python: str = sys.executable
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
        known = {"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8", **IDENTITY}
        return subprocess.run(
            command,
            cwd=where or self.folder,
            env=known | self.variables,
            capture_output=True,
            text=True,
        )

    def git(self, *arguments: str, where: Path | None = None) -> str:
        done = self.run("git", "-c", "init.defaultBranch=main", *arguments, where=where)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commit(self, message: str = "step", where: Path | None = None) -> None:
        self.git("add", "--all", where=where)
        self.git("commit", "--quiet", "--message", message, where=where)

    def copy(self, *answers: str) -> None:
        words = [word for answer in answers for word in ("-d", answer)]
        command = [self.python, "-W", "ignore", "-m", "copier", "copy", "--trust", "--defaults"]
        done = self.run(*command, *words, str(self.template), ".")
        assert done.returncode == 0, done.stderr
        self.git("init", "--quiet")
        self.commit("first")

    def make(self, target: str, arguments: str = "") -> subprocess.CompletedProcess[str]:
        copier = f"COPIER={self.python} -W ignore -m copier"
        return self.run("make", "--silent", target, copier, f"ARGS={arguments}")

    def updated(self, target: str = "update", arguments: str = "") -> str:
        """What an update says that leaves nothing to mend."""
        done = self.make(target, arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "<<<<<<<" not in "".join(self.tree().values())
        return done.stdout

    def tree(self) -> dict[str, str]:
        names = self.git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        paths = {name: self.folder / name for name in names}
        return {name: path.read_text() for name, path in paths.items() if path.exists()}

    def edit(self, name: str, old: str, new: str) -> None:
        change(self.folder / name, old, new)

    def release(self, tag: str, *changes: Callable[[Path], object]) -> None:
        for step in changes:
            step(self.template)
        self.commit(tag, where=self.template)
        self.git("tag", tag, where=self.template)

    @property
    def pin(self) -> dict[str, Any]:
        pin: dict[str, Any] = json.loads((self.folder / "k8s/base/pin.json").read_text())
        return pin


@cache
def updater() -> ModuleType:
    """The program behind `make update`, which is in no package."""
    return program(ROOT / "template/scripts/update.py")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


@pytest.fixture(params=sorted({OLDEST, NEWEST}))
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter with the oldest Copier that copier.yml claims, or with the newest."""
    own = request.param == version("copier")
    named = sys.executable if own else str(environment(f"copier-{request.param}"))
    said = subprocess.run([named, "-m", "copier", "--version"], capture_output=True, text=True)
    assert said.stdout.split()[-1] == request.param
    return named


@pytest.fixture
def empty(template: Path, tmp_path: Path) -> Repository:
    """The template as a Git repository with release 1.0.0, and an empty folder beside it."""
    made = Repository(tmp_path / "project", tmp_path / "template", tmp_path / "home")
    for folder in (made.home, made.folder):
        folder.mkdir()
    # Copier starts several processes per file: what is not looked at here is left out.
    program = shutil.ignore_patterns(
        *("model_fetch", "tests", "thinkube", "requirements*", "smoke.py")
    )
    shutil.copytree(template, made.template, symlinks=True, ignore=program)
    made.git("init", "--quiet", where=made.template)
    made.release("v1.0.0")
    return made


def rendered(empty: Repository, python: str) -> Repository:
    """A repository of release 1.0.0; no registry is asked."""
    empty.python = python
    empty.copy(f"model_id={MODEL}", f"pin={json.dumps(pinned(MODEL))}", "accelerator=l4")
    return empty


def new_release(template: Path) -> None:
    """What releases do: change a line, add a file, remove one, ask something new."""
    base = template / "template/{{objects_folder}}/base/deployment.yaml.jinja"
    change(base, MOUNTS_TOKEN, MOUNTS_TOKEN.replace("\n", " # NEW\n"))
    (template / "template/NEWS.md.jinja").write_text("Colour: {{ colour }}\n")
    (template / "template/smoke/Dockerfile").unlink()
    with (template / "copier.yml").open("a") as config:
        config.write("\ncolour:\n  type: str\n  help: Which colour?\n  default: blue\n")


def test_edits_survive_a_new_release(empty: Repository, python: str) -> None:
    project = rendered(empty, python)
    before = project.pin
    project.edit(DEPLOYMENT, "  replicas: 1\n", "  replicas: 3\n")
    project.edit(
        DEPLOYMENT,
        "            - name: LOG_LEVEL\n              value: info\n",
        "            - name: LOG_LEVEL\n              value: info\n"
        "            - name: OTLP_SERVICE_NAME\n              value: mine\n",
    )
    project.edit(
        "k8s/kustomization.yaml", "resources:\n  - base\n", "resources:\n  - base\n  - mine\n"
    )
    mine = project.folder / "k8s/mine/kustomization.yaml"
    mine.parent.mkdir()
    mine.write_text("kind: Component\n")
    (project.folder / "smoke/job.yaml").unlink()
    project.commit("my own changes")
    edited = project.tree()

    project.release("v1.1.0", new_release)
    said = project.updated()

    expected = dict(edited)
    del expected["smoke/Dockerfile"]
    expected["NEWS.md"] = "Colour: blue\n"
    expected[DEPLOYMENT] = edited[DEPLOYMENT].replace(
        MOUNTS_TOKEN, MOUNTS_TOKEN.replace("\n", " # NEW\n")
    )
    answers = yaml.safe_load(edited[".copier-answers.yml"]) | {
        "_commit": "v1.1.0",
        "colour": "blue",
    }
    now = project.tree()
    assert yaml.safe_load(now.pop(".copier-answers.yml")) == answers
    del expected[".copier-answers.yml"]
    assert now == expected
    assert project.pin == before
    assert f"The model stays: {MODEL}, version 3." in said


def test_a_conflict_is_shown_inline_and_is_no_success(empty: Repository, python: str) -> None:
    project = rendered(empty, python)
    mine = MOUNTS_TOKEN.replace("\n", " # MINE\n")
    project.edit(DEPLOYMENT, MOUNTS_TOKEN, mine)
    project.commit("my own changes")
    edited = project.tree()[DEPLOYMENT]
    project.release("v1.1.0", new_release)

    done = project.make("update")

    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: conflicts are left in {DEPLOYMENT}: mend them")
    new = MOUNTS_TOKEN.replace("\n", " # NEW\n")
    assert project.tree()[DEPLOYMENT] == edited.replace(
        mine, f"<<<<<<< before updating\n{mine}=======\n{new}>>>>>>> after updating\n"
    )
    again = project.make("update")
    assert "uncommitted changes" in again.stderr
    (project.folder / "smoke/smoke.py.rej").touch()  # what --conflict rej leaves
    assert updater().Repository(project.folder).conflicts() == [DEPLOYMENT, "smoke/smoke.py.rej"]


def test_an_answer_changes_together_with_the_release(empty: Repository, python: str) -> None:
    project = rendered(empty, python)
    project.release("v1.1.0", new_release)
    project.updated(arguments="--data replicas=2 --data colour=red")
    assert (project.folder / "NEWS.md").read_text() == "Colour: red\n"
    assert "  replicas: 2\n" in project.tree()[DEPLOYMENT]


def test_an_option_comes_and_goes_with_its_files(empty: Repository) -> None:
    project = rendered(empty, sys.executable)
    before = project.tree()
    folder = project.folder / "k8s/components/ingress"
    project.updated(arguments="--data components=[ingress] --data open_to_everyone=true")
    assert (folder / "ingress.yaml").is_file()
    assert "  - components/ingress\n" in project.tree()["k8s/kustomization.yaml"]
    project.commit("with it")
    project.updated(arguments="--data components=[]")
    assert not folder.exists()
    project.commit("without it")
    assert project.tree() == before


def test_two_releases_at_once_are_as_one_after_the_other(empty: Repository) -> None:
    project = rendered(empty, sys.executable)
    project.release("v1.1.0", new_release)
    project.updated()
    project.commit("one")
    project.release(
        "v1.2.0",
        lambda t: change(t / "template/NEWS.md.jinja", "Colour", "Color"),
        lambda t: change(t / "copier.yml", "default: blue", "default: green"),
    )
    project.updated()
    project.commit("two")
    steps = project.tree()

    project.git("checkout", "--quiet", "-b", "other", "HEAD~2")
    project.updated()
    at_once = project.tree()
    assert steps.pop("NEWS.md") == "Color: blue\n"  # an answer that was given stays
    assert at_once.pop("NEWS.md") == "Color: green\n"
    for tree in (steps, at_once):
        tree[".copier-answers.yml"] = tree[".copier-answers.yml"].replace("green", "blue")
    assert steps == at_once


@pytest.mark.parametrize(
    ("then", "edited", "more"),
    [
        (("gitops=argocd",), "gitops/argocd.yaml", "--data 'environments=staging production'"),
        (("gitops=flux",), "gitops/flux.yaml", "--data gitops=argocd"),
        (("components=[monitoring]",), "monitoring/README.md", "--data components=[]"),
        ((), "scripts/prefetch.py", "--data model_storage=ephemeral"),
        ((), "smoke/Dockerfile", ""),  # the release has none
    ],
)
def test_an_edited_file_does_not_go_without_a_word(
    then: tuple[str, ...], edited: str, more: str, empty: Repository
) -> None:
    answers = (f"model_id={MODEL}", f"pin={json.dumps(pinned(MODEL))}", "accelerator=l4")
    empty.copy(*answers, *then)
    empty.release("v1.1.0", new_release)
    untouched = empty.make("update", more)
    assert untouched.returncode == 0, untouched.stdout + untouched.stderr
    assert edited not in empty.tree()
    empty.git("reset", "--quiet", "--hard")
    empty.git("clean", "--quiet", "--force", "-d")

    with (empty.folder / edited).open("a") as file:
        file.write("# mine\n")
    empty.commit("mine")
    done = empty.make("update", more)
    assert done.returncode != 0
    assert f"the template no longer has {edited}, which you had changed" in done.stderr
    assert "Traceback" not in done.stderr
    empty.git("checkout", "HEAD", "--", edited)
    empty.commit("updated, with my file")
    assert "you had changed" not in empty.updated()  # said once
    assert empty.tree()[edited].endswith("# mine\n")


FIRST = "351dd91b074cfdc99f78c6139c1fb5d5b5de2901"
"""Stands for a release until there is one: main before repositories had CI and environments."""
FIRST_GITOPS = "b1622a97b882f33f49811ca8bf3764d8d45d0d1a"
"""Main when GitOps was of one environment alone."""


def known(revision: str) -> bool:
    """Whether this clone has a commit."""
    asked = ["git", "cat-file", "-e", f"{revision}^{{commit}}"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True).returncode == 0


def released() -> list[str]:
    asked = ["git", "tag", "--list", "v*"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    ("revision", "then", "more"),
    [
        *((revision, (), ()) for revision in (FIRST, *released())),
        (FIRST_GITOPS, ("gitops=flux",), ("environments=staging production", "ci=gitlab")),
    ],
)
def test_every_released_version_updates_to_this_one(
    revision: str,
    then: tuple[str, ...],
    more: tuple[str, ...],
    empty: Repository,
    template: Path,
    tmp_path: Path,
) -> None:
    """What comes out is what this version renders from the same answers, and a person's own edit.

    then: answers of the old one beside the usual. more: those that the update changes.
    """
    if not known(revision):
        pytest.skip(f"this clone does not have {revision[:12]}: git fetch --unshallow --tags")
    clone, folder, fresh = tmp_path / "clone", tmp_path / "old", tmp_path / "fresh"
    empty.git("clone", "--quiet", "--no-checkout", str(ROOT), str(clone), where=tmp_path)
    empty.git("checkout", "--quiet", revision, where=clone)
    folder.mkdir()
    project = Repository(folder, clone, empty.home)
    answers = (
        *(f"model_id={MODEL}", f"pin={json.dumps(pinned(MODEL))}", "accelerator=l4"),
        "components=[monitoring, network-policy, api-key]",
    )
    project.copy(*answers, *then)
    before = project.pin
    mine = "# mine\n" + (folder / "smoke/job.sh").read_text()
    (folder / "smoke/job.sh").write_text(mine)
    project.commit("mine")

    for name in ("extensions", "template"):
        shutil.rmtree(clone / name)
        shutil.copytree(template / name, clone / name, symlinks=True)
    for name in ("copier.yml", "manifest.yaml"):
        shutil.copy(template / name, clone)
    project.release("v999.0.0")
    project.updated(arguments=" ".join(f"--data '{answer}'" for answer in more))

    assert project.pin == before
    fresh.mkdir()
    Repository(fresh, clone, empty.home).copy(*answers, *then, *more)
    expected, found = Repository(fresh, clone, empty.home).tree(), project.tree()
    assert found.pop("smoke/job.sh") == mine
    assert f"# mine\n{expected.pop('smoke/job.sh')}" == mine
    assert found == expected


# What is said


def state(flags: dict[str, str] | None = None, **changes: Any) -> Any:
    pin = pinned(MODEL)
    pin["facts"] |= {k: changes.pop(k) for k in list(changes) if k in pin["facts"]}
    own = {"--pooling": "cls", "--dtype": "float16", "--max-batch-tokens": "16384"}
    return updater().State(pin | changes, own | (flags or {}))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (state(), []),
        (
            state(version="4", dimensions=1024),
            ["version", "dimensions", "RE-INDEX: another dimensions"],
        ),
        (state({"--pooling": "mean"}), ["pooling", "RE-INDEX: another pooling"]),
        (state(model_id="acme/other"), ["model", "RE-INDEX: another model"]),
        (state({"--max-batch-tokens": "8192"}), ["--max-batch-tokens"]),
        (state(version="4", files=[]), ["version", "size", "The files changed: unless you know"]),
        (state(version="4"), ["version"]),
        (state(prompts={"query": "q: "}), ["The prefixes that clients write"]),
    ],
)
def test_what_a_change_means_is_said(after: Any, said: list[str]) -> None:
    lines = list(updater().described(state(), after))
    told = [line.strip() for line in lines if not line.endswith(", as before")]
    assert len(told) == len(said)
    for line, beginning in zip(told, said, strict=True):
        assert line.startswith(beginning)


def test_weights_without_a_digest_may_be_others() -> None:
    file = {"path": "model.safetensors", "from": "model.safetensors", "size": 7}
    before, after = state(files=[file]), state(version="4", files=[file])
    [told] = [line for line in updater().described(before, after) if "digest" in line]
    assert told.startswith("The weights have no digest in the registry")
    assert not any("digest" in line for line in updater().described(before, before))


# With a registry


@pytest.fixture
def registered(empty: Repository, mlflow_proxied: str, tmp_path: Path) -> Repository:
    """A repository that is pinned at version 1 of a model of its own."""
    name = f"acme-{tmp_path.name.replace('_', '-')}"
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), name)
    empty.variables["MLFLOW_TRACKING_URI"] = mlflow_proxied
    empty.copy(f"model_id={name}", "accelerator=cpu")
    return empty


def new_version(project: Repository, folder: Path, pooling: str = "mean", **config: Any) -> None:
    snapshot(folder, sidecars=False, **config)
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    pools = {mode: name == pooling for name, mode in modes.items()}
    pools["word_embedding_dimension"] = config.get("hidden_size", 8)
    (folder / "1_Pooling/config.json").write_text(json.dumps(pools))
    name = str(project.pin["registered_model"])
    register(project.variables["MLFLOW_TRACKING_URI"], folder, name)


def config_map(project: Repository) -> str:
    """The name of the ConfigMap of the pin, which rolls the Deployment when it changes."""
    built = project.run("kubectl", "kustomize", "k8s")
    assert built.returncode == 0, built.stderr
    objects = list(yaml.safe_load_all(built.stdout))
    (name,) = [o["metadata"]["name"] for o in objects if o["kind"] == "ConfigMap"]
    (pod,) = [o["spec"]["template"]["spec"] for o in objects if o["kind"] == "Deployment"]
    assert name in [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
    return str(name)


def test_a_new_version_is_taken_said_and_taken_back(registered: Repository, tmp_path: Path) -> None:
    project = registered
    before, running = project.tree(), config_map(project)
    new_version(project, tmp_path / "next", pooling="cls", hidden_size=16)

    said = project.make("check-update")
    assert said.returncode == 0, said.stderr
    assert "`make update-model` would change" in said.stdout
    assert project.tree() == before

    said_of_it = project.updated("update-model")
    for name, moves in (
        ("version", "1 -> 2"),
        ("dimensions", "8 -> 16"),
        ("pooling", "mean -> cls"),
    ):
        assert f"  {name:<26}{moves}\n" in said_of_it
    assert "RE-INDEX: another dimensions, pooling." in said_of_it
    assert project.pin["version"] == "2"
    project.commit("version 2")
    assert config_map(project) != running

    project.git("revert", "--no-edit", "HEAD")
    assert project.tree() == before
    assert config_map(project) == running


def test_a_registry_that_cannot_answer_changes_nothing(registered: Repository) -> None:
    project = registered
    tree = project.tree()
    name = str(project.pin["registered_model"])
    uri = project.variables.pop("MLFLOW_TRACKING_URI")
    unknown = project.make("update-model")
    assert "error: MLFLOW_TRACKING_URI is not set" in unknown.stderr

    connect(uri).delete_registered_model(name)
    for address, said in ((uri, name), (f"http://127.0.0.1:{free_port()}", "nothing was changed")):
        project.variables["MLFLOW_TRACKING_URI"] = address
        failed = project.make("update-model")
        assert failed.returncode != 0
        assert said in failed.stderr
        assert "nothing was changed" in failed.stderr
    assert project.tree() == tree

    project.release("v1.1.0", new_release)
    project.updated()  # the template needs no registry
    assert (project.folder / "NEWS.md").exists()
    assert project.pin["version"] == "1"


def test_what_is_not_committed_is_not_touched(empty: Repository) -> None:
    project = rendered(empty, sys.executable)
    project.release("v1.1.0", new_release)
    project.edit(DEPLOYMENT, "  replicas: 1\n", "  replicas: 3\n")
    tree = project.tree()
    done = project.make("update")
    assert done.returncode != 0
    assert f"error: uncommitted changes ({DEPLOYMENT}): commit or stash them" in done.stderr
    assert project.tree() == tree

    said = project.make("check-update")
    assert said.returncode == 0, said.stderr
    assert "1.1.0" in said.stdout + said.stderr
    assert "not checked, since MLFLOW_TRACKING_URI is not set" in said.stdout
