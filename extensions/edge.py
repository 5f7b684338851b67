"""What the outside may reach of TEI, and by whose hands: the Gateway, the ingress controller."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .errors import ConfigurationError

API_PATHS = (
    "/v1/embeddings",
    "/embed",
    "/embed_all",
    "/embed_sparse",
    "/rerank",
    "/predict",
    "/similarity",
    "/tokenize",
    "/decode",
)
"""Of TEI (router/src/http/server.rs); all that wants the key and is for clients.

Not `/`, `/health` and `/ping`: eight of them at once end an unpatched TEI (its issue 424). Not
`/metrics`, `/docs` and `/info`: they are its operator's.
"""

PAGE_PATHS = ("/", "/style.css", "/page.js", "/service.js", "/vectors.js")
"""Of the playground (serve.py), which asks the API's paths at the same address."""

_ANNOTATIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        # F5's controller (docs.nginx.com, "Advanced configuration with Annotations"): 60 s and 1 MB else.
        "nginx": {
            "nginx.org/proxy-read-timeout": "{seconds}s",
            "nginx.org/proxy-send-timeout": "{seconds}s",
            "nginx.org/client-max-body-size": "2m",
        },
        # HAProxy Technologies' controller (its documentation, annotations): 50 s else.
        "haproxy": {"haproxy.org/timeout-server": "{seconds}s"},
    }
)
"""By ingress class. Traefik has no time limit for answers and none for bodies; TEI itself has one."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where an HTTPRoute is attached."""

    namespace: str
    gateway: str
    section: str | None
    """Name of the Gateway's listener; None: all of them, the one for plain HTTP too."""


def split_pairs(labels: str) -> dict[str, str]:
    """Labels of the answer `prometheus_labels`, `key=value key=value`."""
    return dict(pair.split("=", 1) for pair in labels.split())


def listener(answer: str) -> Listener:
    """The answer `gateway_listener`, `namespace/gateway[/listener]`."""
    namespace, gateway, *section = answer.split("/")
    return Listener(namespace, gateway, section[0] if section else None)


def ingress_annotations(given: Mapping[str, Any], request_seconds: int) -> dict[str, str]:
    """What the ingress controller must be told; empty where it needs nothing."""
    known = _ANNOTATIONS.get(given.get("ingress_class", ""), {})
    annotations = {name: value.format(seconds=request_seconds) for name, value in known.items()}
    if issuer := given.get("tls_issuer"):
        annotations["cert-manager.io/cluster-issuer"] = issuer
    return annotations


def problem(components: Iterable[str], open_to_everyone: bool) -> ConfigurationError | None:
    """Why the service cannot be exposed like that; None when it can."""
    routed = sorted({"gateway", "ingress"} & set(components))
    if "playground" in components and not routed:
        return ConfigurationError(
            "components: playground is the page at the address outside, and there is none: add gateway "
            "or ingress, or leave it out (make playground shows the page on your own machine)."
        )
    if not routed or "api-key" in components or open_to_everyone:
        return None
    return ConfigurationError(
        f"components: {routed[0]} without api-key lets anyone who reaches the host use the service: "
        "add api-key, or answer open_to_everyone=true if that is meant."
    )
