"""The pin: one model version, resolved once and kept with the answers.

All that the template and the init container know of a model comes from a pin. It is a plain mapping
in the answers file and in the cluster; here it is checked, resolved, and compared with what is asked.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

from . import compatibility, embedding_model, reading
from .compatibility import JINA_V3_TASKS
from .embedding_model import EmbeddingModel, Facts, PinnedFile
from .errors import ConfigurationError, NotFoundError, UnsuitableModelError
from .reading import UnreadableError
from .registry import (
    WORKSPACE,
    ModelVersion,
    Registry,
    VersionFolder,
    registered_name,
    tracking_uri,
    workspace,
)

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

    input_tokens: int | None = None
    """Longest input that is served, where that is less than the model takes; model-fetch writes it into
    the model's files. None: as those say."""

    remarks: tuple[str, ...] = ()
    """What the rules of compatibility.py say of this version, one sentence each."""

    workspace: str | None = None
    """Of the MLflow server, from 3.10 on; None where it has none, or the usual one is meant."""

    def to_mapping(self) -> dict[str, Any]:
        """As it stands in the answers file and in pin.json."""
        mapping: dict[str, Any] = {name: getattr(self, name) for name in _TEXTS}
        mapping["files"] = [_file_mapping(file) for file in self.files]
        mapping["facts"] = asdict(self.facts) | {"prompts": dict(self.facts.prompts)}
        if self.conversion is not None:
            mapping["conversion"] = dict(self.conversion)
        if self.input_tokens is not None:
            mapping["input_tokens"] = self.input_tokens
        if self.remarks:
            mapping["remarks"] = list(self.remarks)
        if self.workspace is not None:
            mapping["workspace"] = self.workspace
        return mapping

    def with_fetched(self, marker: object) -> Pin:
        """The pin with the SHA-256 of each file that model-fetch has fetched.

        marker: of the version's folder (model_fetch/cache.py)
        Raises: ConfigurationError when it is of something else.
        """
        try:
            fields = reading.mapping(marker, "the marker")
            digests = reading.mapping(fields.get("fetched"), "fetched")
            known = {
                path: reading.text(value, "a digest", _SHA256) for path, value in digests.items()
            }
            of = Pin(**_parsed(reading.mapping(fields.get("pin"), "its pin")))
        except UnreadableError as error:
            raise ConfigurationError(f"That is no marker of model-fetch: {error}.") from None
        named = f"version {self.version} of {self.registered_model}"
        if self.version is None:
            raise ConfigurationError("Nothing is pinned yet: run `make update-model` first.")
        if self._place != of._place:
            raise ConfigurationError(
                f"What was fetched is version {of.version} of {of.registered_model}, not {named} as "
                "it is pinned: deploy what is pinned first."
            )
        for file in self.files:
            if file.sha256 and known.get(file.path, file.sha256) != file.sha256:
                raise ConfigurationError(
                    f"What was fetched is not {named}: {file.path} has another SHA-256 than the pin."
                )
        return self._digested(replace(file, sha256=known.get(file.path)) for file in of.files)

    def with_digests_of(self, earlier: Pin) -> Pin:
        """The pin with the SHA-256 that an earlier pin of the same version has of its files."""
        return self._digested(earlier.files) if self._place == earlier._place else self

    @property
    def _place(self) -> tuple[str | None, ...]:
        """What tells versions apart: the files of one never change."""
        return (self.registered_model, self.version, self.run_id, self.artifact_uri)

    def _digested(self, known: Iterable[PinnedFile]) -> Pin:
        found = {(file.path, file.source, file.size): file.sha256 for file in known}
        files = (
            file
            if file.sha256
            else replace(file, sha256=found.get((file.path, file.source, file.size)))
            for file in self.files
        )
        return replace(self, files=tuple(files))

    @classmethod
    def from_mapping(cls, mapping: object) -> Pin:
        """Raises ConfigurationError, in one sentence, when the mapping is no pin."""
        try:
            return cls(**_parsed(reading.mapping(mapping, "pin")))
        except UnreadableError as error:
            raise ConfigurationError(f"{error}: resolve the pin again.") from None


