"""Several environments: what each is, which version it serves, and how a version moves on."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from copier.errors import UserMessageError

from tests.conftest import Render, pinned
from tests.test_render import tree
from tests.test_update import Project, new_version, project

__all__ = ["project"]

MODEL = "BAAI/bge-base-en-v1.5"
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "components": ["monitoring", "autoscaling-keda", "gateway", "ingress", "network-policy"],
        "open_to_everyone": True,
        "replicas": "2",
    },
    "hpa": {"components": ["monitoring", "autoscaling-hpa"], "accelerator": "cpu"},
    "own names": {
        "namespace": "search",
        "project_name": "e5",
        "components": ["gateway", "api-key"],
    },
}


def rendered(render: Render, environments: str, **answers: Any) -> Path:
    given = {"model_id": MODEL, "pin": pinned(MODEL), "environments": environments}
    return render(program=False, **given | answers)


def built(project: Path, folder: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", folder], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("environments", ["staging production", "dev test live"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_environment_is_the_whole_service_under_names_of_its_own(
    shape: str, environments: str, render: Render
) -> None:
    project = rendered(render, environments, **SHAPES[shape])
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    plain, name = answers["namespace"], answers["project_name"]
    shared = built(project, "k8s")
    seen = set()
    for environment in environments.split():
        last = environment == environments.split()[-1]
        objects = built(project, f"overlays/{environment}")
        assert [(o["kind"]) for o in objects] == [o["kind"] for o in shared]
        expected = plain if last else f"{plain}-{environment}"
        assert {o["metadata"]["namespace"] for o in objects} == {expected}
        seen.add(expected)
        text = yaml.safe_dump_all(objects)
        host = f"{name}.example.com" if last else f"{name}-{environment}.example.com"
        assert set(re.findall(rf"\b{name}[\w-]*\.example\.com", text)) <= {host}
        assert (host in text) == bool({"gateway", "ingress"} & set(answers["components"]))
        # Alerts and the autoscaler look at this environment alone, the dashboard at each.
        found = [o for o in objects if o["kind"] in ("PrometheusRule", "ScaledObject")]
        asked = "".join(map(json.dumps, found))
        assert set(re.findall(r'job=\\+"([^"\\]+)', asked)) <= {f"{expected}/{name}"}
        assert set(re.findall(r'namespace=\\+"([^"\\]+)', asked)) <= {expected}
        boards = [
            json.loads(value)
            for o in objects
            if o["kind"] == "ConfigMap"
            for key, value in o["data"].items()
            if key != "pin.json"
        ]
        for board in boards:
            [choice] = [v for v in board["templating"]["list"] if v["name"] == "service"]
            assert f"{environment} : {expected}/{name}" in choice["query"].split(",")
    assert len(seen) == len(environments.split())


def test_one_environment_is_as_it_was(render: Render) -> None:
    project = rendered(render, "")
    assert not (project / "overlays").exists()
    assert not (project / "scripts/promote.py").exists()
    assert "ENV" not in (project / "Makefile").read_text()
    assert "promote" not in "".join(
        path.read_text() for path in project.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("environments", "answers", "expected"),
    [
        ("production", {}, "two or more names"),
        ("Staging production", {}, "two or more names"),
        ("a b c ../../etc", {}, "two or more names"),
        ("staging staging", {}, "names one twice"),
        ("staging production", {"platform": "thinkube"}, "Thinkube deploys one"),
        ("staging production", {"pin": pinned(MODEL, version=None, files=[])}, "nothing is pinned"),
        ("staging production", {"namespace": "n" * 60}, "more than 63 characters"),
    ],
)
def test_environments_that_cannot_be_are_refused_in_one_line(
    environments: str, answers: dict[str, Any], expected: str, render: Render
) -> None:
    with pytest.raises(UserMessageError, match=expected) as refusal:
        rendered(render, environments, **answers)
    assert "\n" not in str(refusal.value)


def make(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=project, text=True, capture_output=True)


def served(project: Path, environment: str) -> str:
    objects = built(project, f"overlays/{environment}")
    [pin] = [o["data"]["pin.json"] for o in objects if "pin.json" in o.get("data", {})]
    return str(json.loads(pin)["version"])


def test_a_target_asks_which_environment_is_meant(render: Render) -> None:
    project = rendered(render, "staging production")
    targets = ["deploy", "namespace", "prefetch", "smoke-job", "parity-job", "doctor"]
    for target in targets:
        for words in ((), ("ENV=prod",), ("ENV=",), ("ENV=staging production",)):
            done = make(project, "--dry-run", target, *words)
            assert done.returncode != 0, (target, words)
            assert "Say which environment: ENV=staging or ENV=production" in done.stderr
        assert make(project, "--dry-run", target, "ENV=staging").returncode == 0, target
    # These are of one machine too, and else of the first, which serves what is pinned.
    for target in ("logs", "pin-digests"):
        done = make(project, "--dry-run", target)
        assert "kubectl --namespace text-embeddings-staging" in done.stdout
    assert make(project, "--dry-run", "logs", "ENV=prod").returncode != 0
    done = make(project, "--dry-run", "deploy", "ENV=staging")
    assert "kubectl apply -k overlays/staging" in done.stdout
    assert "--namespace text-embeddings-staging rollout status" in done.stdout
    done = make(project, "--dry-run", "smoke-job", "ENV=staging")
    assert "kubectl --namespace text-embeddings-staging apply -k smoke" in done.stdout
    assert "sh smoke/job.sh text-embeddings-staging" in done.stdout


def test_a_version_moves_on_by_one_line(project: Project, tmp_path: Path) -> None:
    """Of a real registry: staging follows updates, production what is promoted to it."""
    project.update("environments=staging production")
    folder = project.folder
    assert (served(folder, "staging"), served(folder, "production")) == ("1", "1")
    done = make(folder, "promote", "TO=production")
    assert "production serves version 1" in done.stderr

    new_version(project, tmp_path)
    project.update("refresh=true")
    assert (served(folder, "staging"), served(folder, "production")) == ("2", "1")

    done = make(folder, "promote", "TO=production")
    assert done.returncode == 0, done.stderr
    assert "version 1 becomes 2, as staging serves it" in done.stdout
    assert "RE-INDEX" not in done.stdout
    changed = project.git("diff", "--unified=0").splitlines()
    lines = [line for line in changed if re.match(r"[-+] ", line)]
    assert len(lines) == 2  # one line, before and after
    assert lines[1].endswith("-2.json]")
    assert served(folder, "production") == "2"
    project.commit("production: version 2")
    project.git("revert", "--no-edit", "HEAD")
    assert served(folder, "production") == "1"
    # Later updates leave it alone.
    project.git("revert", "--no-edit", "HEAD")
    new_version(project, tmp_path / "more")
    project.update("refresh=true")
    assert (served(folder, "staging"), served(folder, "production")) == ("3", "2")


def test_another_model_is_told_and_not_deployed_with_the_flags_of_its_successor(
    render: Render, tmp_path: Path
) -> None:
    project = rendered(render, "dev staging production", ci="gitlab")
    assert make(project, "check-environments").returncode == 0
    other = pinned("BAAI/bge-large-en-v1.5") | {"version": "9"}
    (project / "k8s/base/pin.json").write_text(json.dumps(other))

    environment = os.environ | {"BUILDER": "none"}
    done = subprocess.run(
        ["make", "deploy", "ENV=production"],
        cwd=project, text=True, capture_output=True, env=environment | {"KUBECONFIG": "/dev/null"},
    )  # fmt: skip
    assert done.returncode != 0
    check = ["python3", "-B", "scripts/promote.py", "--check", "k8s", "production"]
    done = subprocess.run(check, cwd=project, text=True, capture_output=True)
    assert done.returncode == 1
    assert "production serves version 3, but TEI's flags are for another model" in done.stderr
    # What deploys out of Git asks nobody: CI is red before the merge.
    assert "staging serves version 3, but" in make(project, "check-environments").stderr
    assert re.search("^check: .*check-environments", (project / "ci/ci.mk").read_text(), re.M)

    for target, source in (("staging", "dev"), ("production", "staging")):
        done = make(project, "promote", f"TO={target}")
        assert done.returncode == 0, done.stderr
        assert f"version 3 becomes 9, as {source} serves it" in done.stdout
        assert "RE-INDEX: dimensions 768 becomes 1024" in done.stdout
    done = subprocess.run(check, cwd=project, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert make(project, "check-environments").returncode == 0


@pytest.mark.parametrize("target", ["", "staging", "prod", "../k8s"])
def test_only_a_later_environment_can_be_promoted_to(target: str, render: Render) -> None:
    project = rendered(render, "staging production")
    before = tree(project)
    done = make(project, "promote", f"TO={target}")
    assert done.returncode != 0
    assert "Say which environment it moves to: TO=production\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(project) == before
