"""What Thinkube's platform does with a template and its rendered repository, for the tests.

Argument names, files and values follow thinkube-control 77f207f (scripts/deploy_application.py,
templates/k8s/, llm_pod_manager.py), and for the newer generation dda177e and c8d41f7. The schema in
data/ is thinkube.org 1bab289, modules/ROOT/attachments.
"""

from __future__ import annotations

import json
import subprocess
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMA = json.loads((Path(__file__).parent / "data/thinkube-yaml-v1.0.schema.json").read_text())

SECRETS = {
    "github_token": "ghp-of-the-platform-1a2b",
    "ansible_become_pass": "become-of-the-platform-3c4d",
    "ansible_ssh_private_key_file": "/home/thinkube/.ssh/secret-key-5e6f",
    "admin_password": "admin-of-the-platform-7a8b",
}


def answers(generation: str = "old", kind: str = "component", **changes: str) -> dict[str, str]:
    """All that thinkube-control passes as `--data`, for what is called text-embeddings if not told."""
    name = changes.get("project_name", "text-embeddings")
    newer = {
        "deployment_type": "component" if kind == "component" else "user_app",
        "replace_developer_commits": "false",
    }
    return {
        "project_name": name,
        "domain_name": "spark.example.net",
        "admin_username": "tkadmin",
        "namespace": name,
        "k8s_namespace": name,
        "container_registry": "registry.spark.example.net",
        "registry_subdomain": "registry",
        "project_description": "",
        "author_name": "An Author",
        "author_email": "author@example.net",
        "deployment_id": "0f0e0d0c-0b0a",
        "system_username": "thinkube",
        "master_node_name": "spark1",
        "master_node_ip": "192.0.2.10",
        "ansible_user": "thinkube",
        "model_id": "nomic-ai/nomic-embed-text-v1.5",
        **SECRETS,
        **(newer if generation == "new" else {}),
        **changes,
    }


REFS = {"old": "HEAD", "new": "v1.0.0"}
"""`--vcs-ref`, by the platform's generation: the newer one asks for a release."""


def copy(url: str, target: Path, generation: str = "old", **changes: str) -> list[str]:
    """The platform's whole command line, after `copier`."""
    pairs = answers(generation, **changes)
    words = [word for name, value in pairs.items() for word in ("--data", f"{name}={value}")]
    return ["copy", "--force", f"--vcs-ref={REFS[generation]}", url, str(target), *words]


def write_manifests(project: Path, **params: str) -> dict[str, str]:
    """Write what the platform writes into a repository at each deploy; returns text by path.

    Args: params: parameters of the form, which become variables of the container.
    """
    app = project.name
    deployment: dict[str, Any] = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{app}-inference", "namespace": app},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app.kubernetes.io/component": "inference"}},
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/component": "inference"}},
                "spec": {
                    "containers": [
                        {
                            "name": "inference",
                            "image": f"registry.spark.example.net/thinkube/{app}-inference:latest",
                            "ports": [{"containerPort": 7860, "name": "http"}],
                            "env": [
                                *({"name": n.upper(), "value": v} for n, v in params.items()),
                                {"name": "APP_NAME", "value": app},
                            ],
                            "startupProbe": {
                                "httpGet": {"path": "/health", "port": 7860},
                                "initialDelaySeconds": 30,
                                "periodSeconds": 10,
                                "failureThreshold": 60,
                            },
                            "volumeMounts": [
                                {"name": "mlflow-models", "mountPath": "/mlflow-models"}
                            ],
                        }
                    ],
                    "volumes": [
                        {
                            "name": "mlflow-models",
                            "persistentVolumeClaim": {
                                "claimName": f"{app}-inference-mlflow-models"
                            },
                        }
                    ],
                },
            },
        },
    }
    names = (
        *(
            "namespace",
            "resource-policies",
            "mlflow-secrets",
            "app-metadata",
            "services",
            "ingress",
        ),
        *("paused-backend", "storage-pvc", "build-workflow", "argocd-postsync-hook"),
        "argocd-syncfail-hook",
    )
    listed = {"resources": ["deployments.yaml"], "namespace": app}
    written = {f"k8s/{name}.yaml": f"# of the platform: {name}\n" for name in names}
    written |= {
        "k8s/deployments.yaml": yaml.safe_dump(deployment),
        "k8s/kustomization.yaml": yaml.safe_dump(listed),
        f"k8s/.argocd-source-{app}.yaml": "kustomize:\n  images: [a=b:c]\n",
        ".git-hooks/pre-commit": "#!/bin/sh\nexit 0\n",
        "install-hooks.sh": "#!/bin/sh\n# of the platform\n",
        "regenerate-manifests.sh": "#!/bin/sh\n# of the platform\n",
        "DEVELOPMENT.md": "of the platform\n",
        ".deployment-trigger": "2026-11-22T00:00:00Z\n",
    }
    for path, text in written.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(text)
    return written


