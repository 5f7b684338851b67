"""What is rendered, as a real Kubernetes API server takes it: newest and oldest version promised.

Each repository is checked, applied, compared, applied again, moved to another pin, handed over to
server-side apply and deleted, in a namespace that enforces the Pod Security Standard `restricted`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import kube_apiserver
from tests.kube_apiserver import Cluster

ROOT = Path(__file__).parent.parent
VERSIONS = tuple(os.environ.get("KUBE_VERSIONS", "v1.33.13 v1.30.14").split())
"""docs/operate.md promises the older one."""

MODEL = "BAAI/bge-base-en-v1.5"
ALL = [
    *("monitoring", "gateway", "network-policy", "api-key", "gpu-toleration", "playground"),
    "external-secrets",
]
SHAPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cpu": {"accelerator": "cpu"},
    "cpu-hpa": {
        "accelerator": "cpu",
        "components": ["monitoring", "autoscaling-hpa", "network-policy", "api-key", "ingress"],
        "ingress_class": "nginx",
        "tls_issuer": "letsencrypt",
        "allowed_namespaces": "apps web",
    },
    "l4-keda": {
        "accelerator": "l4",
        "replicas": "2",
        "components": [*ALL, "autoscaling-keda", "ingress"],
        "prometheus_labels": "release=kube-prometheus-stack",
        "ca_config_map": "company-ca",
        "image_pull_secret": "registry",
        "proxy": "http://proxy.example.com:3128",
    },
    "gb10-hpa": {
        "components": [*ALL, "autoscaling-hpa"],
        "mlflow_auth": "keycloak",
        "runtime_class_name": "nvidia",
        "storage_class": "longhorn",
        "gateway_listener": "infra/shared",
    },
    "h100-mount": {
        "accelerator": "h100",
        "replicas": "2",
        "model_storage": "mount",
        "mlflow_auth": "token",
        "components": ["network-policy"],
    },
    "official": {
        "accelerator": "l4",
        "model_storage": "ephemeral",
        "mlflow_auth": "basic",
        "tei_image": "official",
    },
}
ALWAYS_PATCHED = {"PodDisruptionBudget"}
"""Kubernetes' own habit: its selector has the patch strategy `replace`."""

Render = Callable[..., Path]
PinOf = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", params=VERSIONS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            found = stack.enter_context(kube_apiserver.serving(request.param))
        except kube_apiserver.Missing as missing:
            pytest.skip(str(missing))
        yield found


def namespace(cluster: Cluster, name: str) -> str:
    """A namespace in which `restricted` is enforced, and told of whatever would not be."""
    levels = [
        f"pod-security.kubernetes.io/{kind}=restricted" for kind in ("enforce", "warn", "audit")
    ]
    cluster.done("create", "namespace", name)
    cluster.done("label", "namespace", name, *levels)
    return name


def outcomes(text: str) -> dict[str, str]:
    """What kubectl apply says, by object: created, configured, unchanged."""
    return dict(line.split(" ")[:2] for line in text.splitlines())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_repository_lives_its_life(
    shape: str, cluster: Cluster, render: Render, pin_of: PinOf
) -> None:
    here = namespace(cluster, shape)
    given = SHAPES[shape] | {"open_to_everyone": True}
    folder = render(
        program=False, model_id=MODEL, pin=pin_of(MODEL), namespace=here, project_name="e5", **given
    )
    objects = folder / "k8s"
    cluster.done("apply", "--dry-run=server", "--validate=strict", "-k", objects)
    assert set(outcomes(cluster.done("apply", "-k", objects)).values()) == {"created"}
    for _ in range(2):
        assert cluster.done("diff", "-k", objects) == ""
    again = outcomes(cluster.done("apply", "-k", objects))
    changed = {name for name, what in again.items() if what != "unchanged"}
    assert {name.partition(".")[0].lower() for name in changed} <= {
        kind.lower() for kind in ALWAYS_PATCHED
    }
    the_pods_are_admitted(cluster, here)

    pin = objects / "base/pin.json"
    pin.write_text(pin.read_text().replace('"version": "3"', '"version": "4"'))
    cluster.done("apply", "--dry-run=server", "--validate=strict", "-k", objects)
    moved = outcomes(cluster.done("apply", "-k", objects))
    assert {n.partition("/")[0] for n, what in moved.items() if what == "created"} == {"configmap"}
    assert {n.partition("/")[0] for n, what in moved.items() if what == "configured"} - {
        "poddisruptionbudget.policy"
    } == {"deployment.apps"}
    assert cluster.done("diff", "-k", objects) == ""

    # Flux, Argo CD or a colleague takes over: without a conflict, and nothing changes.
    cluster.done("apply", "--server-side", "-k", objects)
    assert cluster.done("diff", "--server-side", "-k", objects) == ""

    cluster.done("delete", "--wait=false", "-k", objects)
    left = json.loads(
        cluster.done(
            *(
                "--namespace",
                here,
                "get",
                "--output=json",
                "--selector=app.kubernetes.io/part-of=e5",
            ),
            "deployments,services,serviceaccounts,configmaps,networkpolicies,ingresses,"
            "poddisruptionbudgets,horizontalpodautoscalers,httproutes,podmonitors,prometheusrules,"
            "scaledobjects,externalsecrets",
        )
    )["items"]
    assert [item["kind"] for item in left] == ["ConfigMap"]  # of the earlier pin: README "Remove"
    cluster.done(
        "--namespace", here, "delete", "configmap", "--selector=app.kubernetes.io/part-of=e5"
    )


