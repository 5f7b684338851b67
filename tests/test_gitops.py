"""Argo CD, Flux and External Secrets: their own schemas on a real API server, and what rights it takes.

The controllers themselves do not run here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import kube_apiserver
from tests.conftest import Run
from tests.kube_apiserver import Cluster

MODEL = "BAAI/bge-base-en-v1.5"
VERSION = os.environ.get("KUBE_VERSIONS", "v1.33.13").split()[0]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"accelerator": "cpu"},
    "all": {
        "accelerator": "l4",
        "mlflow_auth": "token",
        "replicas": "2",
        "secret_store": "ClusterSecretStore/vault",
        "components": [
            *("monitoring", "autoscaling-keda", "gateway", "network-policy", "api-key"),
            "external-secrets",
        ],
    },
}
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}

Render = Callable[..., Path]
PinOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(kube_apiserver.serving(VERSION, kube_apiserver.GITOPS))
        except kube_apiserver.Missing as missing:
            pytest.skip(str(missing))
        found.done("create", "namespace", "argocd")
        yield found


@pytest.fixture
def repository(render: Render, pin_of: PinOf) -> Callable[..., Path]:
    def made(shape: str, gitops: str, namespace: str = "e5", environments: str = "") -> Path:
        own = {"gitops": gitops, "namespace": namespace, "project_name": "e5"}
        own |= {"environments": environments}
        return render(program=False, model_id=MODEL, pin=pin_of(MODEL), **SHAPES[shape] | own)

    return made


def objects(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize("shape", SHAPES)
def test_argo_cd_takes_what_is_rendered(
    shape: str, cluster: Cluster, repository: Callable[..., Path]
) -> None:
    here = f"argo-{shape}"
    cluster.done("create", "namespace", here)
    folder = repository(shape, "argocd", here)
    file = folder / "gitops/argocd.yaml"
    cluster.done("apply", "--validate=strict", "-f", file)
    [application] = objects(file.read_text())
    assert application["metadata"]["namespace"] == "argocd"
    assert application["spec"]["destination"]["namespace"] == here

    path = folder / application["spec"]["source"]["path"]
    built = objects(cluster.done("kustomize", path))
    jobs = [item for item in built if item["kind"] == "Job"]
    assert [job["metadata"]["annotations"] for job in jobs] == [
        {
            "argocd.argoproj.io/hook": "PostSync",
            "argocd.argoproj.io/hook-delete-policy": "BeforeHookCreation",
        }
    ]
    assert not CLUSTER_WIDE & {item["kind"] for item in built}
    assert {item["metadata"]["namespace"] for item in built} == {here}
    assert objects(cluster.done("kustomize", folder / "k8s")) == [
        item
        for item in built
        if item["kind"] != "Job" and "expected.json" not in item.get("data", {})
    ]
    cluster.done("apply", "--validate=strict", "--server-side", "-k", path)


@pytest.mark.parametrize("shape", SHAPES)
def test_flux_needs_the_namespace_alone(
    shape: str, cluster: Cluster, repository: Callable[..., Path]
) -> None:
    here = f"flux-{shape}"
    cluster.done("create", "namespace", here)
    folder = repository(shape, "flux", here)
    file = folder / "gitops/flux.yaml"
    cluster.done("apply", "--validate=strict", "-f", file)
    made = objects(file.read_text())
    assert {item["metadata"]["namespace"] for item in made} == {here}
    assert not CLUSTER_WIDE & {item["kind"] for item in made}
    service, smoke = [item for item in made if item["kind"] == "Kustomization"]
    assert smoke["spec"]["dependsOn"] == [{"name": service["metadata"]["name"]}]

    # What its ServiceAccount may do: all that is to be deployed, and nothing elsewhere.
    name = f"{here}:{service['spec']['serviceAccountName']}"
    account = f"--as=system:serviceaccount:{name}"
    [admin] = [b for b in made if b.get("roleRef", {}).get("kind") == "ClusterRole"]
    assert admin["roleRef"]["name"] == "admin"
    for part in ("admin", "edit", "view"):  # a controller puts `admin` together, and none runs here
        role = f"--clusterrole=system:aggregate-to-{part}"
        cluster.done("-n", here, "create", "rolebinding", part, role, f"--serviceaccount={name}")
    for item in (service, smoke):
        path = folder / item["spec"]["path"]
        cluster.done("apply", account, "--validate=strict", "--server-side", "-k", path)
        left = cluster.kubectl("delete", account, "--wait=false", "-k", path)
        assert left.returncode == 0, left.stderr
    for words in (
        ("create", "namespaces"),
        ("get", "secrets", "--namespace=kube-system"),
        ("create", "deployments.apps", "--namespace=argocd"),
        ("create", "clusterroles.rbac.authorization.k8s.io"),
    ):
        assert cluster.kubectl("auth", "can-i", *words, account).stdout == "no\n", words


@pytest.mark.parametrize("environments", ["staging production", "dev test live"])
@pytest.mark.parametrize("gitops", ["argocd", "flux"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_environment_is_deployed_into_its_own_namespace(
    shape: str, gitops: str, environments: str, cluster: Cluster, repository: Callable[..., Path]
) -> None:
    here = f"{gitops}-{shape}-{len(environments)}"
    folder = repository(shape, gitops, here, environments)
    names = environments.split()
    assert sorted(p.name for p in (folder / "gitops").iterdir()) == sorted(names)
    called = set()
    for name in names:
        own = here if name == names[-1] else f"{here}-{name}"
        cluster.done("create", "namespace", own)
        file = folder / f"gitops/{name}/{gitops}.yaml"
        assert f"kubectl apply -f gitops/{name}/{gitops}.yaml" in file.read_text()
        cluster.done("apply", "--validate=strict", "-f", file)
        made = objects(file.read_text())
        if gitops == "argocd":
            assert made[0]["spec"]["destination"]["namespace"] == own
            called.add(made[0]["metadata"]["name"])
            built = objects(cluster.done("kustomize", folder / made[0]["spec"]["source"]["path"]))
        else:
            assert {item["metadata"]["namespace"] for item in made} == {own}
            called.add(own)
            service, smoke = [item["spec"] for item in made if item["kind"] == "Kustomization"]
            assert smoke["targetNamespace"] == own
            built = objects(cluster.done("kustomize", folder / service["path"]))
            # kubectl's --namespace does what Flux's targetNamespace does: these name none themselves.
            job = objects(cluster.done("kustomize", folder / smoke["path"]))
            assert not any("namespace" in item["metadata"] for item in job)
            cluster.done("apply", "--namespace", own, "-k", folder / smoke["path"])
        assert {item["metadata"]["namespace"] for item in built} == {own}
        deployed = objects(cluster.done("kustomize", folder / "overlays" / name))
        assert [i for i in deployed if i not in built] == []
        assert {i["kind"] for i in built if i not in deployed} <= {"Job", "ConfigMap"}
    assert len(called) == len(names)


def test_every_secret_is_brought(cluster: Cluster, repository: Callable[..., Path]) -> None:
    """Whatever a pod must have is the target of an ExternalSecret, with the key that is read."""
    built = objects(cluster.done("kustomize", repository("all", "none") / "k8s"))
    brought = {i["metadata"]["name"] for i in built if i["kind"] == "ExternalSecret"}
    [pod] = [i["spec"]["template"]["spec"] for i in built if i["kind"] == "Deployment"]
    wanted = set()
    for container in (*pod["initContainers"], *pod["containers"]):
        for source in container.get("envFrom", []):
            wanted |= {source["secretRef"]["name"]} if "secretRef" in source else set()
        for variable in container.get("env", []):
            found = variable.get("valueFrom", {}).get("secretKeyRef")
            wanted |= {found["name"]} if found else set()
    assert brought == wanted == {"e5-mlflow", "e5-api-key"}
    stores = [i["spec"]["secretStoreRef"] for i in built if i["kind"] == "ExternalSecret"]
    assert stores == [{"kind": "ClusterSecretStore", "name": "vault"}] * 2


def test_an_unknown_field_would_be_refused(
    cluster: Cluster, repository: Callable[..., Path]
) -> None:
    """So that passing means something."""
    for gitops in ("argocd", "flux"):
        text = (repository("plain", gitops, "argocd") / f"gitops/{gitops}.yaml").read_text()
        wrong = text.replace("prune: true", "prunes: true")
        assert wrong != text
        done = cluster.kubectl(
            "apply", "--dry-run=server", "--validate=strict", "-f", "-", text=wrong
        )
        assert "unknown field" in done.stderr


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["gitops=argocd", "platform=thinkube"], "Thinkube deploys with an Argo CD of its own"),
        (["gitops=helm"], "gitops: 'helm' is not one of none, argocd, flux."),
        (["gitops=flux", "git_url=https://me:secret@git.example.com/x.git"], "without a login"),
        (["gitops=flux", "git_url=git@github.com:acme/x.git"], "git_url: what was given"),
        (["components=[external-secrets]"], "external-secrets has nothing to bring"),
        (["secret_store=Vault/x"], "secret_store: 'Vault/x' is not a store"),
        (["ci=jenkins"], "ci: 'jenkins' is not one of none, github, gitlab."),
    ],
)
def test_answers_that_cannot_be(
    answers: list[str], said: str, copier_copy: Callable[..., Run], pin_of: PinOf
) -> None:
    done = copier_copy(f"model_id={MODEL}", f"pin={json.dumps(pin_of(MODEL))}", *answers)
    assert done.code == 1
    assert said in done.error
    assert "secret@" not in done.error
    assert not done.target.exists()


@pytest.mark.parametrize(
    "url", ["ssh://git@git.example.com:2222/acme/x.git", "https://git.example.com/acme/x"]
)
def test_addresses_of_git(url: str, render: Render, pin_of: PinOf) -> None:
    folder = render(program=False, model_id=MODEL, pin=pin_of(MODEL), gitops="argocd", git_url=url)
    [application] = objects((folder / "gitops/argocd.yaml").read_text())
    assert application["spec"]["source"]["repoURL"] == url
