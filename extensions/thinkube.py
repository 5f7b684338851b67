"""What Thinkube takes from a repository: an image that it can build, sizes, quotas, and the gateway's names.

Sources: thinkube-control 77f207f (manifest templates, build workflow, quotas); thinkube df35039
(14_build_base_images.yaml, llm_pod_manager).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from . import accelerator as accelerators
from . import sizing
from .errors import ConfigurationError, TemplateError, UnsuitableModelError
from .pin import Pin

COMPONENT = "text-embeddings"
"""The only name, of a component and of its namespace, under which the LLM gateway looks for embeddings."""

_DEPLOYMENT_TYPES = {"component": "component", "user_app": "app"}
"""`deployment_type` that newer platforms pass (component_checkout, c8d41f7), and our answer."""

_SIZES_MIB = {"small": 256, "medium": 512, "large": 1024, "xlarge": 16384}
"""Memory limits of thinkube.yaml's container sizes."""

_QUOTA_CPUS, _XLARGE_CPUS = 8, 4
"""limits.cpu of a namespace, and of one xlarge container."""

_COMPONENT_SIZE = "large"
"""2 CPUs: four loaded models are within limits.cpu of the namespace."""

_QUOTA_MIB = {True: 96 * 1024, False: 16 * 1024}
"""limits.memory of a namespace, by whether the node's GPU has unified memory."""

_BASE_IMAGE = "${CONTAINER_REGISTRY}/library/text-embeddings-base:latest"
_IN_BASE_IMAGE = {("gb10", "linux/arm64"), ("a10", "linux/amd64"), ("l4", "linux/amd64")}
"""text-embeddings-base has TEI 121 for ARM64 and TEI 86 for AMD64, which runs on 8.6 and 8.9."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What thinkube.yaml and the platform's image are rendered from."""

    base_image: str
    """What the image starts from; may name the build argument CONTAINER_REGISTRY."""

    several_architectures: bool
    """`base_image` has AMD64 and ARM64, so a cluster of both can build it."""

    size: str
    """The smallest that takes TEI; of a component, the LLM gateway sets the memory, so that CPUs decide."""

    gpu_memory_gib: int | None
    """What a GPU should have; the platform only prefers such nodes. None: no GPU is asked for."""

    loading_is_healthy: bool
    """/health answers 200 while the model loads.

    The LLM gateway and the liveness probe of a CPU container, which has no startup probe, ask for
    that; an app on a GPU has a startup probe, and its readiness should mean readiness.
    """


def usual_platform(given: Mapping[str, Any]) -> str:
    """Default of `platform`: Thinkube passes a key that nobody else does."""
    return "thinkube" if "k8s_namespace" in given else "kubernetes"


def usual_deployment(given: Mapping[str, Any]) -> str:
    """Default of `thinkube_deployment`: what the platform says that it deploys, else by the name."""
    by_name = "component" if given.get("project_name", COMPONENT) == COMPONENT else "app"
    return _DEPLOYMENT_TYPES.get(str(given.get("deployment_type")), by_name)


def is_component(given: Mapping[str, Any]) -> bool:
    """Whether the LLM gateway names the model of each pod; asked before all questions are answered."""
    if given.get("platform", usual_platform(given)) != "thinkube":
        return False
    return str(given.get("thinkube_deployment", usual_deployment(given))) == "component"


def deployment(pin: Pin, given: Mapping[str, Any]) -> Deployment:
    """How Thinkube runs the pinned model."""
    gpu = accelerators.for_name(given["accelerator"])
    plan = sizing.plan(pin, given)
    platforms = given["accelerator"], given["image_platform"]
    in_base = given["tei_image"] == "official" and platforms in _IN_BASE_IMAGE
    # model-fetch runs in the same container, before TEI.
    memory_mib = max(plan.tei.memory_limit_mib, plan.model_fetch.memory_limit_mib)
    fits = (name for name, mib in _SIZES_MIB.items() if memory_mib <= mib)
    component = given["thinkube_deployment"] == "component"
    return Deployment(
        base_image=_BASE_IMAGE if in_base else plan.tei_image.reference,
        several_architectures=in_base,
        size=_COMPONENT_SIZE if component else next(fits, "xlarge"),
        gpu_memory_gib=ceil(plan.memory.total / sizing.GIB) if gpu.is_gpu else None,
        loading_is_healthy=component or not gpu.is_gpu,
    )


def problem(pin: Pin, given: Mapping[str, Any]) -> TemplateError | None:
    """Why Thinkube cannot run these answers; None when it can, or is not asked to."""
    if given["platform"] != "thinkube":
        return None
    gpu = accelerators.for_name(given["accelerator"])
    if given["thinkube_deployment"] == "component":
        if {given["project_name"], given["namespace"]} != {COMPONENT}:
            return ConfigurationError(
                f"thinkube_deployment: the LLM gateway looks for a component called {COMPONENT} in "
                f"the namespace {COMPONENT} alone: answer these, or thinkube_deployment=app."
            )
        if not gpu.is_gpu:
            return ConfigurationError(
                "accelerator=cpu: the LLM gateway gives every pod of a component a GPU: answer the GPU "
                "that the cluster has, as in accelerator=gb10, or thinkube_deployment=app."
            )
        return None
    plan = sizing.plan(pin, given)
    largest = _SIZES_MIB["xlarge"]
    if plan.tei.memory_limit_mib > largest:
        return UnsuitableModelError(
            f"{pin.model_id} takes {plan.tei.memory_limit_mib / 1024:.1f} GiB of its pod's memory on "
            f"{gpu.title}, and Thinkube's largest container has {largest // 1024}: choose a smaller "
            "model, or thinkube_deployment=component, whose memory the LLM gateway sets."
        )
    most = min(_QUOTA_CPUS // _XLARGE_CPUS, _QUOTA_MIB[gpu.unified_memory] // largest)
    if int(given["replicas"]) > most and deployment(pin, given).size == "xlarge":
        return ConfigurationError(
            f"replicas: Thinkube's quota of a namespace takes {most} of this size on {gpu.title}: "
            f"answer replicas={most}."
        )
    return None