def the_pods_are_admitted(cluster: Cluster, here: str) -> None:
    """`restricted` is enforced on pods alone, and nothing makes one here: so ask for each."""
    found = cluster.done("--namespace", here, "get", "deployments", "--output=json")
    for deployment in json.loads(found)["items"]:
        admitted(cluster, here, deployment["spec"]["template"])


def admitted(cluster: Cluster, here: str, template: dict[str, Any]) -> None:
    template["spec"].pop("runtimeClassName", None)  # a class of that name must be there for it
    pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "spec": template["spec"]}
    pod["metadata"] = {"name": "asked", "labels": template["metadata"]["labels"]}
    command = ("--namespace", here, "apply", "--dry-run=server", "-f", "-")
    cluster.done(*command, text=json.dumps(pod))
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    refused = cluster.kubectl(*command, text=json.dumps(pod))
    assert 'violates PodSecurity "restricted' in refused.stderr


@pytest.mark.parametrize(
    "change",
    [{"storage_class": "longhorn"}, {"replicas": "2"}, {"components": ["monitoring", "ingress"]}],
    ids=lambda change: next(iter(change)),
)
def test_another_answer_can_be_applied(
    change: dict[str, Any], cluster: Cluster, render: Render, pin_of: PinOf
) -> None:
    here = namespace(cluster, f"change-{next(iter(change)).replace('_', '-')}")
    given = {"accelerator": "cpu", "open_to_everyone": True, "namespace": here}
    given |= {"model_id": MODEL, "pin": pin_of(MODEL), "program": False}
    cluster.done("apply", "-k", render(**given) / "k8s")
    after = render(**given | change) / "k8s"
    cluster.done("apply", "-k", after)
    assert cluster.done("diff", "-k", after) == ""


def test_jobs_beside_the_service_are_valid(cluster: Cluster, render: Render, pin_of: PinOf) -> None:
    here = namespace(cluster, "jobs")
    folder = render(program=False, model_id=MODEL, pin=pin_of(MODEL), namespace=here)
    cluster.done("apply", "--dry-run=server", "--validate=strict", "-k", folder / "smoke")
    cluster.done("create", "namespace", f"{here}-build")  # not `restricted`: README of images/tei
    cluster.done("apply", "--dry-run=server", "--validate=strict", "-k", folder / "k8s/build")


def test_two_services_share_a_namespace(cluster: Cluster, render: Render, pin_of: PinOf) -> None:
    """As queries and passages of one model do: nothing of one is the other's."""
    here = namespace(cluster, "shared")
    given = SHAPES["l4-keda"] | {"model_id": MODEL, "pin": pin_of(MODEL), "namespace": here}
    names = ("queries", "passages")
    first, second = (render(program=False, project_name=name, **given) for name in names)
    for folder in (first, second):
        for part in ("k8s", "smoke"):
            assert set(outcomes(cluster.done("apply", "-k", folder / part)).values()) == {"created"}
    assert cluster.done("diff", "-k", first / "k8s") == ""
    for part in ("k8s", "smoke"):
        cluster.done("delete", "--wait=false", "-k", first / part)
    assert cluster.done("diff", "-k", second / "k8s") == ""
    assert cluster.done("diff", "-k", second / "smoke") == ""


