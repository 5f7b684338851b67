"""What the pod must reach, for the NetworkPolicy: MLflow, its store and its login; nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .pin import Pin

_STORE_PORTS = (443, 8333, 9000)
"""HTTPS, SeaweedFS and MinIO."""


@dataclass(frozen=True, slots=True)
class Egress:
    """One destination that model-fetch may open connections to."""

    reason: str
    ports: tuple[int, ...]
    """TCP. Of the pods behind a Service these may be other than the Service's own."""

    namespace: str | None
    """Of the cluster. None: any address."""


def destinations(pin: Pin, given: Mapping[str, Any]) -> Iterator[Egress]:
    """What model-fetch reaches with these answers; an S3 store is known by its scheme alone."""
    uri = urlsplit(given["mlflow_tracking_uri"])
    port = uri.port or (443 if uri.scheme == "https" else 80)
    labels = (uri.hostname or "").split(".")
    if len(labels) > 2 and labels[2] == "svc":
        yield Egress("MLflow", (port,), labels[1])
    elif len(labels) == 1:
        yield Egress("MLflow", (port,), given["namespace"])
    else:
        yield Egress("MLflow, outside the cluster", (port,), None)
    if given["mlflow_auth"] == "keycloak":
        yield Egress("Keycloak, for the login", (443,), None)
    from_s3 = pin.artifact_uri is None or pin.artifact_uri.startswith("s3:")
    if given["model_storage"] != "mount" and from_s3:
        yield Egress("the S3 store of MLflow's artifacts", _STORE_PORTS, None)
