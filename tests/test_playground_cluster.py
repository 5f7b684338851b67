"""The page behind the route of a cluster, and beside the service on one machine."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from copier.errors import UserMessageError

from demo.registry import free_port
from extensions import edge
from tests.conftest import Render, pinned
from tests.tei_stub.server import Stub
from tests.tei_stub.server import serving as stub
from tests.test_kubernetes import build

MODEL = "nomic-ai/nomic-embed-text-v1.5"
COMPONENTS = ["playground", "api-key", "network-policy", "gpu-toleration", "autoscaling-hpa"]


def rendered(render: Render, *components: str, **answers: Any) -> Path:
    given = {"model_id": MODEL, "pin": pinned(MODEL), "open_to_everyone": True} | answers
    return render(program=False, components=list(components), **given)


def of(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


@pytest.mark.parametrize("routed", ["gateway", "ingress"])
@pytest.mark.parametrize("platform", ["kubernetes", "thinkube"])
def test_the_page_is_routed_beside_the_api_and_gets_nothing_of_it(
    render: Render, routed: str, platform: str
) -> None:
    shape = {"platform": platform, "project_name": "search", "accelerator": "l4"}
    project = rendered(render, routed, "monitoring", *COMPONENTS, **shape)
    objects = build(project / ("k8s" if platform == "kubernetes" else "deploy"))
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for mine in (o for o in objects if o["metadata"]["name"].startswith("search-page")):
        validate.validate(mine, "1.30", strict=True)
    if routed == "gateway":
        rules = of(objects, "HTTPRoute", "search")["spec"]["rules"]
        leads = {
            match["path"]["value"]: (rule["backendRefs"][0]["name"], match.get("method"))
            for rule in rules
            for match in rule["matches"]
        }
    else:
        [rule] = of(objects, "Ingress", "search")["spec"]["rules"]
        leads = {
            path["path"]: (path["backend"]["service"]["name"], "GET")
            for path in rule["http"]["paths"]
        }
    page = {path for path, (service, _) in leads.items() if service == "search-page"}
    assert page == set(edge.PAGE_PATHS)
    assert {leads[path] for path in page} == {("search-page", "GET")}
    assert {leads[path][0] for path in edge.API_PATHS} == {"search"}

    pod = of(objects, "Deployment", "search-page")["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert "env" not in container  # no key is there to be kept
    assert "envFrom" not in container
    assert "initContainers" not in pod["spec"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["automountServiceAccountToken"] is False
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    [volume] = pod["spec"]["volumes"]
    files = of(objects, "ConfigMap", volume["configMap"]["name"])["data"]
    assert {f"/{name}" for name in files} >= set(edge.PAGE_PATHS) - {"/"}
    assert "image" in container
    images = {
        c["image"]
        for o in objects
        if o["kind"] == "Deployment"
        for c in o["spec"]["template"]["spec"].get("initContainers", [])
    }
    assert images == {container["image"]}  # the nodes have it

    selected = of(objects, "Service", "search-page")["spec"]["selector"]
    assert selected.items() <= pod["metadata"]["labels"].items()
    served = of(objects, "Service", "search")["spec"]["selector"]
    assert not served.items() <= pod["metadata"]["labels"].items()
    policy = of(objects, "NetworkPolicy", "search-page")["spec"]
    assert policy["podSelector"]["matchLabels"] == selected
    assert "egress" not in policy
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_an_option_that_was_not_chosen_leaves_nothing(render: Render) -> None:
    project = rendered(render, "gateway")
    assert not (project / "k8s/components/playground").exists()
    assert not (project / "playground/kustomization.yaml").exists()
    assert "-page" not in (project / "k8s/components/gateway/httproute.yaml").read_text()
    assert not [o for o in build(project / "k8s") if o["metadata"]["name"].endswith("-page")]


def test_the_model_is_fetched_ahead_with_a_page_too(render: Render) -> None:
    project = rendered(render, "gateway", "playground")
    text = "".join(json.dumps(o) for o in build(project / "k8s"))
    done = subprocess.run(
        [sys.executable, "-B", project / "scripts/prefetch.py"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"][-1]["metadata"]["name"] == "text-embeddings-prefetch"


def test_a_page_without_an_address_outside_is_refused(render: Render) -> None:
    with pytest.raises(UserMessageError, match="add gateway or ingress") as refused:
        rendered(render, "playground", "monitoring")
    assert "\n" not in str(refused.value)


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[str]:
    """serve.py on loopback, as a container runs it; yields host:port."""
    port = free_port()
    command = [sys.executable, "-B", folder / "playground/serve.py", f"--port={port}", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert f":{port}/ shows " in server.stdout.readline()
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def ask(at: str, method: str, path: str, host: str | None = None, origin: str | None = None) -> int:
    connection = http.client.HTTPConnection(at, timeout=30)
    headers = {"Host": host or at} | ({"Origin": origin} if origin else {})
    connection.request(method, path, b'{"input": "a"}' if method == "POST" else None, headers)
    return connection.getresponse().status


def test_in_the_cluster_it_serves_its_files_and_nothing_else(render: Render) -> None:
    project = rendered(render, "gateway", "playground")
    deployment = yaml.safe_load((project / "k8s/components/playground/deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    arguments = [a for a in container["args"] if not a.startswith(("--listen", "--port"))]
    with served(project, *arguments) as at:
        for path in edge.PAGE_PATHS:
            assert ask(at, "GET", path, host="search.example.com") == 200
        for path in ("/serve.py", "/kustomization.yaml", "/info", "/../serve.py", "/page.js/"):
            assert ask(at, "GET", path) == 404
        assert ask(at, "POST", "/v1/embeddings") == 404
        # Connections that say nothing leave room for those that do.
        silent = [socket.create_connection(tuple(at.split(":"))) for _ in range(40)]  # type: ignore[arg-type]
        assert ask(at, "GET", "/") == 200
        for one in silent:
            one.close()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("192.168.1.20:8356", None, 200),
        ("192.168.1.20:8356", "http://192.168.1.20:8356", 200),
        ("[fd00::20]:8356", None, 200),
        ("spark.local:8356", None, 200),
        ("localhost", None, 200),
        ("evil.example:8356", None, 403),
        ("spark.local.evil.example", None, 403),
        ("192.168.1.20:8356", "http://evil.example", 403),
        ("spark.local:8356", "null", 403),
        ("[", None, 403),
    ],
)
def test_in_the_network_only_the_page_may_ask(
    render: Render, host: str, origin: str | None, status: int
) -> None:
    project = rendered(render)
    with (
        stub(Stub()) as url,
        served(project, f"--url={url}", "--listen=127.0.0.1", "--names=spark.local,spark") as at,
    ):
        assert ask(at, "POST", "/v1/embeddings", host, origin) == status


def test_compose_starts_it_only_where_it_is_asked_for(render: Render) -> None:
    project = rendered(render, "api-key")
    service = yaml.safe_load((project / "compose.yaml").read_text())["services"]["playground"]
    assert service["profiles"] == ["playground"]
    assert service["ports"] == ["${BIND:-127.0.0.1}:${PAGE_PORT:-8356}:${PAGE_PORT:-8356}"]
    assert "environment" not in service  # the key is the browser's
    mounted = dict(volume.split(":", 1) for volume in service["volumes"])
    assert mounted == {"./playground": "/playground:ro", "./smoke": "/smoke:ro"}
