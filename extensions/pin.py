"""The pin: one model version, resolved once and kept with the answers.

All that the template and the init container know of a model comes from a pin. It is a plain mapping
in the answers file and in the cluster; here it is checked, resolved, and compared with what is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from . import compatibility, embedding_model
from .compatibility import JINA_V3_TASKS
from .embedding_model import EmbeddingModel, Facts, PinnedFile
from .errors import ConfigurationError, NotFoundError, UnsuitableModelError
from .registry import Registry, VersionFolder, registered_name, tracking_uri

JINA_V3 = "jina-embeddings-v3"
"""The conversion of that model: one task's adapter merged into its weights (model_fetch/jina.py)."""

_MOST_CHOICES = 60


@dataclass(frozen=True, slots=True)
class Pin:
    """One version of one registered model, and what TEI needs of it."""

    model_id: str
    """Hugging Face id, or the registered name where no id is known. What clients call the model."""

    registered_model: str
    selector: str
    """What was asked for: latest, a number, or @alias."""

    version: str | None
    """Digits. None when no registry was at hand: model-fetch then resolves `selector` itself."""

    run_id: str | None
    logged_model_id: str | None
    artifact_uri: str | None
    """The folder that `source` of each file is relative to; never runs:/ or models:/."""

    revision: str | None
    """Commit on the Hugging Face Hub, where the mirror kept it."""

    files: tuple[PinnedFile, ...]
    facts: Facts
    conversion: Mapping[str, str] | None = None
    """What model-fetch makes of the files before TEI can load them: `kind`, and the `task` once it is
    answered. None: nothing."""

    remarks: tuple[str, ...] = ()
    """What the rules of compatibility.py say of this version, one sentence each."""

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in the answers file and in pin.json."""
        mapping: dict[str, Any] = {name: getattr(self, name) for name in _TEXTS}
        mapping["files"] = [_file_mapping(file) for file in self.files]
        mapping["facts"] = asdict(self.facts) | {"prompts": dict(self.facts.prompts)}
        if self.conversion is not None:
            mapping["conversion"] = dict(self.conversion)
        if self.remarks:
            mapping["remarks"] = list(self.remarks)
        return mapping

    @classmethod
    def from_mapping(cls, mapping: object) -> Pin:
        """Raises ConfigurationError, in one sentence, when the mapping is no pin."""
        pin = _checked("pin", mapping, dict)
        values: dict[str, Any] = {}
        for name, pattern in _TEXTS.items():
            values[name] = _text(f"pin.{name}", pin.get(name), pattern, name not in _REQUIRED)
        files = _checked("pin.files", pin.get("files"), list)
        parsed = tuple(_file(file) for file in files)
        if len({file.path for file in parsed}) < len(parsed):
            raise ConfigurationError("pin.files names a path twice: resolve the pin again.")
        if values["version"] is not None and (not parsed or values["artifact_uri"] is None):
            raise ConfigurationError(
                "pin.files or pin.artifact_uri is missing though a version is pinned: resolve the "
                "pin again."
            )
        return cls(
            **values,
            files=parsed,
            facts=_parsed_facts(pin.get("facts")),
            conversion=_parsed_conversion(pin.get("conversion")),
            remarks=_parsed_remarks(pin.get("remarks")),
        )


_REQUIRED = frozenset({"model_id", "registered_model", "selector"})
_TEXTS = {
    "model_id": r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?",
    "registered_model": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "selector": r"latest|[1-9][0-9]*|@[A-Za-z0-9_-]+",
    "version": r"[1-9][0-9]*",
    "run_id": r"[0-9A-Za-z_-]+",
    "logged_model_id": r"m-[0-9A-Za-z]+",
    "artifact_uri": r"(?!runs:|models:)[a-z][a-z0-9+.-]*:[^\s]+|/[^\s]*",
    "revision": r"[0-9a-f]{40}",
}


def _checked(name: str, value: object, kind: type) -> Any:
    if not isinstance(value, kind):
        wanted = {"dict": "a mapping", "list": "a list"}[kind.__name__]
        raise ConfigurationError(f"{name} is not {wanted}: resolve the pin again.")
    return value


def _text(name: str, value: object, pattern: str, optional: bool = False) -> str | None:
    if value is None and optional:
        return None
    if isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value):
        return value
    raise ConfigurationError(f"{name} is missing or not what it must be: resolve the pin again.")


def _file(mapping: object) -> PinnedFile:
    file = _checked("an item of pin.files", mapping, dict)
    size = file.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ConfigurationError("pin.files has a file without its size: resolve the pin again.")
    return PinnedFile(
        path=_relative("path", file.get("path")),
        source=_relative("from", file.get("from")),
        size=size,
        sha256=_text("pin.files.sha256", file.get("sha256"), r"[0-9a-f]{64}", optional=True),
        blob_sha1=_text(
            "pin.files.blob_sha1", file.get("blob_sha1"), r"[0-9a-f]{40}", optional=True
        ),
    )


def _relative(name: str, value: object) -> str:
    """A path that stays below the folder it is joined to."""
    path = value if isinstance(value, str) and value.isprintable() else ""
    parts = path.split("/")
    if not path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ConfigurationError(
            f"pin.files has a {name} that leaves the model's folder or is empty: resolve the pin "
            "again."
        )
    return path


def _file_mapping(file: PinnedFile) -> dict[str, Any]:
    mapping: dict[str, Any] = {"path": file.path, "from": file.source, "size": file.size}
    digests = {"sha256": file.sha256, "blob_sha1": file.blob_sha1}
    return mapping | {name: digest for name, digest in digests.items() if digest}


def _parsed_facts(mapping: object) -> Facts:
    facts = _checked("pin.facts", mapping, dict)
    known = {f.name: f.type for f in fields(Facts)}
    values = {name: value for name, value in facts.items() if name in known}
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        fits = {
            "str": isinstance(value, str) and value.isprintable(),
            "str | None": value is None or (isinstance(value, str) and value.isprintable()),
            "int | None": value is None or whole,
            "bool | None": value is None or isinstance(value, bool),
        }.get(str(known[name]), isinstance(value, dict))
        if not fits:
            raise ConfigurationError(f"pin.facts.{name} is not what it must be: resolve it again.")
    prompts = values.get("prompts") or {}
    if "architecture" not in values or not all(
        isinstance(text, str) and text.replace("\n", "").isprintable()
        for item in prompts.items()
        for text in item
    ):
        raise ConfigurationError("pin.facts is not complete: resolve the pin again.")
    # The answers file sorts its keys: what is rendered must not depend on another order.
    return Facts(**(values | {"prompts": dict(sorted(prompts.items()))}))


def _parsed_conversion(mapping: object) -> Mapping[str, str] | None:
    if mapping is None:
        return None
    conversion = _checked("pin.conversion", mapping, dict)
    task = conversion.get("task")
    known = conversion.get("kind") == JINA_V3 and (task is None or task in JINA_V3_TASKS)
    if not known or set(conversion) - {"kind", "task"}:
        raise ConfigurationError(
            f"pin.conversion is not known: it is {{kind: {JINA_V3}, task: one of "
            f"{', '.join(JINA_V3_TASKS)}}}."
        )
    return dict(conversion)


def _parsed_remarks(value: object) -> tuple[str, ...]:
    remarks = _checked("pin.remarks", value if value is not None else [], list)
    if not all(isinstance(remark, str) and remark.isprintable() for remark in remarks):
        raise ConfigurationError("pin.remarks holds what is no sentence: resolve the pin again.")
    return tuple(remarks)


# Resolving


def resolve(model_id: str, selector: str) -> Pin:
    """Ask the registry named by MLFLOW_TRACKING_URI for one version, and read what describes it.

    Args: model_id: Hugging Face id or registered name. selector: latest, a number, or @alias.
    Raises: the errors of errors.py, each one sentence.
    """
    uri = tracking_uri()
    if uri is None:
        raise ConfigurationError("MLFLOW_TRACKING_URI is not set: name the MLflow server in it.")
    registry, name = Registry(uri), registered_name(model_id)
    version = registry.find(name, selector)
    hub_id = version.hub_id
    if hub_id and "/" in model_id and hub_id != model_id:
        raise NotFoundError(
            f"{name} in MLflow at {registry.shown} is a copy of {hub_id}, not of {model_id}: "
            f"answer model_id={hub_id} if you mean it."
        )
    if "/" not in model_id and hub_id and registered_name(hub_id) == name:
        model_id = hub_id
    model = embedding_model.inspect(
        VersionFolder(registry, version), f"Version {version.version} of {name}"
    )
    remarks, converted = _judged(model, f"Version {version.version} of {name}")
    return Pin(
        model_id=model_id,
        registered_model=name,
        selector=selector,
        version=version.version,
        run_id=version.run_id,
        logged_model_id=version.logged_model_id,
        artifact_uri=version.artifact_uri,
        revision=model.revision,
        files=model.files,
        facts=model.facts,
        conversion={"kind": JINA_V3} if converted else None,
        remarks=remarks,
    )


def _judged(model: EmbeddingModel, name: str) -> tuple[tuple[str, ...], bool]:
    """(what the rules remark, whether the model must be converted).

    Raises: UnsuitableModelError when TEI cannot serve it on any hardware.
    """
    files = {**dict.fromkeys(file.path for file in model.files), **model.configs}
    converted = compatibility.Model(files).is_jina_v3
    # Pooling and task are questions of the template: that they are open is nothing against a model.
    task = JINA_V3_TASKS[0] if converted else None
    pooling = model.facts.pooling or "as answered"
    findings = compatibility.check(files, task=task, pooling=pooling, tensors=model.tensors)
    if refused := compatibility.refusal(findings):
        raise UnsuitableModelError(f"{name} cannot be served by TEI: {refused}")
    told = (compatibility.FIXED, compatibility.WARNED)
    remarks = [f.message for f in findings if f.outcome in told and f.rule != "conversion"]
    return tuple(embedding_model.printable(remark) for remark in remarks), converted


def stale(pin: Pin, model_id: str, selector: str) -> str:
    """Why a pin is not what is asked for now; empty when it is."""
    if pin.registered_model != registered_name(model_id):
        return f"the pin is of {pin.model_id}, not of {model_id}"
    if selector not in (pin.selector, pin.version):
        return f"the pin is of version {pin.selector}, not of {selector}"
    return ""


def choices() -> list[tuple[str, str]]:
    """(label, model id) of each registered model that TEI could serve; version and size in the label.

    Raises: NotFoundError when there is none.
    """
    uri = tracking_uri()
    if uri is None:
        raise ConfigurationError("MLFLOW_TRACKING_URI is not set: name the MLflow server in it.")
    from concurrent.futures import ThreadPoolExecutor  # model-fetch never comes here

    registry = Registry(uri)
    names = registry.names()
    with ThreadPoolExecutor(8) as pool:
        described = pool.map(lambda name: _choice(registry, name), names[:_MOST_CHOICES])
        found = [choice for choice in described if choice]
    found += [(name, name) for name in names[_MOST_CHOICES:]]
    if not found:
        raise NotFoundError(
            f"MLflow at {registry.shown} has no embedding model: register one first."
        )
    return found


def _choice(registry: Registry, name: str) -> tuple[str, str] | None:
    try:
        version = registry.find(name, "latest")
        size = embedding_model.weights_size(VersionFolder(registry, version), name)
    except (NotFoundError, UnsuitableModelError):
        return None
    hub_id = version.hub_id
    value = hub_id if hub_id and registered_name(hub_id) == name else name
    return f"{value}, version {version.version}, {size / 1e6:,.0f} MB", value
