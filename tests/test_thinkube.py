"""Thinkube renders, redeploys and deploys the template as it is, with its own command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from copier.errors import UserMessageError

from extensions import catalog
from tests import thinkube
from tests.conftest import ROOT, Render, pinned

IDENTITY = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]


@dataclass(frozen=True)
class Backend:
    """The machine that thinkube-control runs on, and where it finds the template."""

    home: Path
    url: str

    def copier(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "NO_COLOR": "1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "copier", *arguments],
            env=environment | variables,
            cwd=self.home,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def url(template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The template as a repository with a released version, at an address with a prefix to trust."""
    folder = tmp_path_factory.mktemp("hub") / "thinkube" / "tkt-text-embeddings.git"
    program = shutil.ignore_patterns("model_fetch", "tests")  # the same for all answers
    shutil.copytree(template, folder, symlinks=True, ignore=program)
    for step in (
        ["init", "--quiet"],
        ["add", "--all"],
        ["commit", "-qm", "one"],
        ["tag", "v1.0.0"],
    ):
        subprocess.run(["git", *IDENTITY, *step], cwd=folder, check=True)
    return f"git+file://{folder}"


@pytest.fixture
def backend(tmp_path: Path, url: str) -> Backend:
    """One whose operator has trusted the template's owner, as docs/thinkube-control.md says."""
    settings = tmp_path / "home/.config/copier/settings.yml"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'trust: ["{url.rpartition("/")[0]}/"]\n')
    return Backend(tmp_path / "home", url)


def test_the_platform_s_own_call_renders_a_deployment(backend: Backend, tmp_path: Path) -> None:
    project = tmp_path / "apps" / "text-embeddings"
    result = backend.copier(*thinkube.copy(backend.url, project))
    assert result.returncode == 0, result.stderr

    stored = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert stored["platform"] == "thinkube"
    assert stored["thinkube_deployment"] == "component"
    assert stored["container_registry"] == "registry.spark.example.net"
    assert stored["mlflow_auth"] == "keycloak"
    thinkube.check(project, stored)
    for path in (path for path in project.rglob("*") if path.is_file()):
        for secret in thinkube.SECRETS.values():
            assert secret.encode() not in path.read_bytes(), path
    for secret in thinkube.SECRETS.values():
        assert secret not in result.stdout + result.stderr


def test_an_app_of_another_name_is_reachable_by_itself(backend: Backend, tmp_path: Path) -> None:
    result = backend.copier(*thinkube.copy(backend.url, tmp_path / "search", project_name="search"))
    assert result.returncode == 0, result.stderr

    stored = yaml.safe_load((tmp_path / "search/.copier-answers.yml").read_text())
    assert stored["thinkube_deployment"] == "app"
    thinkube.check(tmp_path / "search", stored)


