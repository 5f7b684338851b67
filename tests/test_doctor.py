"""`make doctor` on a real Kubernetes API server: what is there, what is not, and what mends it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests import kube_apiserver
from tests.conftest import Render, pinned
from tests.kube_apiserver import Cluster

MODEL = "BAAI/bge-base-en-v1.5"
ALL = {
    "replicas": "2",
    "components": ["monitoring", "gateway", "autoscaling-keda", "api-key", "ingress"],
    "mlflow_auth": "basic",
    "runtime_class_name": "nvidia",
    "image_pull_secret": "nodes",
    "ca_config_map": "company-ca",
}
DOCKER = """\
#!/bin/sh
[ "$1" != login ] || [ -e "$LOGGED_IN" ]
"""
CLASS = """\
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {{ name: {name}, annotations: {{ storageclass.kubernetes.io/is-default-class: "{default}" }} }}
provisioner: {provisioner}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with kube_apiserver.serving("v1.33.13") as found:
            yield found
    except kube_apiserver.Missing as missing:
        pytest.skip(str(missing))


@contextmanager
def answering(code: int, address: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server that answers everything with this code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"OK")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((address, 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


Doctor = Callable[..., tuple[int, dict[str, str], dict[str, str]]]


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path) -> Doctor:
    """`doctor(project)`: exit code, each line's state, and the command below it."""
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin/docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)

    def run(project: Path, user: str = "admin", **variables: str) -> Any:
        done = subprocess.run(
            ["make", "doctor"],
            cwd=project,
            text=True,
            capture_output=True,
            env={
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "KUBECONFIG": str(cluster.config(user)),
                "LOGGED_IN": str(tmp_path / "logged-in"),
                **variables,
            },
        )
        states: dict[str, str] = {}
        commands: dict[str, str] = {}
        text = ""
        for line in done.stdout.splitlines():
            if found := re.match(r"(ok|missing|not checkable) +(.*)", line):
                text = found[2]
                states[text] = found[1]
            elif line.startswith(" " * 15):
                commands[text] = line.strip()
        assert "Traceback" not in done.stderr, done.stderr
        missing = [text for text, state in states.items() if state == "missing"]
        assert (done.returncode != 0) == bool(missing), done.stdout + done.stderr
        assert set(missing) <= set(commands)
        return done.returncode, states, commands

    return run


def state(states: dict[str, str], words: str) -> str:
    [found] = [state for text, state in states.items() if words in text]
    return found


def projected(render: Render, namespace: str, **answers: Any) -> Path:
    given = {"open_to_everyone": True, "namespace": namespace, "project_name": "e5"} | answers
    return render(program=False, model_id=MODEL, pin=pinned(MODEL), **given)


EXPECTED_MISSING = (
    "a commit of this folder",
    "a login to the registry",
    "namespace whole",
    "StorageClass that is the default",
    "RuntimeClass nvidia",
    "a node with kubernetes.io/arch=arm64",
    "nvidia.com/gpu",
    "secret nodes",
    "secret e5-mlflow",
    "secret e5-api-key",
    "secret e5-tls",
    "configmap company-ca",
    "MLflow at http://mlflow.mlops.svc:5000",
)


TYPED = ("a commit", "namespace", "RuntimeClass", "secret e5-mlflow", "secret e5-api-key")
"""Whose commands have nothing to fill in."""


