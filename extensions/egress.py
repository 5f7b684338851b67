"""What the pod must reach, for the NetworkPolicy: MLflow, its store and its login; nothing else.

A policy is matched with the pod's port behind a Service, which the Service's own does not tell: a Service
on 80 in front of MLflow on 5000 is usual. So inside the cluster the namespace is named, and no port.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .addresses import NEVER_ASKED
from .pin import Pin

_IN_CLUSTER = "http://mlflow.mlflow.svc.cluster.local:5000"
"""Assumed: a Service `mlflow` in a namespace of that name, at MLflow's own port."""

_ONLY_HERE = {"0.0.0.0", "host.docker.internal", "host.containers.internal"}  # noqa: S104

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
    """Of the cluster. None: any address, but `EVERYWHERE` leaves out some."""


EVERYWHERE = {
    cidr: [str(n) for n in NEVER_ASKED if n.version == version]
    for version, cidr in ((4, "0.0.0.0/0"), (6, "::/0"))
}
"""Every address, and of these what answers with a machine's credentials."""


def usual_tracking_uri(rendering: str | None) -> str:
    """Where pods find MLflow unless that is answered: where whoever renders finds it, if pods can, too.

    Args: rendering: MLFLOW_TRACKING_URI; None where there is none. A name without a dot means
    something else elsewhere.
    """
    host = urlsplit(rendering or "").hostname or ""
    own = host == "localhost" or host.startswith("127.") or host in _ONLY_HERE
    return rendering if rendering and "." in host and not own else _IN_CLUSTER


def _server(name: str, address: str, own_namespace: str) -> Egress:
    """A server, by its namespace where its name says that it is in the cluster."""
    uri = urlsplit(address)
    labels = (uri.hostname or "").split(".")
    if len(labels) > 2 and labels[2] == "svc":
        return Egress(name, (), labels[1])
    if len(labels) == 1:
        return Egress(name, (), own_namespace)
    port = uri.port or (443 if uri.scheme == "https" else 80)
    return Egress(f"{name}, outside the cluster", (port,), None)


def destinations(pin: Pin, given: Mapping[str, Any]) -> Iterator[Egress]:
    """What model-fetch reaches with these answers; an S3 store is known by its scheme alone."""
    yield _server("MLflow", given["mlflow_tracking_uri"], given["namespace"])
    if given.get("proxy"):
        yield _server("the HTTP proxy", given["proxy"], given["namespace"])
    if given["mlflow_auth"] == "keycloak":
        yield Egress("Keycloak, for the login", _LOGIN_PORTS, None)
    # Also where MLflow proxies its artifacts: it may answer with a presigned address of its S3 store.
    local = (pin.artifact_uri or "").startswith(("file:", "/"))
    if given["model_storage"] != "mount" and not local:
        yield Egress("the S3 store of MLflow's artifacts", _STORE_PORTS, None)