_SHA256 = "[0-9a-f]{64}"
_REQUIRED = frozenset({"model_id", "registered_model", "selector"})
_TEXTS = {
    "model_id": r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?",
    "registered_model": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "selector": r"latest|[1-9][0-9]*|@[A-Za-z0-9_-]+",
    "version": r"[1-9][0-9]*",
    "run_id": r"[0-9A-Za-z_-]+",
    "logged_model_id": r"m-[0-9A-Za-z]+",
    "artifact_uri": r"(?!runs:|models:)[a-z][a-z0-9+.-]*:\S(.*\S)?|/(.*\S)?",
    "revision": r"[0-9a-f]{40}",
}
_ONE_OF = {
    "pooling": ("cls", "mean", "last-token"),
    "dtype": ("float32", "float16", "bfloat16"),
}
_OWN_ENDINGS = (".new", ".client")
"""Of the files that model-fetch writes beside a file while it makes it (prepare.py, sources.py)."""

_MOST_FILES = 5_000
_LONGEST_PATH = 1_024


def _parsed(pin: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        name: _text(f"pin.{name}", pin.get(name), pattern, name not in _REQUIRED)
        for name, pattern in _TEXTS.items()
    }
    if values["artifact_uri"] is not None:
        check_address(values["artifact_uri"])
    files = reading.items(pin.get("files"), "pin.files")
    if len(files) > _MOST_FILES:
        raise UnreadableError(f"pin.files names more than {_MOST_FILES} files")
    values["files"] = tuple(_file(file) for file in files)
    _check_names([file.path for file in values["files"]])
    if values["version"] is not None and (not files or values["artifact_uri"] is None):
        raise UnreadableError("pin.files or pin.artifact_uri is missing though a version is pinned")
    values["workspace"] = _text("pin.workspace", pin.get("workspace"), WORKSPACE, optional=True)
    values["facts"] = _parsed_facts(pin.get("facts"))
    values["conversion"] = _parsed_conversion(pin.get("conversion"))
    tokens = pin.get("input_tokens")
    values["input_tokens"] = None if tokens is None else reading.count(tokens, "pin.input_tokens")
    values["remarks"] = tuple(
        _text("an item of pin.remarks", remark, r"[^\0]*")
        for remark in reading.items(pin.get("remarks") or [], "pin.remarks")
    )
    return values


def _text(name: str, value: object, pattern: str, optional: bool = False) -> str | None:
    if value is None:
        if optional:
            return None
        raise UnreadableError(f"{name} is missing")
    text = reading.text(value, name, pattern)
    if not text.isprintable():
        raise UnreadableError(f"{name} is not printable")
    return text


def check_address(uri: str) -> None:
    """Refuse an artifact URI that holds a login: it would be kept with the answers, for all to read.

    Raises: UnreadableError.
    """
    try:
        parts = urlsplit(uri)
        login, at, _ = parts.netloc.rpartition("@")
        _ = parts.port
    except ValueError:
        raise UnreadableError("pin.artifact_uri is not an address") from None
    web = parts.scheme in ("http", "https", "mlflow-artifacts")
    # Of other stores the part before the @ may be a name: wasbs://container@account, sftp://user@host.
    if ":" in login or (web and (at or parts.query)):
        raise UnreadableError(
            "pin.artifact_uri holds a login, and store keys belong to the environment: have the "
            "registry keep the artifact's address without it"
        )


def _file(value: object) -> PinnedFile:
    file = reading.mapping(value, "an item of pin.files")
    return PinnedFile(
        path=_relative("path", file.get("path")),
        source=_relative("from", file.get("from")),
        size=reading.count(file.get("size"), "pin.files: size"),
        sha256=_text("pin.files.sha256", file.get("sha256"), _SHA256, optional=True),
        blob_sha1=_text(
            "pin.files.blob_sha1", file.get("blob_sha1"), r"[0-9a-f]{40}", optional=True
        ),
    )


def _relative(name: str, value: object) -> str:
    """A path that stays below the folder it is joined to."""
    path = value if isinstance(value, str) and value.isprintable() else ""
    parts = path.split("/")
    if "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise UnreadableError(f"pin.files has a {name} that leaves the model's folder or is empty")
    if len(path) > _LONGEST_PATH or any(len(part.encode()) > 255 for part in parts):
        raise UnreadableError(f"pin.files has a {name} that is longer than a file's name can be")
    return path