def test_what_keeps_the_build_from_starting_is_said(cluster: Cluster) -> None:
    here, started = "no-builds", ROOT / "template/{{objects_folder}}/build/started.sh"
    cluster.done("create", "namespace", here)
    job = {"name": "e5-tei-build", "namespace": here}

    def event(kind: str, name: str, reason: str, message: str) -> None:
        given = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}.{reason.lower()}", "namespace": here},
            "involvedObject": {"kind": kind, "name": name, "namespace": here},
            "reason": reason,
            "message": message,
            "type": "Warning",
            "lastTimestamp": "2026-11-28T19:00:00Z",
        }
        cluster.done("create", "-f", "-", text=json.dumps(given))

    def said() -> tuple[int, str]:
        done = subprocess.run(
            ["sh", started, here, job["name"]],
            env=os.environ | {"KUBECONFIG": str(cluster.config("admin")), "JOB_POLL_SECONDS": "0"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    event("Job", job["name"], "FailedCreate", 'violates PodSecurity "restricted"')
    code, text = said()
    assert code == 1
    assert 'FailedCreate: violates PodSecurity "restricted"' in text

    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a-pod", "namespace": here, "labels": {"job-name": job["name"]}},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [{"name": "buildkit", "image": "buildkit"}],
        },
    }
    account = {"apiVersion": "v1", "kind": "ServiceAccount"}  # a controller would make it
    account["metadata"] = {"name": "default", "namespace": here}  # type: ignore[assignment]
    cluster.done("create", "-f", "-", text=json.dumps(account))
    cluster.done("create", "-f", "-", text=json.dumps(pod))
    event("Pod", "a-pod", "Pulling", "Pulling image")
    code, text = said()
    assert code == 0
    assert "Pulling: Pulling image" in text

    running = ("patch", "pod", "a-pod", "--subresource=status", "--type=merge")
    cluster.done("--namespace", here, *running, "--patch", '{"status": {"phase": "Running"}}')
    assert said() == (0, "")


@pytest.mark.parametrize("shape", ["defaults", "cpu-hpa", "gb10-hpa", "l4-keda"])
def test_the_job_that_fetches_before_a_rollout_is_admitted(
    shape: str, cluster: Cluster, render: Render, pin_of: PinOf
) -> None:
    here = namespace(cluster, f"prefetch-{shape}")
    given = SHAPES[shape] | {"open_to_everyone": True}
    folder = render(program=False, model_id=MODEL, pin=pin_of(MODEL), namespace=here, **given)
    created = cluster.done("create", "--dry-run=client", "--output=json", "-k", folder / "k8s")
    made = subprocess.run(
        [sys.executable, folder / "scripts/prefetch.py"],
        input=created,
        capture_output=True,
        text=True,
        check=True,
    )
    kinds = [item["kind"] for item in json.loads(made.stdout)["items"]]
    assert sorted(kinds) == ["ConfigMap", "Job", "PersistentVolumeClaim", "ServiceAccount"]
    cluster.done("apply", "-f", "-", text=made.stdout)
    job = json.loads(made.stdout)["items"][-1]
    admitted(cluster, here, job["spec"]["template"])
    # The rollout then finds everything as it wants it, and sends no request to the Job's pod.
    cluster.done("apply", "-k", folder / "k8s")
    found = cluster.done("--namespace", here, "get", "service", "text-embeddings", "-ojson")
    selector = json.loads(found)["spec"]["selector"].items()
    assert not selector <= job["spec"]["template"]["metadata"]["labels"].items()


def test_whoever_has_the_namespace_alone_can_deploy(
    cluster: Cluster, render: Render, pin_of: PinOf
) -> None:
    """`admin` by a RoleBinding: namespaces can be neither created nor changed."""
    here = namespace(cluster, "tenant")
    for part in ("admin", "edit", "view"):  # `admin` itself is put together by a controller
        role = f"--clusterrole=system:aggregate-to-{part}"
        cluster.done("--namespace", here, "create", "rolebinding", part, role, "--user=bob")
    folder = render(program=False, model_id=MODEL, pin=pin_of(MODEL), namespace=here)
    environment = os.environ | {"KUBECONFIG": str(cluster.config("bob"))}
    made = subprocess.run(
        ["make", "namespace"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    applied = cluster.kubectl("apply", "-k", folder / "k8s", user="bob")
    assert applied.returncode == 0, applied.stderr
    assert "Warning" not in made.stderr + applied.stderr


def test_the_oldest_version_is_the_one_that_is_promised() -> None:
    promised = re.search(r"Kubernetes (1\.\d+) or newer", (ROOT / "docs/operate.md").read_text())
    assert promised
    assert "KUBE_VERSIONS" in os.environ or any(
        version.startswith(f"v{promised[1]}.") for version in VERSIONS
    )
