"""Which files of template/ a repository does not get: the other platform's, and options not chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from . import accelerator, answers, tei
from .pin import Pin


def _asks_mlflow(given: Mapping[str, Any], pin: Pin) -> bool:
    """Whether model-fetch needs MLflow's client: to ask which version, or for the files.

    Thinkube's pods are told their model by the gateway; model_fetch/sources.py has the ways.
    """
    own = ("", "file", "http", "https", "mlflow-artifacts", "s3")
    asks = pin.version is None or given["platform"] == "thinkube"
    return asks or urlsplit(pin.artifact_uri or "").scheme not in own


def left_out(given: Mapping[str, Any], pin: Pin) -> list[str]:
    """Patterns as `_exclude` of copier.yml takes them: Git's, from the repository's root.

    Args: given: all answers, those that are no question too.
    """
    components, objects, page = given["components"], given["objects_folder"], given["page_folder"]
    overlays = answers.overlays(given)
    every = answers.kustomize_components(answers.COMPONENTS, given["replicas"])
    chosen = answers.kustomize_components(components, given["replicas"])
    build, edits = given["tei_image"] == "build", tei.edits(given)
    gpu = accelerator.for_name(given["accelerator"])
    client = "/images/model-fetch"
    thinkubes = [
        "/k8s/.argocd-source.yaml",
        "/k8s/platform",
        "/images/Containerfile",
        "/images/Dockerfile",
        "/images/thinkube",
        "/manifest.yaml",
        "/thinkube.yaml",
    ]
    one = ["/gitops/argocd.yaml", "/gitops/flux.yaml", "/gitops/kustomization.yaml"]
    argocd, flux = ["argocd.yaml", "kustomization.yaml"], ["flux.yaml"]
    of_the_other = {"argocd": flux, "flux": argocd}.get(given["gitops"], [])
    table: list[tuple[bool, list[str]]] = [
        (True, [f"{client}/tests"]),  # they belong to whoever changes the program
        (given["platform"] != "thinkube", thinkubes),
        (True, [f"/{objects}/components/{name}" for name in sorted(every - chosen)]),
        ("api-key" not in components, ["/tls"]),
        ("playground" not in components, [f"/{page}/kustomization.yaml"]),
        ("monitoring" not in components, ["/overlays/*/prometheusrule.yaml", "/monitoring"]),
        ("autoscaling-keda" not in components, ["/overlays/*/scaledobject.yaml"]),
        (given["model_storage"] != "pvc", ["/scripts/prefetch.py"]),
        (not overlays, ["/overlays", "/scripts/promote.py"]),
        (given["gitops"] == "none", ["/gitops"]),
        (True, [f"/gitops/**/{name}" for name in of_the_other]),
        (bool(overlays), one),
        (given["ci"] == "none", ["/ci", "/renovate.json"]),
        (given["ci"] != "github", ["/.github"]),
        (given["ci"] != "gitlab", ["/.gitlab-ci.yml"]),
        (not build, [f"/{objects}/build", "/images/tei"]),
        (not edits, ["/images/tei/patches"]),
        (True, [f"/images/tei/patches/{e.name}.edit" for e in tei.every_edit() if e not in edits]),
        (not gpu.is_gpu, ["/images/tei/require-gpu.c"]),
        ("mkl" not in gpu.features(given["image_platform"]), ["/images/tei/mkl.txt"]),
        (
            not pin.conversion,
            [
                f"{client}/model_fetch/jina.py",
                f"{client}/model_fetch/jina_layouts.py",
                f"{client}/requirements-numpy.txt",
            ],
        ),
        (not _asks_mlflow(given, pin), [f"{client}/requirements-mlflow.txt"]),
    ]
    for overlay in overlays:
        folder = f"/overlays/{overlay.name}"
        plain = overlay.namespace == given["namespace"]
        table.append((overlay.follows, [f"{folder}/pin"]))
        table.append((plain, [f"{folder}/*.yaml", f"!{folder}/kustomization.yaml"]))
    return [pattern for holds, patterns in table if holds for pattern in patterns]