def applied(project: Path) -> dict[str, Any]:
    """The platform's Deployment as Argo CD applies it: with what .argocd-source.yaml adds."""
    kustomization = project / "k8s/kustomization.yaml"
    added = yaml.safe_load((project / "k8s/.argocd-source.yaml").read_text())["kustomize"]
    kustomization.write_text(yaml.safe_dump(yaml.safe_load(kustomization.read_text()) | added))
    built = subprocess.run(
        ["kubectl", "kustomize", str(project / "k8s")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    deployment: dict[str, Any] = yaml.safe_load(built.stdout)
    return deployment


class LlmGateway:
    """How the LLM gateway makes a node's Deployment from the base one, and keeps it between models."""

    def __init__(self, base: dict[str, Any]) -> None:
        self.base = base
        self.node: dict[str, Any] | None = None

    def load(self, model_id: str) -> None:
        """It looks at the first MODEL_ID, appends its own to the base's, and patches by name."""
        if self.node is not None:
            env = self._env(self.node)
            first = next((e["value"] for e in env if e["name"] == "MODEL_ID"), None)
            last = next((e["value"] for e in reversed(env) if e["name"] == "MODEL_ID"), None)
            if first == model_id:
                if last != model_id:  # a strategic merge finds the first of that name
                    next(e for e in env if e["name"] == "MODEL_ID")["value"] = model_id
                self.node["spec"]["replicas"] = 1
                return
        self.node = copy_of(self.base)
        self.node["spec"]["replicas"] = 1
        self._env(self.node).append({"name": "MODEL_ID", "value": model_id})

    def unload(self) -> None:
        """The same after a load that failed."""
        assert self.node is not None
        self.node["spec"]["replicas"] = 0

    @property
    def models(self) -> list[str]:
        """Each MODEL_ID of the pod; a container gets the last."""
        assert self.node is not None
        return [e["value"] for e in self._env(self.node) if e["name"] == "MODEL_ID"]

    @staticmethod
    def _env(deployment: dict[str, Any]) -> list[dict[str, str]]:
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        variables: list[dict[str, str]] = container.setdefault("env", [])
        return variables


def check(project: Path, stored: dict[str, Any]) -> None:
    """A repository rendered for Thinkube is what the platform, and its LLM gateway, can take."""
    described = yaml.safe_load((project / "thinkube.yaml").read_text())
    jsonschema.Draft7Validator(SCHEMA).validate(described)
    manifest = yaml.safe_load((project / "manifest.yaml").read_text())
    check_manifest(manifest)
    asked = [parameter["name"] for parameter in manifest["parameters"]]
    assert asked == ([] if stored["thinkube_deployment"] == "component" else ["model_id"])

    spec = described["spec"]
    (container,) = spec["containers"]
    assert (container["name"], container["port"]) == ("inference", 7860)
    assert container["health"] == "/health"
    assert spec["routes"] == [{"path": "/", "to": "inference"}]
    assert ("gpu" in container) == (stored["accelerator"] != "cpu")
    if stored["thinkube_deployment"] == "component":
        wanted = {"type": "component", "name": "text-embeddings", "replicas": 0}
        assert spec["deployment"].items() >= wanted.items()
        assert stored["project_name"] == stored["namespace"] == "text-embeddings"
    else:
        assert spec["deployment"] == {"type": "app", "replicas": int(stored["replicas"])}

    build = project / container["build"]
    assert (build / "Dockerfile").read_bytes() == (build / "Containerfile").read_bytes()
    copied = [
        line.split()[1]
        for line in (build / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from=" not in line
    ]
    page = ["playground/index.html"] if stored["thinkube_deployment"] == "app" else []
    fetch = ["model-fetch/requirements*.txt", "model-fetch/model_fetch"]
    assert copied == [*fetch, "thinkube", *page]
    assert all((build / path).is_file() for path in page)
    cluster = (project / "deploy/base/pin.json").read_text()
    assert (build / "thinkube/pin.json").read_text() == cluster
    settings = (build / "thinkube/settings.sh").read_text()
    assert f"MODEL={stored['pin']['model_id']}\n" in settings
    given = yaml.safe_load((project / "deploy/base/deployment.yaml").read_text())
    args = given["spec"]["template"]["spec"]["containers"][0]["args"]
    own = ("--model-id=", "--served-model-name=", "--hostname=", "--port=")
    for arg in args:
        assert arg.startswith(own) or f"  {arg}\n" in settings, arg
    assert sorted(p.name for p in (project / "k8s").iterdir()) == [".argocd-source.yaml"]


def check_manifest(manifest: dict[str, Any]) -> None:
    """What thinkube-control's TemplateManifest asks for, and its advice on the number of parameters."""
    assert manifest["apiVersion"] == "thinkube.io/v1"
    assert manifest["kind"] == "TemplateManifest"
    assert len(manifest["parameters"]) <= 2
    for parameter in manifest["parameters"]:
        assert parameter["type"] in ("str", "bool", "int", "choice")
        assert parameter["name"].isidentifier()
        assert all(isinstance(choice, str) for choice in parameter["choices"])
        assert parameter["default"] in parameter["choices"]
