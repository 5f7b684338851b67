"""What each answer may be, and which answers may stand together.

Copier turns a wrong `--data` value into a traceback of forty lines. So every answer is checked here,
at the first question, and a wrong one ends the run in one sentence before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from . import accelerator, compatibility, edge, sizing, tei, thinkube
from .errors import ConfigurationError, UnsuitableModelError
from .pin import Pin

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_DNS_NAME = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
_HUB_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
_PORT = (
    r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6([0-4][0-9]{3}|5([0-4][0-9]{2}|5([0-2][0-9]|3[0-5])))))?"
)
_LABEL_NAME = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL = rf"({_DNS_NAME}/)?{_LABEL_NAME}=({_LABEL_NAME})?"
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Rule:
    """What one answer may be."""

    wanted: str = ""
    """The rest of the sentence `<name>: <value> is not …`. Empty: see `choices`."""

    pattern: str = ""
    """Regular expression that the whole text must match."""

    choices: Callable[[], tuple[str, ...]] | None = None
    """The only values that are allowed; of each item when `many`."""

    many: bool = False
    """The answer is a list."""

    longest: int = 253
    """Characters, at most."""

    secret: bool = False
    """The value may hold a credential by mistake and is never shown."""


def _one_of(*values: str) -> Rule:
    return Rule(choices=lambda: values)


_ENVIRONMENT = r"[a-z]([-a-z0-9]{0,18}[a-z0-9])?"
_NAMESPACES = Rule(
    "a list of namespaces: separate their names by spaces", rf"({_DNS_LABEL}( {_DNS_LABEL})*)?"
)

COMPONENTS = (
    "monitoring",
    "autoscaling-hpa",
    "autoscaling-keda",
    "gateway",
    "ingress",
    "network-policy",
    "api-key",
    "gpu-toleration",
    "playground",
    "external-secrets",
)

RULES: dict[str, Rule] = {
    "model_id": Rule(
        "a Hugging Face id (owner/name) or the name of a registered model: use letters, digits, "
        "'.', '_', '-' and at most one '/'",
        rf"{_HUB_NAME}(/{_HUB_NAME})?",
    ),
    "model_version": Rule(
        "a model version: use latest, a number, or @ and an alias",
        r"latest|[1-9][0-9]{0,8}|@[A-Za-z0-9_-]+",
    ),
    "project_name": Rule(
        "a project name: use at most 40 lower-case letters, digits and '-', starting with a letter",
        r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
    ),
    "project_description": Rule(
        "a description: use one line of at most 200 printable characters, or none",
        r"(\S(.*\S)?)?",
        longest=200,
    ),
    "accelerator": Rule(choices=accelerator.names),
    "image_platform": _one_of("linux/arm64", "linux/amd64"),
    "platform": _one_of("kubernetes", "thinkube"),
    "thinkube_deployment": _one_of("component", "app"),
    "admin_username": Rule(
        "a user's name: use at most 63 letters, digits, '.', '_', '-' and '@'",
        r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}",
    ),
    "namespace": Rule(
        "a Kubernetes namespace: use at most 63 lower-case letters, digits and '-'", _DNS_LABEL
    ),
    "domain_name": Rule(
        "a domain name: use lower-case labels with dots, as in example.com", _DNS_NAME
    ),
    "container_registry": Rule(
        "a container registry: use host[:port][/path] in lower case, as in registry.example.com/team",
        rf"{_DNS_NAME}{_PORT}(/[a-z0-9]+([._-][a-z0-9]+)*)*",
    ),
    "model_storage": _one_of("pvc", "ephemeral", "mount"),
    "artifact_store_claim": Rule("the name of a PersistentVolumeClaim", _DNS_NAME),
    "mlflow_tracking_uri": Rule(
        "a tracking URI: use http(s)://host[:port][/path] without user, password or query",
        rf"https?://{_DNS_NAME}{_PORT}(/[A-Za-z0-9._~-]+)*/?",
        secret=True,
    ),
    "mlflow_auth": _one_of("none", "token", "basic", "keycloak"),
    "replicas": Rule("a number of replicas: use a whole number from 1 to 99", r"[1-9][0-9]?"),
    "components": Rule(choices=lambda: COMPONENTS, many=True),
    "ci": _one_of("none", "github", "gitlab"),
    "gitops": _one_of("none", "argocd", "flux"),
    "git_url": Rule(
        "the address of a Git repository: use https://host/path or ssh://git@host/path, without a login",
        rf"(https://|ssh://(git@)?){_DNS_NAME}{_PORT}(/[A-Za-z0-9._~-]+)+",
        secret=True,
    ),
    "secret_store": Rule(
        "a store of External Secrets: use SecretStore/name or ClusterSecretStore/name",
        rf"(Cluster)?SecretStore/{_DNS_NAME}",
    ),
    "model_task": _one_of(*compatibility.JINA_V3_TASKS),
    "pooling": _one_of("auto", "cls", "mean", "last-token"),
    "tei_image": _one_of("build", "official"),
    "tei_ref": Rule("a commit of TEI: use its 40 hexadecimal digits", r"[0-9a-f]{40}"),
    "storage_class": Rule(
        "the name of a StorageClass, or empty for the cluster's own", rf"({_DNS_NAME})?"
    ),
    "runtime_class_name": Rule("the name of a RuntimeClass, or empty for none", rf"({_DNS_NAME})?"),
    "allowed_namespaces": _NAMESPACES,
    "environments": Rule(
        "two or more names of environments: use lower-case letters and digits, separated by spaces",
        rf"({_ENVIRONMENT}( {_ENVIRONMENT}){{1,8}})?",
    ),
    "gateway_listener": Rule(
        "a listener of a Gateway: use namespace/gateway/listener, or namespace/gateway for all of them",
        rf"{_DNS_LABEL}/{_DNS_NAME}(/{_DNS_NAME})?",
    ),
    "ingress_class": Rule(
        "the name of an IngressClass, or empty for the cluster's own", rf"({_DNS_NAME})?"
    ),
    "tls_issuer": Rule("the name of a ClusterIssuer, or empty for none", rf"({_DNS_NAME})?"),
    "edge_namespaces": _NAMESPACES,
    "prometheus_namespace": Rule("a Kubernetes namespace", _DNS_LABEL),
    "prometheus_labels": Rule(
        "a list of labels: use key=value, separated by spaces", rf"({_LABEL}( {_LABEL})*)?"
    ),
    "longest_input": Rule(
        "a number of tokens: use 512 to 999999, or nothing",
        r"(51[2-9]|5[2-9][0-9]|[6-9][0-9]{2}|[1-9][0-9]{3,5})?",
    ),
    "measured_tokens_per_second": Rule(
        "a number of tokens: use 1 to 99999999, or nothing", r"([1-9][0-9]{0,7})?"
    ),
    "image_pull_secret": Rule("the name of a Secret, or empty for none", rf"({_DNS_NAME})?"),
    "ca_config_map": Rule("the name of a ConfigMap, or empty for none", rf"({_DNS_NAME})?"),
    "proxy": Rule(
        "the address of a proxy: use http://host:port without a login, or nothing",
        rf"(http://{_DNS_NAME}{_PORT})?",
        secret=True,
    ),
    "no_proxy": Rule(
        "a list of hosts: separate them by commas, as in .svc,10.0.0.0/8",
        r"([A-Za-z0-9.*:/_-]+(,[A-Za-z0-9.*:/_-]+)*)?",
    ),
    "repository_url": Rule(
        "an address of files: use https://host/path, or nothing",
        rf"(https?://{_DNS_NAME}{_PORT}(/[A-Za-z0-9._~-]+)*/?)?",
        secret=True,
    ),
}
"""Every answer that a person gives, but for yes/no questions: those take any text (Copier's rule)."""

YES_OR_NO = ("accept_license", "open_to_everyone")
"""Answers that are read with `truth`."""

NAMES = (*RULES, *YES_OR_NO, "advanced", "tei_edits")
"""Of all answers that a person gives."""


def _shown(value: object, rule: Rule) -> str:
    """A value as it may stand in an error: short, printable, and never a credential."""
    text = str(value)
    if rule.secret or re.search(r"\S@", text):  # user:password@host, in the wrong place
        return "what was given"
    shown = "".join(c if c.isprintable() else "?" for c in text[:_SHOWN_CHARACTERS])
    return f"'{shown}{'…' if len(text) > _SHOWN_CHARACTERS else ''}'"


def problem(name: str, value: object) -> str:
    """Why `value` cannot be the answer `name`, in one sentence; empty when it can."""
    rule = RULES[name]
    shown = f"{name}: {_shown(value, rule)} is not"
    if rule.choices:
        allowed = rule.choices()
        if rule.many:
            good = all(item in allowed for item in _items(value))
            return "" if good else f"{shown} a list of these, as in [a, b]: {', '.join(allowed)}."
        return "" if value in allowed else f"{shown} one of {', '.join(allowed)}."
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else "\0"
    fits = text.isprintable() and len(text) <= rule.longest and re.fullmatch(rule.pattern, text)
    return "" if fits else f"{shown} {rule.wanted}."


def _bool_problem(name: str, value: object) -> str:
    fits = isinstance(value, bool | str) or value in (0, 1)
    return "" if fits else f"{name}: {_shown(value, Rule())} is neither yes nor no."


def _items(value: object) -> list[Any]:
    """The items of a list answer, which --data gives as YAML text; [None] when it is no list."""
    items = mapping(value)
    return items if isinstance(items, list) else [None]


def check(given: Mapping[str, object]) -> None:
    """Refuse the first of the given answers that cannot be.

    Raises: ConfigurationError, in one sentence that names the answer.
    """
    for name, value in given.items():
        if value is None:
            raise ConfigurationError(f"{name}: null is no answer: give one, or leave {name} out.")
        if wrong := problem(name, value) if name in RULES else _bool_problem(name, value):
            raise ConfigurationError(wrong)


def check_defaults(usual: Mapping[str, object]) -> None:
    """Refuse a default of Copier's own settings file that cannot be an answer here.

    Raises: ConfigurationError, in one sentence that names the answer.
    """
    try:
        check({n: v for n, v in usual.items() if not (isinstance(v, str) and "{" in v)})
    except ConfigurationError as error:
        raise ConfigurationError(f"defaults of Copier's settings: {error}") from None


def mapping(given: object) -> object:
    """A mapping answer, which --data gives as YAML text; None when the text is no YAML."""
    try:
        return yaml.safe_load(given) if isinstance(given, str) else given
    except (
        Exception
    ):  # PyYAML lets Python's own errors through, of eight kinds (!!bool x, 2024-99-99)
        return None


def check_together(given: Mapping[str, Any], pin: Pin) -> None:
    """Refuse answers that exclude each other.

    Args: given: all answers of RULES, and accept_license. pin: as it is deployed.

    Raises: TemplateError, in one sentence that says which and what to change.
    """
    image = (given["image_platform"], given["tei_image"], given["tei_ref"])
    if wrong := accelerator.problem(given["accelerator"], *image):
        raise ConfigurationError(wrong)
    if given["tei_image"] == "build" and (wrong := tei.problem(given["tei_ref"])):
        raise ConfigurationError(wrong)
    components = given["components"]
    if {"autoscaling-hpa", "autoscaling-keda"} <= set(components):
        raise ConfigurationError(
            "components: autoscaling-hpa and autoscaling-keda would fight over the replicas: "
            "choose one."
        )
    if given.get("gitops", "none") != "none" and given["platform"] == "thinkube":
        raise ConfigurationError(
            "gitops: Thinkube deploys with an Argo CD of its own: answer none."
        )
    if "external-secrets" in components and not (
        "api-key" in components or given["mlflow_auth"] != "none"
    ):
        raise ConfigurationError(
            "components: external-secrets has nothing to bring: there is neither api-key nor mlflow_auth."
        )
    if refused_edge := edge.problem(components, truth(given.get("open_to_everyone", False))):
        raise refused_edge
    licence = pin.facts.license or ""
    if "-nc-" in licence and not truth(given["accept_license"]):
        raise ConfigurationError(
            f"{pin.model_id} is licensed {licence}, which forbids commercial use: answer "
            "accept_license=true if yours is not."
        )
    gpu = accelerator.for_name(given["accelerator"])
    hardware = replace(gpu, dtype=sizing.serving_dtype(pin.facts, gpu))
    findings = compatibility.check_hardware(
        pin.facts.architecture, hardware, edited=bool(tei.edits(given)), facts=pin.facts
    )
    if refused_there := compatibility.refusal(findings):
        raise UnsuitableModelError(f"{pin.model_id} on {gpu.title}: {refused_there}")
    pooling = given["pooling"] if given["pooling"] != "auto" else pin.facts.pooling
    row = compatibility.JINA_V2 if pin.facts.alibi else pin.facts.architecture
    if pooling and (wrong := compatibility.pooling_problem(row, pooling)):
        raise UnsuitableModelError(f"pooling: {wrong}")
    if refused := sizing.problem(pin, given) or thinkube.problem(pin, given):
        raise refused
    scaler = next((name for name in components if name.startswith("autoscaling-")), None)
    if pin.version is None and (scaler or int(given["replicas"]) > 1):
        raise ConfigurationError(
            f"{f'components: {scaler}' if scaler else 'replicas'}: nothing is pinned, so several pods "
            "would serve several versions: set MLFLOW_TRACKING_URI to pin one, or answer replicas=1 "
            "and no autoscaling."
        )
    if problem := _environments_problem(given, pin):
        raise ConfigurationError(f"environments: {problem}.")
    if pin.facts.pooling is None and given["pooling"] == "auto":
        raise UnsuitableModelError(
            f"{pin.model_id} does not say how it pools, and TEI would guess: answer pooling=mean, "
            "cls or last-token (its model card says which)."
        )


def _environments_problem(given: Mapping[str, Any], pin: Pin) -> str:
    names = given.get("environments", "").split()
    if len(set(names)) != len(names):
        return f"{given['environments']} names one twice: name each once"
    if names and given["platform"] == "thinkube":
        return "Thinkube deploys one: leave it empty, and make an app of another name for another"
    if names and pin.version is None:
        return "nothing is pinned, so there is no version to move on: set MLFLOW_TRACKING_URI to pin one"
    longest = max((len(overlay.namespace) for overlay in overlays(given)), default=0)
    return (
        "the namespace and a name are more than 63 characters: shorten one" if longest > 63 else ""
    )


@dataclass(frozen=True, slots=True)
class Overlay:
    """One of several environments."""

    name: str
    service: str
    """What the service is called outside of its namespace."""

    namespace: str
    host: str
    follows: bool
    """Serves what is pinned; the others serve what was promoted to them."""


def overlays(given: Mapping[str, Any]) -> list[Overlay]:
    """The environments in their order; none where there is one. The last has the plain names."""
    names = dict.fromkeys(given.get("environments", "").split())
    project, domain = given["project_name"], given["domain_name"]
    return [
        Overlay(
            name,
            service := f"{project}{suffix}",
            f"{given['namespace']}{suffix}",
            f"{service}.{domain}",
            follows=at == 0,
        )
        for at, name in enumerate(names)
        for suffix in ["" if at == len(names) - 1 else f"-{name}"]
    ]


def kustomize_components(components: Iterable[str], replicas: str) -> set[str]:
    """The chosen components, and the disruption budget as soon as there may be a second pod."""
    chosen = set(components)
    several = int(replicas) > 1 or any(name.startswith("autoscaling-") for name in chosen)
    return chosen | {"disruption-budget"} if several else chosen


def truth(value: object) -> bool:
    """A yes/no given as text, read as Copier reads one."""
    return str(value).strip().lower() in {"1", "y", "yes", "t", "true", "on"}