def test_what_is_missing_is_said_and_what_it_names_mends_it(
    cluster: Cluster, render: Render, doctor: Doctor, tmp_path: Path
) -> None:
    with answering(401) as port:
        project = projected(
            render,
            "whole",
            container_registry=f"127.0.0.1:{port}",
            mlflow_tracking_uri="http://mlflow.mlops.svc:5000",
            **ALL,
        )
        code, states, commands = doctor(project)
        assert {text: s for text, s in states.items() if s == "not checkable"} == {}
        for words in EXPECTED_MISSING:
            assert state(states, words) == "missing", words
        assert len([s for s in states.values() if s == "missing"]) == len(EXPECTED_MISSING)
        assert state(states, "ScaledObject of keda.sh/v1alpha1") == "ok"
        assert state(states, "you may deploy to whole") == "ok"

        # What can be typed as it stands is typed.
        environment = os.environ | {
            "KUBECONFIG": str(cluster.config("admin")),
            **{"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p$'\""},
            **{"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.com"},
            **{"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.com"},
        }
        for words in TYPED:
            [command] = [line for text, line in commands.items() if words in text][:1]
            done = subprocess.run(
                ["sh", "-c", command], cwd=project, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, (command, done.stderr)
        named = ("--namespace", "whole", "create")
        cluster.done(*named, "secret", "generic", "nodes", "--from-literal=a=b")
        cluster.done(*named, "secret", "generic", "e5-tls", "--from-literal=a=b")
        cluster.done(*named, "configmap", "company-ca", "--from-literal=ca.crt=b")
        fast = CLASS.format(name="fast", default="true", provisioner="driver.longhorn.io")
        cluster.done("create", "--filename=-", text=fast)
        gpu_node(cluster, "spark")
        (tmp_path / "logged-in").touch()
        with mlflow_inside(cluster):
            code, states, _ = doctor(project)
        assert {text: s for text, s in states.items() if s != "ok"} == {}
        assert code == 0
        assert len(states) > len(EXPECTED_MISSING) + 5
        secret = cluster.done("--namespace", "whole", "get", "secret", "e5-mlflow", "-ojson")
        assert set(json.loads(secret)["data"]) == {
            "MLFLOW_TRACKING_USERNAME",
            "MLFLOW_TRACKING_PASSWORD",
        }


def gpu_node(cluster: Cluster, name: str) -> None:
    labels = {"kubernetes.io/arch": "arm64", "kubernetes.io/os": "linux"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
    cluster.done("create", "--filename=-", text=json.dumps(node))
    offers = json.dumps({"status": {"allocatable": {"nvidia.com/gpu": "1"}}})
    cluster.done("patch", "node", name, "--subresource=status", f"--patch={offers}")


@contextmanager
def mlflow_inside(cluster: Cluster) -> Iterator[None]:
    """A Service with an endpoint behind it; the API server refuses endpoints on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; chooses this machine's own address
        except OSError:
            pytest.skip("this machine has no address but loopback's, where a Service may not lead")
        own = probe.getsockname()[0]
    with answering(200, own) as port:
        labels = {"kubernetes.io/service-name": "mlflow"}
        ports = [{"name": "http", "port": port}]
        at = {"namespace": "mlops", "name": "mlflow"}
        served = [{"name": "http", "port": 5000, "targetPort": port}]
        # The API server goes to no address that is not a pod's.
        behind = {"kind": "Pod", "namespace": "mlops", "name": "mlflow"}
        subset = [{"addresses": [{"ip": own, "targetRef": behind}], "ports": ports}]
        runs = {"containers": [{"name": "mlflow", "image": "mlflow"}]}
        objects = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "mlops"}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": at | {"name": "default"}},
            {"apiVersion": "v1", "kind": "Pod", "metadata": at, "spec": runs},
            {"apiVersion": "v1", "kind": "Service", "metadata": at, "spec": {"ports": served}},
            {"apiVersion": "v1", "kind": "Endpoints", "metadata": at, "subsets": subset},
            {
                **{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice"},
                **{"metadata": at | {"labels": labels}, "addressType": "IPv4"},
                **{"endpoints": [{"addresses": [own], "targetRef": behind}], "ports": ports},
            },
        ]
        for item in objects:
            made = cluster.kubectl("create", "--filename=-", text=json.dumps(item))
            assert made.returncode == 0, made.stderr
        runs_at = json.dumps({"status": {"podIP": own, "podIPs": [{"ip": own}]}})
        named = ("--namespace", "mlops", "patch", "pod", "mlflow")
        cluster.done(*named, "--subresource=status", f"--patch={runs_at}")
        yield


def test_rights_that_are_missing_are_named_and_given(
    cluster: Cluster, render: Render, doctor: Doctor
) -> None:
    """bob has nothing at all, then what the line tells an administrator to type."""
    project = projected(render, "bobs", components=["network-policy"])
    cluster.done("create", "namespace", "bobs")

    _, states, commands = doctor(project, user="bob")
    assert state(states, "namespace bobs: you may not look") == "not checkable"
    assert state(states, "the nodes: you may not look") == "not checkable"
    assert state(states, "StorageClass of the cluster: you may not look") == "not checkable"
    assert state(states, "MLflow at") == "not checkable"
    [lacking] = [text for text in states if "the right to deploy" in text]
    for resource in ("deployments.apps", "configmaps", "networkpolicies.networking.k8s.io"):
        assert resource in lacking
    environment = os.environ | {"KUBECONFIG": str(cluster.config("admin"))}
    subprocess.run(["sh", "-ec", commands[lacking]], check=True, env=environment)

    _, states, _ = doctor(project, user="bob")
    assert state(states, "you may deploy to bobs") == "ok"
    applied = cluster.kubectl("apply", "-k", project / "k8s", user="bob")
    assert applied.returncode == 0, applied.stderr


@pytest.mark.parametrize(
    ("provisioner", "replicas", "expected"),
    [
        ("rancher.io/local-path", "1", "ok"),
        ("rancher.io/local-path", "2", "missing"),
        ("ebs.csi.aws.com", "2", "missing"),
        ("nfs.csi.k8s.io", "2", "ok"),
        ("csi.example.com", "2", "not checkable"),
    ],
)
def test_a_storage_class_must_let_as_many_nodes_write_as_there_are(
    provisioner: str, replicas: str, expected: str, cluster: Cluster, render: Render, doctor: Doctor
) -> None:
    name = re.sub(r"\W", "-", f"{provisioner}-{replicas}")
    text = CLASS.format(name=name, default="false", provisioner=provisioner)
    cluster.done("create", "--filename=-", text=text)
    project = projected(render, name, replicas=replicas, storage_class=name)
    _, states, _ = doctor(project)
    assert state(states, f"StorageClass {name}") == expected

    project = projected(render, name, replicas=replicas, storage_class="nobody-has-it")
    _, states, commands = doctor(project)
    [gone] = [text for text in states if text.startswith("StorageClass nobody-has-it")]
    assert states[gone] == "missing"
    assert name in gone
    assert "storage_class" in commands[gone]


def test_a_store_s_claim_and_a_kind_that_is_not_installed_are_missing(
    cluster: Cluster, render: Render, doctor: Doctor
) -> None:
    project = projected(
        render, "elsewhere", model_storage="mount", components=["gateway"], replicas="2",
        mlflow_tracking_uri="https://mlflow.example.com",
    )  # fmt: skip
    cluster.done("delete", "crd", "httproutes.gateway.networking.k8s.io")
    _, states, commands = doctor(project)
    [kind] = [
        text for text in states if text.startswith("HTTPRoute of gateway.networking.k8s.io/v1")
    ]
    assert states[kind] == "missing"
    assert "gateway-api/releases/download/v1.3.0/standard-install.yaml" in commands[kind]
    assert state(states, "the claim mlflow-artifacts of MLflow's store") == "missing"
    assert state(states, "mlflow.example.com from inside: it is no Service") == "not checkable"


@pytest.mark.parametrize(
    ("config", "expected"),
    [("", "a cluster in kubectl's context"), ("closed", "an answer of https://127.0.0.1:9")],
)
def test_without_a_cluster_that_is_what_is_missing(
    config: str, expected: str, cluster: Cluster, render: Render, doctor: Doctor, tmp_path: Path
) -> None:
    written = cluster.config("admin").read_text() if config else ""
    (tmp_path / "config").write_text(re.sub(r"127.0.0.1:\d+", "127.0.0.1:9", written))
    code, states, _ = doctor(projected(render, "none"), KUBECONFIG=str(tmp_path / "config"))
    assert state(states, expected) == "missing"
    assert code != 0


def test_without_kubectl_that_is_what_is_missing(
    render: Render, doctor: Doctor, tmp_path: Path
) -> None:
    for name in ("make", "python3", "git", "sh"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    _, states, _ = doctor(projected(render, "none"), PATH=f"{tmp_path}/bin")
    assert state(states, "kubectl, without which") == "missing"


def test_what_kubectl_repeats_of_a_server_stays_text(
    render: Render, doctor: Doctor, tmp_path: Path
) -> None:
    kubectl = tmp_path / "bin/kubectl"
    kubectl.write_text(
        "#!/bin/sh\ncase $2 in config) echo https://there ;; esac\n"
        "printf 'said \\033[2J this' >&2\nexit 1\n"
    )
    kubectl.chmod(0o755)
    _, states, _ = doctor(projected(render, "none"))
    assert any("said" in text for text in states)
    assert not any(c in text for text in states for c in "\x1b\r")


@pytest.mark.parametrize(("code", "expected"), [(200, "asks for no login"), (503, "answers 503")])
def test_a_registry_without_a_login_and_one_that_is_none(
    code: int, expected: str, render: Render, doctor: Doctor
) -> None:
    with answering(code) as port:
        project = projected(render, "none", container_registry=f"127.0.0.1:{port}/team")
        _, states, _ = doctor(project)
    assert state(states, expected) == ("ok" if code == 200 else "not checkable")
