"""Makes a Job of the Deployment's init container: it fetches the pinned version while the old pods serve.

    kubectl create --dry-run=client --output=json -k k8s | python3 scripts/prefetch.py | kubectl apply -f -

`make prefetch` calls it. Everything is as the Deployment has it, so nothing is said twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]


def objects(text: str) -> Iterator[Object]:
    """The objects that kubectl prints as JSON, one after the other or as a List."""
    decoder = json.JSONDecoder()
    at = 0
    while text := text[at:].lstrip():
        found, at = decoder.raw_decode(text)
        yield from found["items"] if found.get("kind") == "List" else [found]


def job(deployment: Object) -> Object:
    """A Job that does what the Deployment's pods do before they serve."""
    metadata, template = deployment["metadata"], deployment["spec"]["template"]
    spec = template["spec"]
    [fetch] = spec.pop("initContainers")
    # Which versions are still wanted is for the pods to say: they serve one of them.
    fetch["args"] = [arg for arg in fetch["args"] if not arg.startswith("--keep=")]
    serving = dict(template["metadata"]["labels"])
    labels = serving | {"app.kubernetes.io/component": "prefetch"}
    mounted = {mount["name"] for mount in fetch["volumeMounts"]}
    for name in ("runtimeClassName", "topologySpreadConstraints", "terminationGracePeriodSeconds"):
        spec.pop(name, None)
    # A volume for one node: beside the pods that have it.
    beside = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": serving}}
    preferred = [{"weight": 100, "podAffinityTerm": beside}]
    spec |= {
        "containers": [fetch],
        "volumes": [volume for volume in spec["volumes"] if volume["name"] in mounted],
        "restartPolicy": "Never",
        "affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{metadata['name']}-prefetch",
            "namespace": metadata["namespace"],
            "labels": dict(metadata["labels"]) | {"app.kubernetes.io/component": "prefetch"},
        },
        "spec": {
            "backoffLimit": 2,
            "activeDeadlineSeconds": deployment["spec"]["progressDeadlineSeconds"],
            "ttlSecondsAfterFinished": 86400,
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def needed(found: list[Object]) -> Iterator[Object]:
    """What must be there for the Job, then the Job."""
    deployments = [item for item in found if item["kind"] == "Deployment"]
    [deployment] = [
        one for one in deployments if "initContainers" in one["spec"]["template"]["spec"]
    ]
    made = job(deployment)
    volumes = made["spec"]["template"]["spec"]["volumes"]
    maps = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    for item in found:
        pin = item["kind"] == "ConfigMap" and item["metadata"]["name"] in maps
        if pin or item["kind"] in ("ServiceAccount", "PersistentVolumeClaim"):
            yield item
    yield made


if __name__ == "__main__":
    items = list(needed(list(objects(sys.stdin.read()))))
    json.dump({"apiVersion": "v1", "kind": "List", "items": items}, sys.stdout)