def _check_names(paths: Iterable[str]) -> None:
    """Refuse what cannot stand together in one folder, on any volume, or is model-fetch's own.

    SMB and Azure Files know no case and drop a dot or a space at the end.
    """
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        if any(p[0] == "." or p[-1] in ". " for p in parts) or path.endswith(_OWN_ENDINGS):
            raise UnreadableError("pin.files has a path that is kept for model-fetch itself")
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in files:
            raise UnreadableError("pin.files names a path twice")
        files.add(folded)
        folders.update(folded.rsplit("/", depth)[0] for depth in range(1, len(parts)))
    if files & folders:
        raise UnreadableError("pin.files names a path that is also a folder")


def _file_mapping(file: PinnedFile) -> dict[str, Any]:
    mapping: dict[str, Any] = {"path": file.path, "from": file.source, "size": file.size}
    digests = {"sha256": file.sha256, "blob_sha1": file.blob_sha1}
    return mapping | {name: digest for name, digest in digests.items() if digest}


def _parsed_facts(mapping: object) -> Facts:
    facts = reading.mapping(mapping, "pin.facts")
    known = {f.name: f.type for f in fields(Facts)}
    values = {n: value for n, value in facts.items() if n in known and value is not None}
    for name, value in values.items():
        kind = str(known[name])
        fits = {
            "str": isinstance(value, str) and value.isprintable(),
            "str | None": isinstance(value, str) and value.isprintable(),
            "int | None": embedding_model.positive(value) is not None,
            "bool | None": isinstance(value, bool),
        }.get(kind, isinstance(value, dict))
        if not fits or value not in _ONE_OF.get(name, (value,)):
            raise UnreadableError(f"pin.facts.{name} is not what it must be")
    prompts = values.get("prompts", {})
    if "architecture" not in values or not all(
        isinstance(text, str) and text.replace("\n", "").isprintable()
        for item in prompts.items()
        for text in item
    ):
        raise UnreadableError("pin.facts is not complete")
    # The answers file sorts its keys: what is rendered must not depend on another order.
    return Facts(**(values | {"prompts": dict(sorted(prompts.items()))}))


def _parsed_conversion(mapping: object) -> Mapping[str, str] | None:
    if mapping is None:
        return None
    conversion = reading.mapping(mapping, "pin.conversion")
    task = conversion.get("task")
    known = conversion.get("kind") == JINA_V3 and (task is None or task in JINA_V3_TASKS)
    if not known or set(conversion) - {"kind", "task"}:
        raise UnreadableError(
            f"pin.conversion is not {{kind: {JINA_V3}, task: one of {', '.join(JINA_V3_TASKS)}}}"
        )
    return dict(conversion)


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
    hub_id = _mirrored(version, name)
    if hub_id and "/" in model_id and hub_id != model_id:
        raise NotFoundError(
            f"{name} in MLflow at {registry.shown} is a copy of {hub_id}, not of {model_id}: "
            f"answer model_id={hub_id} if you mean it."
        )
    title = f"Version {version.version} of {name}"
    model = embedding_model.inspect(VersionFolder(registry, version), title)
    remarks, converted = _judged(model, title)
    pin = Pin(
        model_id=hub_id or model_id,
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
        workspace=workspace(),
    )
    try:
        return Pin(**_parsed(pin.to_mapping()))
    except UnreadableError as error:
        raise UnsuitableModelError(f"{title} cannot be pinned: {error}.") from None


def _mirrored(version: ModelVersion, name: str) -> str | None:
    """The Hugging Face id that a version is a mirror of.

    A run's parameter `model_id` is that of its own model only where it was registered by that name:
    many who fine-tune a model log the id of its base so.
    """
    hub_id = version.hub_id
    return hub_id if hub_id and registered_name(hub_id) == name else None


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
    value = _mirrored(version, name) or name
    return f"{value}, version {version.version}, {size / 1e6:,.0f} MB", value