@pytest.mark.parametrize("named", ["by home", "by variable"])
def test_trust_comes_from_the_settings_file_alone(
    backend: Backend, tmp_path: Path, named: str
) -> None:
    settings = backend.home / ".config/copier/settings.yml"
    variables = {}
    if named == "by variable":
        settings = settings.rename(tmp_path / "settings.yml")
        variables = {"COPIER_SETTINGS_PATH": str(settings)}
    trusted = backend.copier(*thinkube.copy(backend.url, tmp_path / "yes"), **variables)
    assert trusted.returncode == 0, trusted.stderr

    settings.write_text(settings.read_text().replace("thinkube/", "others/"))
    refused = backend.copier(*thinkube.copy(backend.url, tmp_path / "no"), **variables)
    assert refused.returncode == 4
    assert "potentially unsafe feature: jinja_extensions" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_a_wrong_model_stops_the_deploy_with_one_line(backend: Backend, tmp_path: Path) -> None:
    """The platform shows no more than one line of what Copier says."""
    result = backend.copier(*thinkube.copy(backend.url, tmp_path / "no", model_id="no such model"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "model_id" in result.stderr
    assert not (tmp_path / "no").exists()


def test_a_redeploy_leaves_the_platform_s_files_alone(backend: Backend, tmp_path: Path) -> None:
    project = tmp_path / "text-embeddings"
    call = thinkube.copy(backend.url, project)
    assert backend.copier(*call).returncode == 0
    ours = contents(project)
    written = thinkube.write_manifests(project)
    (project / "k8s/.argocd-source.yaml").write_text("{}\n")  # somebody has turned it off

    result = backend.copier(*call)

    assert result.returncode == 0, result.stderr
    now = contents(project)
    assert {path: now[path] for path in written} == written
    assert now["k8s/.argocd-source.yaml"] == "{}\n"
    ours["k8s/.argocd-source.yaml"] = "{}\n"
    assert {path: text for path, text in now.items() if path not in written} == ours


def contents(project: Path) -> dict[str, str]:
    return {
        str(path.relative_to(project)): path.read_text()
        for path in project.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("shape", ["component", "app"])
def test_argo_cd_adds_what_the_platform_s_deployment_lacks(
    render: Render, tmp_path: Path, shape: str
) -> None:
    """As Argo CD does: what .argocd-source.yaml says is added to the platform's kustomization."""
    project = tmp_path / "text-embeddings"
    render(project, program=False, platform="thinkube", thinkube_deployment=shape)
    thinkube.write_manifests(project, model_id="a/model")

    deployment = thinkube.applied(project)

    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "fsGroup" not in pod["securityContext"]  # kubelet would re-group MLflow's whole store
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["image"].startswith("registry.spark.example.net/thinkube/")
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"/mlflow-models", "/tmp", "/cache", "/model"}
    assert {volume["name"] for volume in pod["volumes"]} == {
        *("mlflow-models", "tmp", "cache", "model")
    }
    startup = container["startupProbe"]
    if shape == "app":
        assert startup["httpGet"] == {"path": "/ready", "port": 7860}
        assert startup["initialDelaySeconds"] == 0
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"
        assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 15
        assert pod["terminationGracePeriodSeconds"] >= 80
    else:
        assert startup["httpGet"]["path"] == "/health"
        assert "lifecycle" not in container  # a pod that ends still counts for the gateway
        assert 60 < pod["terminationGracePeriodSeconds"] < 80


def test_the_llm_gateway_s_model_is_the_only_one(render: Render, tmp_path: Path) -> None:
    """However models follow each other: after a failed load, too, whose Deployment is kept."""
    project = render(tmp_path / "text-embeddings", program=False, platform="thinkube")
    thinkube.write_manifests(project, model_id="the/form-s", ansible_user="x")
    gateway = thinkube.LlmGateway(thinkube.applied(project))
    for model in ("the/form-s", "an/other", "the/form-s", "an/other", "an/other"):
        gateway.load(model)
        assert gateway.models == [model]
        gateway.unload()


def test_the_form_offers_the_platform_s_own_models() -> None:
    manifest = yaml.safe_load((ROOT / "manifest.yaml").read_text())
    thinkube.check_manifest(manifest)
    (model,) = manifest["parameters"]
    assert model["name"] == "model_id"
    assert model["dynamic_source"] == "model_catalog"
    assert model["filter"] == {"server_type": "text-embeddings", "is_downloaded": True}
    assert set(model["choices"]) <= set(catalog.load())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert manifest["metadata"]["version"] == version


def test_the_llm_gateway_counts_as_many_models_as_the_quota_s_cpus_hold(render: Render) -> None:
    (container,) = described(render(program=False, platform="thinkube"))["spec"]["containers"]
    assert container["size"] == "large"  # 2 of the namespace's 8 CPUs


def described(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((project / "thinkube.yaml").read_text())
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"project_name": "search", "thinkube_deployment": "component"},
        "the LLM gateway looks for a component called text-embeddings",
    ),
    (
        {"project_name": "search", "namespace": "search", "deployment_type": "component"},
        "the LLM gateway looks for a component called text-embeddings",
    ),
    ({"accelerator": "cpu"}, "answer the GPU that the cluster has"),
    ({"deployment_type": "component", "accelerator": "cpu"}, "or thinkube_deployment=app"),
    ({"project_name": "search", "replicas": "3"}, "answer replicas=2"),
    ({"project_name": "search", "replicas": "2", "accelerator": "l4"}, "answer replicas=1"),
    ({"project_name": "search", "parameters": 8_000_000_000}, "largest container has 16"),
]


@pytest.mark.parametrize(("answers", "said"), REFUSED)
def test_what_the_platform_cannot_hold_is_refused(
    render: Render, tmp_path: Path, answers: dict[str, Any], said: str
) -> None:
    pin = pinned("BAAI/bge-base-en-v1.5")
    given = dict(answers)
    pin["facts"]["parameters"] = given.pop("parameters", pin["facts"]["parameters"])
    with pytest.raises(UserMessageError) as refused:
        render(tmp_path / "no", platform="thinkube", model_id=pin["model_id"], pin=pin, **given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "no").exists()


BASES = [
    ("gb10", {}, "${CONTAINER_REGISTRY}/library/text-embeddings-base:latest"),
    ("l4", {}, "${CONTAINER_REGISTRY}/library/text-embeddings-base:latest"),
    ("gb10", {"tei_image": "build"}, "registry.example.com/text-embeddings-tei:0d124dc9773b-gb10"),
    ("gh200", {}, "registry.example.com/text-embeddings-tei:0d124dc9773b-gh200"),
    ("t4", {}, "ghcr.io/huggingface/text-embeddings-inference:turing-1.9.4"),
]


@pytest.mark.parametrize(("accelerator", "answers", "base"), BASES)
def test_the_image_starts_from_what_the_pipeline_has(
    render: Render, accelerator: str, answers: dict[str, Any], base: str
) -> None:
    project = render(program=False, platform="thinkube", accelerator=accelerator, **answers)
    assert f"ARG BASE_IMAGE={base}\n" in (project / "images/Dockerfile").read_text()
