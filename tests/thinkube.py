"""What Thinkube's platform does with a template and its rendered repository, for the tests.

Argument names, files and values follow thinkube-control 77f207f (scripts/deploy_application.py,
templates/k8s/). The schema in data/ is thinkube.org 1bab289, modules/ROOT/attachments.
"""

from __future__ import annotations

import json
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


def data(**changes: str) -> list[str]:
    """All `--data` words that thinkube-control passes for an app called text-embeddings."""
    name = changes.get("project_name", "text-embeddings")
    pairs = {
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
        **changes,
    }
    return [word for name, value in pairs.items() for word in ("--data", f"{name}={value}")]


def copy(url: str, target: Path, **changes: str) -> list[str]:
    """The platform's whole command line, after `copier`."""
    return ["copy", "--force", "--vcs-ref=HEAD", url, str(target), *data(**changes)]


def write_manifests(project: Path) -> dict[str, str]:
    """Write what the platform writes into a repository at each deploy; returns text by path."""
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


def check(project: Path, stored: dict[str, Any]) -> None:
    """A repository rendered for Thinkube is what the platform, and its LLM gateway, can take."""
    described = yaml.safe_load((project / "thinkube.yaml").read_text())
    jsonschema.Draft7Validator(SCHEMA).validate(described)
    manifest = yaml.safe_load((project / "manifest.yaml").read_text())
    check_manifest(manifest)

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
        if line.startswith("COPY ")
    ]
    assert copied == ["model-fetch/requirements.txt", "model-fetch/model_fetch", "thinkube"]
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
