"""What the pod must reach, for the NetworkPolicy: MLflow, its store and its login; nothing else.

A policy is matched with the pod's port behind a Service, which the Service's own does not tell: a Service
on 80 in front of MLflow on 5000 is usual. So inside the cluster the namespace is named, and no port.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .pin import Pin

_STORE_PORTS = (80, 443, 8333, 9000)
"""HTTP, HTTPS, SeaweedFS and MinIO."""

_LOGIN_PORTS = (80, 443, 8080, 8443)
"""HTTP, HTTPS and Keycloak's own."""


@dataclass(frozen=True, slots=True)
class Egress:
    """One destination that model-fetch may open connections to."""

    reason: str
    ports: tuple[int, ...]
    """TCP; empty for any."""

    namespace: str | None
    """Of the cluster. None: any address."""


def destinations(pin: Pin, given: Mapping[str, Any]) -> Iterator[Egress]:
    """What model-fetch reaches with these answers; an S3 store is known by its scheme alone."""
    uri = urlsplit(given["mlflow_tracking_uri"])
    port = uri.port or (443 if uri.scheme == "https" else 80)
    labels = (uri.hostname or "").split(".")
    if len(labels) > 2 and labels[2] == "svc":
        yield Egress("MLflow", (), labels[1])
    elif len(labels) == 1:
        yield Egress("MLflow", (), given["namespace"])
    else:
        yield Egress("MLflow, outside the cluster", (port,), None)
    if given["mlflow_auth"] == "keycloak":
        yield Egress("Keycloak, for the login", _LOGIN_PORTS, None)
    # Also where MLflow proxies its artifacts: it may answer with a presigned address of its S3 store.
    local = (pin.artifact_uri or "").startswith(("file:", "/"))
    if given["model_storage"] != "mount" and not local:
        yield Egress("the S3 store of MLflow's artifacts", _STORE_PORTS, None)
