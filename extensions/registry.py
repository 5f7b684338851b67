"""MLflow: find a model version, list its files with sizes, read a small file of it.

All requests go through the official client's own transport (`mlflow.utils.rest_utils`), so its
authentication, TLS settings, plug-ins and retries hold. `mlflow` is imported only here, and only
when a lookup happens. Works with servers 3.4.0 and 3.17.2, whatever their artifact store: listings
and small files are asked of the tracking server, which has the store's keys. Weights never travel.
"""

from __future__ import annotations

import copy
import difflib
import os
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from . import limits, reading
from .addresses import BadAddress, checked, joined, origin
from .embedding_model import Entry
from .errors import (
    ConfigurationError,
    DeniedError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    UnsuitableModelError,
    repeats,
)
from .reading import UnreadableError, count, items, mapping, text

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,190}")
"""Registered names that are offered or shown. MLflow allows more; other names stay unsaid."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TIMEOUT_S = 20
_RETRIES = 2
_MODELS_PER_PAGE = 200  # with their texts and versions, 8 MiB have room for them
_COPIES = 5
"""Steps from a copied version to the one that it was copied from."""

_TOKEN = re.compile(r"[\x21-\x7e]+")
"""What can stand in a header (RFC 6750 allows less)."""

WORKSPACE = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
"""Name of a workspace (mlflow/store/workspace/abstract_store.py, 3.17.2)."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a registered model, and where its files are."""

    registered_model: str
    version: str
    """Digits."""

    run_id: str | None
    logged_model_id: str | None
    """`m-…` where the version is an MLflow 3 logged model."""

    artifact_uri: str
    """Where the files are: resolved, never runs:/ or models:/."""

    hub_id: str | None
    """Hugging Face id, where the mirroring run recorded it (parameter `model_id`)."""

    folder: str
    """Below the artifacts of the run; '' for a logged model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said, whole."""

    status: int
    content_type: str
    encoded: bool
    """It was compressed on the way, though it was asked not to be."""

    location: str
    """Where a redirect leads; '' for none."""

    body: bytes


def registered_name(model_id: str) -> str:
    """The name under which a Hugging Face id is registered: MLflow refuses '/' in names."""
    return model_id.replace("/", "-")


def tracking_uri() -> str | None:
    """MLFLOW_TRACKING_URI, or None when there is no registry at hand.

    Raises: ConfigurationError when it is no http(s) address.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return None
    _checked("MLFLOW_TRACKING_URI", uri)
    return uri.rstrip("/")


def workspace(environ: Mapping[str, str] = os.environ) -> str | None:
    """MLFLOW_WORKSPACE: which of the server's workspaces is asked (MLflow 3.10 and newer).

    Raises: ConfigurationError when it is no name of one.
    """
    name = environ.get("MLFLOW_WORKSPACE", "").strip()
    if name and not re.fullmatch(WORKSPACE, name):
        raise ConfigurationError("MLFLOW_WORKSPACE is not the name of a workspace: check it.")
    return name or None


def _as_mlflow(method: Callable[..., Result]) -> Callable[..., Result]:
    """Tell an answer that is not of MLflow's form as one."""

    @wraps(method)
    def asking(registry: Registry, *args: Any, **kwargs: Any) -> Result:
        try:
            return method(registry, *args, **kwargs)
        except UnreadableError as error:
            told = "" if "JSON" in str(error) else f" ({_word(error)})"
            raise UnreachableError(
                f"{registry.shown} answers, but not as MLflow does{told}: check "
                "MLFLOW_TRACKING_URI, and whether a login page stands before it."
            ) from None

    return asking


def _checked(variable: str, url: str) -> None:
    try:
        checked(url)
    except BadAddress as error:
        raise ConfigurationError(
            f"{variable} is not the address of a server ({error}): use http(s)://host[:port]."
        ) from None


class Registry:
    """A connection to one MLflow server."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        parts = urlsplit(uri)
        self.shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        """The address without user and password."""
        self._until = time.monotonic() + limits.LOOKUP_SECONDS
        try:
            self._credentials = _host_credentials(uri)
        except ModuleNotFoundError:
            raise ConfigurationError(
                "MLFLOW_TRACKING_URI is set, but MLflow's client is not installed here: install "
                "mlflow-skinny beside copier, or unset the variable."
            ) from None

    # Model versions

    @_as_mlflow
    def names(self) -> list[str]:
        """Names of the registered models, in MLflow's order."""
        names: list[str] = []
        url = "/api/2.0/mlflow/registered-models/search"
        for row in self._rows(url, "registered_models", max_results=_MODELS_PER_PAGE):
            name = text(row.get("name", ""), "a name")
            if NAME.fullmatch(name):
                names.append(name)
            if len(names) == limits.MODELS:
                break
        return names

    def _rows(self, url: str, key: str, **params: Any) -> Iterator[dict[str, Any]]:
        """The rows of all pages of a listing.

        Raises: UnreachableError when it does not end.
        """
        seen = {""}
        token = ""
        for _ in range(limits.PAGES):
            answer = self._found(url, None, page_token=token, **params) or {}
            for row in items(answer.get(key, []), key):
                yield mapping(row, f"an item of {key}")
            token = text(answer.get("next_page_token") or "", "next_page_token")
            if not token:
                return
            if token in seen:
                break
            seen.add(token)
        raise UnreachableError(
            f"MLflow at {self.shown} gives pages without end: check the server, and what stands "
            "before it."
        )

    @_as_mlflow
    def find(self, name: str, selector: str) -> ModelVersion:
        """The version that `selector` names: latest (the highest number), a number, or @alias.

        Raises: NotFoundError (with the closest names), UnsuitableModelError, and what requests raise.
        """
        row = self._row(name, selector)
        version = self._ready(name, row)
        title = f"Version {version} of {name}"
        for _ in range(_COPIES):
            # copy_model_version: the version stands for another one (MlflowClient).
            source = text(row.get("source", ""), "source")
            copied = re.fullmatch(r"models:/(.+?)(?:/([1-9][0-9]*)|(@[A-Za-z0-9_-]+))", source)
            if copied is None:
                return self._locate(name, version, row)
            of, number, alias = copied.groups()
            url, asked = "registered-models/alias", {"name": of, "alias": (alias or "")[1:]}
            if number:
                url, asked = "model-versions/get", {"name": of, "version": number}
            found = self._found(f"/api/2.0/mlflow/{url}", **asked)
            if found is None:
                raise UnsuitableModelError(
                    f"{title} is a copy of {_word(source)}, which is gone: register it again."
                )
            row = found
            self._ready(_word(of), row)
        raise UnsuitableModelError(f"{title} is a copy of copies without end: register it again.")

    def _ready(self, name: str, row: Mapping[str, Any]) -> str:
        """The number of a version that is complete."""
        version = str(row.get("version", ""))[:30]
        if not re.fullmatch(r"[1-9][0-9]{0,17}", version):
            raise UnreachableError(f"MLflow at {self.shown} gave {name} no version number.")
        status = text(row.get("status", "READY"), "status")
        if status != "READY":
            raise UnsuitableModelError(
                f"Version {version} of {name} is not ready ({_word(status)}): wait for its "
                "registration or choose another version."
            )
        return version

    def _row(self, name: str, selector: str) -> Mapping[str, Any]:
        api = "/api/2.0/mlflow"
        if selector == "latest":
            answer = self._json(
                f"{api}/model-versions/search",
                filter=f"name='{name}'",
                max_results=1,
                order_by="version_number DESC",
            )
            rows = items(answer.get("model_versions", []), "model_versions")
            row = mapping(rows[0], "a model version") if rows else None
        elif selector.startswith("@"):
            row = self._found(f"{api}/registered-models/alias", name=name, alias=selector[1:])
        else:
            row = self._found(f"{api}/model-versions/get", name=name, version=selector)
        if row is not None:
            return mapping(row, "the model version")
        known = self._found(f"{api}/registered-models/get", "registered_model", name=name)
        if known is None:
            raise NotFoundError(self._unknown(name))
        if selector == "latest":
            raise NotFoundError(f"{name} has no version in MLflow at {self.shown}: register one.")
        lacking = self._lacking(name, selector, mapping(known, "the registered model"))
        raise NotFoundError(f"{name} has no {lacking}")

    def _lacking(self, name: str, selector: str, known: Mapping[str, Any]) -> str:
        if selector.startswith("@"):
            rows = items(known.get("aliases", []), "aliases")
            aliases = [f"@{_word(mapping(a, 'an alias').get('alias'))}" for a in rows]
            what, have = f"alias {selector}", f"its aliases are {', '.join(sorted(aliases)[:10])}"
            return f"{what}: {have if aliases else 'it has no alias at all'}."
        answer = self._json(
            "/api/2.0/mlflow/model-versions/search",
            filter=f"name='{name}'",
            max_results=10,
            order_by="version_number DESC",
        )
        found = items(answer.get("model_versions", []), "model_versions")
        versions = [_word(mapping(row, "a model version").get("version")) for row in found]
        return f"version {selector}: it has {', '.join(versions) or 'none'}."

    def _unknown(self, name: str) -> str:
        names = self.names()
        if not names:
            return f"MLflow at {self.shown} has no registered model: register {name} first."
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:3]
        return (
            f"MLflow at {self.shown} has no registered model {name}: "
            f"the closest names are {', '.join(close)}."
        )

    def _locate(self, name: str, version: str, row: Mapping[str, Any]) -> ModelVersion:
        """Follow the version's source to the artifacts (facts: it may be runs:/, models:/, or raw)."""
        source = text(row.get("source", ""), "source")
        run_id = text(row.get("run_id") or "", "run_id", r"[0-9A-Za-z_-]*")
        if logged := re.fullmatch(r"models:/(m-[0-9A-Za-z]+)", source):
            return self._logged(name, version, logged[1])
        if run := re.fullmatch(r"runs:/([0-9A-Za-z]+)(?:/(.*))?", source):
            info, hub_id = self._run(run[1], f"version {version} of {name}")
            folder = _folder(run[2] or "")
            root = text(info.get("artifact_uri", ""), "artifact_uri", ".+").rstrip("/")
            if self._run_entries(run[1], folder):
                uri = _below(root, folder)
                return ModelVersion(name, version, run[1], None, uri, hub_id, folder)
            experiment = str(info.get("experiment_id", ""))[:80]
            logged_id = self._logged_of_run(run[1], folder, experiment) if folder else None
            if logged_id:
                return self._logged(name, version, logged_id)
            raise UnsuitableModelError(
                f"Version {version} of {name} has no files: its run holds nothing at "
                f"'{_word(folder)}'; register it again."
            )
        if run_id:
            info, hub_id = self._run(run_id, f"version {version} of {name}")
            root = text(info.get("artifact_uri", ""), "artifact_uri").rstrip("/")
            if root and f"{source}/".startswith(f"{root}/"):
                folder = _folder(source[len(root) :])
                uri = _below(root, folder)
                return ModelVersion(name, version, run_id, None, uri, hub_id, folder)
        raise UnsuitableModelError(
            f"Version {version} of {name} points outside of its run's artifacts: register it from "
            "a run or a logged model."
        )

    def _logged(self, name: str, version: str, model_id: str) -> ModelVersion:
        model = self._found(f"/api/2.0/mlflow/logged-models/{model_id}", "model")
        model = mapping(model or {}, "the logged model")
        info = mapping(model.get("info", {}), "its info")
        if not info.get("artifact_uri"):
            raise UnsuitableModelError(
                f"Version {version} of {name} points to a logged model that is gone: register "
                "it again."
            )
        status = str(info.get("status", "LOGGED_MODEL_READY"))[:80]
        if status not in ("LOGGED_MODEL_READY", "2"):
            raise UnsuitableModelError(
                f"Version {version} of {name} is not complete ({_word(status)}): log it again."
            )
        run_id = text(info.get("source_run_id") or "", "source_run_id", r"[0-9A-Za-z_-]*") or None
        params = mapping(model.get("data", {}), "its data").get("params", [])
        uri = _below(text(info["artifact_uri"], "artifact_uri").rstrip("/"), "")
        return ModelVersion(name, version, run_id, model_id, uri, _hub_id(params), "")

    def _run(self, run_id: str, of: str) -> tuple[Mapping[str, Any], str | None]:
        run = self._found("/api/2.0/mlflow/runs/get", "run", run_id=run_id)
        if run is None:
            raise UnsuitableModelError(f"The run of {of} is gone: register the model again.")
        run = mapping(run, "the run")
        data = mapping(run.get("data", {}), "the run's data")
        return mapping(run.get("info", {}), "the run's info"), _hub_id(data.get("params", []))

    def _logged_of_run(self, run_id: str, name: str, experiment_id: str) -> str | None:
        """MLflow 3 resolves runs:/R/name to the logged model of that name, if the run has no files."""
        answer = self._json(
            "/api/2.0/mlflow/logged-models/search",
            body={"experiment_ids": [experiment_id], "filter": f"name = '{_word(name)}'"},
        )
        for model in items(answer.get("models", []), "models"):
            info = mapping(mapping(model, "a logged model").get("info", {}), "its info")
            if info.get("source_run_id") == run_id:
                return text(info.get("model_id", ""), "model_id", r"(m-[0-9A-Za-z]+)?") or None
        return None

    # Files

    def _run_entries(self, run_id: str, path: str) -> list[Entry]:
        return self._entries("/api/2.0/mlflow/artifacts/list", path, run_id=run_id, path=path)

    @_as_mlflow
    def entries(self, version: ModelVersion, path: str) -> list[Entry]:
        """What stands directly in a folder of the version ('' is its root), with sizes in bytes."""
        if version.logged_model_id:
            url = f"/api/2.0/mlflow/logged-models/{version.logged_model_id}/artifacts/directories"
            return self._entries(url, path, artifact_directory_path=path)
        below = "/".join(p for p in (version.folder, path) if p)
        listed = self._run_entries(str(version.run_id), below)
        prefix = f"{version.folder}/" if version.folder else ""
        return [Entry(e.path.removeprefix(prefix), e.size) for e in listed]

    def _entries(self, url: str, folder: str, **params: str) -> list[Entry]:
        entries: list[Entry] = []
        for row in self._rows(url, "files", **params):
            path = text(row.get("path", ""), "a file's path")
            inside = path.startswith(f"{folder}/") if folder else True
            # A listing is untrusted: what does not stand in the folder asked for is not there.
            if not inside or ".." in path.split("/") or not path.isprintable():
                continue
            size = row.get("file_size", 0)
            if isinstance(size, str) and re.fullmatch(r"[0-9]{1,16}", size):
                size = int(size)  # as protobuf writes an int64
            entries.append(Entry(path, None if row.get("is_dir") else count(size, "file_size")))
            if len(entries) > limits.ENTRIES:
                raise UnreachableError(
                    f"MLflow at {self.shown} lists more than {limits.ENTRIES} files in one folder: "
                    "register the model's folder alone."
                )
        return entries

    @_as_mlflow
    def read(self, version: ModelVersion, path: str, size: int | None = None) -> bytes:
        """A small file of the version, whole. Never call it for weights: see MLflow's get-artifact.

        Args: size: what the listing says, in bytes; another size is refused.
        """
        most = limits.ANSWER_BYTES if size is None else min(size, limits.ANSWER_BYTES)
        doing = f"reading {_word(path)}"
        if version.logged_model_id:
            url = f"/ajax-api/2.0/mlflow/logged-models/{version.logged_model_id}/artifacts/files"
            answer = self._ask(url, most=most, artifact_file_path=path)
        else:
            below = "/".join(p for p in (version.folder, path) if p)
            answer = self._ask("/get-artifact", most=most, run_id=str(version.run_id), path=below)
        if answer.status != 200:
            raise self._failure(answer, doing)
        if size is not None and len(answer.body) != size:
            raise UnreachableError(
                f"MLflow at {self.shown} failed at {doing} ({len(answer.body)} bytes, and listed "
                f"with {size}): register the model again, or look into the server's log."
            )
        return answer.body

    @_as_mlflow
    def head(self, version: ModelVersion, path: str, size: int) -> bytes | None:
        """The first bytes of a large file; None where the server cannot send a part of it.

        Only proxied artifacts on the server's own disk, from MLflow 3.15 on, answer a range
        without reading the whole file; everything else would make the server fetch the weights.
        """
        root = re.fullmatch(r"mlflow-artifacts:/+(.*)", version.artifact_uri)
        if root is None or not self._serves_ranges():
            return None
        url = f"/api/2.0/mlflow-artifacts/artifacts/{quote(f'{unquote(root[1])}/{path}')}"
        part = self._ask(url, most=size, headers={"Range": f"bytes=0-{size - 1}"})
        return part.body if part.status == 206 and not part.encoded else None

    def _serves_ranges(self) -> bool:
        answer = self._ask("/version", most=limits.ERROR_BYTES)
        said = answer.body.decode("latin-1") if answer.status == 200 else ""
        numbers = re.match(r"(\d+)\.(\d+)", said)
        if numbers and len(numbers[0]) > 20:
            raise UnreadableError("its version is none")
        if not numbers or (int(numbers[1]), int(numbers[2])) < (3, 15):
            return False
        info = self._ask("/api/3.0/mlflow/server-info")
        return info.status == 200 and self._parsed(info).get("multipart_downloads_enabled") is False

    # Requests

    def _json(self, url: str, body: object = None, **params: Any) -> dict[str, Any]:
        """A JSON answer that must be there."""
        answer = self._ask(url, body, **params)
        if answer.status != 200:
            raise self._failure(answer, f"asking {url}")
        return self._parsed(answer)

    def _found(self, url: str, key: str | None = "model_version", **params: Any) -> Any:
        """A part of a JSON answer, or None when the server knows no such thing."""
        answer = self._ask(url, **params)
        if answer.status in (400, 404) and "json" in answer.content_type:
            code = self._parsed(answer).get("error_code")
            # A missing alias is a 400 INVALID_PARAMETER_VALUE, all else a 404.
            if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                return None
        if answer.status != 200:
            raise self._failure(answer, f"asking {url}")
        said = self._parsed(answer)
        return said if key is None else said.get(key)

    def _parsed(self, answer: Answer) -> dict[str, Any]:
        return mapping(reading.document(answer.body, "the answer"), "the answer")

    def _ask(
        self,
        url: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        most: int = limits.ANSWER_BYTES,
        **params: Any,
    ) -> Answer:
        """One request; raises TemplateErrors for what stops every request.

        Args: most: bytes of the answer, after decompression.
        """
        asked = {k: v for k, v in params.items() if v != ""}
        what: dict[str, Any] = {"params": asked} if body is None else {"json": body}
        host, endpoint = self._credentials.host, url
        for _ in range(limits.REDIRECTS):
            answer = self._send(host, endpoint, headers or {}, most, **what)
            if answer.status not in (301, 302, 303, 307, 308):
                break
            host, endpoint = self._redirected(f"{host}{endpoint}", answer.location)
            if body is None or answer.status in (301, 302, 303):
                what = {}
        else:
            raise UnreachableError(f"MLflow at {self.shown} redirects without end: check it.")
        if answer.status in (401, 403):
            raise self._denied(answer)
        return answer

    def _send(
        self, host: str, endpoint: str, headers: Mapping[str, str], most: int, **what: Any
    ) -> Answer:
        """One request and its answer, within the limits of bytes and of time."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.rest_utils import http_request
        from urllib3.exceptions import HTTPError

        retries = _from_environment("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
        timeout = _from_environment("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT_S)
        seconds = limits.ANSWER_SECONDS if timeout == _TIMEOUT_S else float(timeout)
        credentials = _at(self._credentials, host)
        method = "POST" if "json" in what else "GET"

        def ask() -> Any:
            return http_request(
                credentials,
                endpoint,
                method,
                max_retries=retries,
                timeout=timeout,
                raise_on_status=False,
                # oauth2-proxy shows a login page (403) to who does not ask for JSON.
                extra_headers={
                    "Accept-Encoding": "identity",
                    "Accept": "application/json",
                    **headers,
                },
                stream=True,
                allow_redirects=False,
                **what,
            )

        try:
            # MLflow waits 2, 4, 8 … seconds between its tries.
            response = self._within(seconds * (retries + 1) + 2 ** (retries + 1), ask)
        except (MlflowException, _TooLong) as error:
            raise _unreachable(error, f"MLflow at {self.shown}") from None
        try:
            return self._within(seconds, lambda: _whole(response, most))
        except (_TooLong, OSError, HTTPError) as error:
            raise _unreachable(error, f"MLflow at {self.shown}") from None

    def _within(self, seconds: float, work: Callable[[], Result]) -> Result:
        """What `work` returns, if it is done in time, as this request and as part of the look-up."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise UnreachableError(
                f"MLflow at {self.shown} is too slow: its answers took {limits.LOOKUP_SECONDS:.0f} "
                "seconds; look into the server's log, then try again."
            )
        return within(min(seconds, left), work)

    def _redirected(self, url: str, location: str) -> tuple[str, str]:
        """(host, path with query) of a redirect that stays with the server that was named."""
        try:
            target = joined(url, location)
            was, now = origin(checked(url)), origin(target)
        except BadAddress:
            was, now = ("", "", 0), ("", "", 1)
        upgraded = ("http", was[1], 80) == was and ("https", was[1], 443) == now
        if not location or (now != was and not upgraded):
            raise UnreachableError(
                f"MLflow at {self.shown} leads elsewhere (HTTP redirect): name its own address in "
                "MLFLOW_TRACKING_URI, and see whether a login page stands before it."
            )
        scheme, _, rest = target.partition("://")
        authority, slash, path = rest.partition("/")
        return f"{scheme}://{authority}", f"{slash}{path}"

    def _denied(self, answer: Answer) -> TemplateError:
        if b"Invalid Host header" in answer.body[:500]:
            return DeniedError(
                f"MLflow at {self.shown} refuses its own host name (403): start the server with "
                "--allowed-hosts that includes it."
            )
        creds = self._credentials
        given = creds.token or creds.username or creds.auth
        if answer.status == 403 and "html" not in answer.content_type:
            return DeniedError(
                f"MLflow at {self.shown} does not let this login read the model (403): ask for "
                "READ permission on it."
            )
        if given:
            return DeniedError(
                f"MLflow at {self.shown} refuses the credentials of the environment "
                f"({answer.status}): check user, password or token, and whether it has expired."
            )
        return DeniedError(
            f"MLflow at {self.shown} wants a login ({answer.status}): set MLFLOW_TRACKING_TOKEN, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the MLFLOW_KEYCLOAK_* "
            "variables."
        )

    def _failure(self, answer: Answer, doing: str) -> TemplateError:
        detail = ""
        if "json" in answer.content_type:
            detail = _word(self._parsed(answer).get("error_code", ""))
        return UnreachableError(
            f"MLflow at {self.shown} failed at {doing} (HTTP {answer.status}"
            f"{', ' + detail if detail else ''}): look into the server's log."
        )


class _TooLong(Exception):
    """An answer took too long, or has too many bytes."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` returns or raises; _TooLong when it is not done in time.

    A read that a server keeps alive byte by byte cannot be stopped from outside, so it is left to a
    thread that nobody waits for.
    """
    done: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="request", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise _TooLong("timed out") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _whole(response: Any, most: int) -> Answer:
    """The answer, in at most `most` bytes, also after decompression.

    Raises: _TooLong when it has more.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    encoded = encoding not in ("", "identity")
    try:
        # What cannot be made smaller becomes a little larger (RFC 1951, stored blocks).
        coming = most + 1 + (most // 1000 + 1024 if encoded else 0)
        body = bytes(response.raw.read(coming, decode_content=False))
        if encoded:
            if encoding not in ("gzip", "x-gzip", "deflate"):
                raise UnreadableError("its answers are compressed as nobody asked")
            body = zlib.decompressobj(wbits=47).decompress(body, most + 1)  # gzip or zlib
    except zlib.error:
        raise UnreadableError("its compressed answers are damaged") from None
    finally:
        response.close()
    if response.status_code == 206:
        body = body[:most]  # a server may send more of a part than it was asked for
    if len(body) > most:
        raise _TooLong("more bytes than there may be")
    return Answer(
        status=response.status_code,
        content_type=response.headers.get("Content-Type", ""),
        encoded=encoded,
        location=response.headers.get("Location", ""),
        body=body,
    )


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """The files of one model version, as `embedding_model.inspect` reads them."""

    registry: Registry
    version: ModelVersion
    _listed: dict[str, list[Entry]] = field(default_factory=dict)
    _sizes: dict[str, int | None] = field(default_factory=dict)

    def entries(self, path: str) -> list[Entry]:
        if path not in self._listed:
            self._listed[path] = self.registry.entries(self.version, path)
            self._sizes.update((entry.path, entry.size) for entry in self._listed[path])
        return self._listed[path]

    def read(self, path: str) -> bytes:
        return self.registry.read(self.version, path, self._sizes.get(path))

    def head(self, path: str, size: int) -> bytes | None:
        return self.registry.head(self.version, path, size)


# Credentials


def ca_file() -> str | None:
    """The private CA that the environment names, under every name that TLS clients know."""
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    return next((v for n in (*names, "SSL_CERT_FILE") if (v := os.environ.get(n))), None)


def _host_credentials(uri: str) -> Any:
    """MLflow's own credentials, or a token of Keycloak where its variables are set."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import MlflowHostCreds

    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").strip().lower() in ("1", "true"):
        raise ConfigurationError(
            "MLFLOW_TRACKING_INSECURE_TLS is set, but TLS is always verified here: unset it and "
            "name your CA's file in MLFLOW_TRACKING_SERVER_CERT_PATH."
        )
    own = get_default_host_creds(uri)
    if own.token and not _TOKEN.fullmatch(own.token):
        raise ConfigurationError(
            "MLFLOW_TRACKING_TOKEN is no token: it holds a space, a line break or a letter that no "
            "header can have."
        )
    ca = ca_file()
    if ca and not os.path.exists(ca):
        raise ConfigurationError(f"The CA file {_word(ca)} is not there: check the variable.")
    token_url = os.environ.get("MLFLOW_KEYCLOAK_TOKEN_URL")
    if token_url:
        return MlflowHostCreds(
            host=uri,
            token=_keycloak_token(token_url, ca),
            client_cert_path=own.client_cert_path,
            server_cert_path=ca,
        )
    return MlflowHostCreds(
        host=uri,
        username=own.username,
        password=own.password,
        token=own.token,
        aws_sigv4=own.aws_sigv4,
        auth=own.auth,
        client_cert_path=own.client_cert_path,
        server_cert_path=ca,
    )


def keycloak_form() -> dict[str, str]:
    """The form that asks Keycloak for a token: password grant, or client credentials without a user.

    Raises: ConfigurationError when a variable is missing.
    """
    env = os.environ.get
    client, secret = env("MLFLOW_KEYCLOAK_CLIENT_ID"), env("MLFLOW_CLIENT_SECRET")
    user, password = env("MLFLOW_AUTH_USERNAME"), env("MLFLOW_AUTH_PASSWORD")
    missing = [] if client else ["MLFLOW_KEYCLOAK_CLIENT_ID"]
    if user and not password:
        missing.append("MLFLOW_AUTH_PASSWORD")
    if not user and not secret:
        missing.append("MLFLOW_CLIENT_SECRET (or MLFLOW_AUTH_USERNAME and MLFLOW_AUTH_PASSWORD)")
    if missing:
        raise ConfigurationError(
            f"MLFLOW_KEYCLOAK_TOKEN_URL is set, but {' and '.join(missing)} is not."
        )
    form = {"client_id": str(client), "scope": env("MLFLOW_KEYCLOAK_SCOPE", "openid")}
    if secret:
        form["client_secret"] = secret
    if user:
        return form | {"grant_type": "password", "username": user, "password": str(password)}
    return form | {"grant_type": "client_credentials"}


def _keycloak_token(url: str, ca: str | None) -> str:
    import requests
    from urllib3.exceptions import HTTPError

    form = keycloak_form()
    _checked("MLFLOW_KEYCLOAK_TOKEN_URL", url)
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def ask() -> Answer:
        response = requests.post(
            url,
            data=form,
            headers={"Accept-Encoding": "identity", "Accept": "application/json"},
            timeout=_TIMEOUT_S,
            verify=ca or True,
            allow_redirects=False,
            stream=True,
        )
        return _whole(response, limits.ANSWER_BYTES)

    try:
        answer = within(limits.ANSWER_SECONDS, ask)
        said = reading.document(answer.body)
    except (_TooLong, OSError, HTTPError) as error:  # requests' own are OSErrors
        raise _unreachable(error, f"Keycloak at {shown}") from None
    except UnreadableError:
        said = {}
    said = said if isinstance(said, dict) else {}
    token = said.get("access_token")
    if answer.status == 200 and isinstance(token, str) and _TOKEN.fullmatch(token):
        return token
    if answer.status in (400, 401, 403):
        texts = [said.get("error"), said.get("error_description")]
        secrets = [form.get(name) for name in ("client_secret", "password")]
        told = [_word(t) for t in texts if isinstance(t, str) and not repeats(t, secrets)]
        raise DeniedError(
            f"Keycloak at {shown} refuses the login ({': '.join(told) or answer.status}): "
            f"check the client, the secret, and the user of the {form['grant_type']} grant."
        )
    raise UnreachableError(
        f"Keycloak at {shown} gave no token (HTTP {answer.status}): check "
        "MLFLOW_KEYCLOAK_TOKEN_URL."
    )


# Small helpers


def _hub_id(params: object) -> str | None:
    """The Hugging Face id that a mirroring run recorded. Registry text: only if it is one."""
    for row in items(params, "params"):
        param = mapping(row, "a param")
        value = param.get("value")
        if param.get("key") == "model_id" and isinstance(value, str) and _HUB_ID.fullmatch(value):
            return value
    return None


def _folder(path: str) -> str:
    """A folder below a run's artifacts, '' for their root."""
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _below(root: str, folder: str) -> str:
    """The URI of a folder below another: what ends a path in a URI is quoted, a space is not.

    Roots on servers and disks are quoted already; those of other stores MLflow takes as they are.
    """
    if not re.match(r"(mlflow-artifacts|https?|file):", root):
        root = root.replace("%", "%25")
    quoted = re.sub(r"[%?#]", lambda m: f"%{ord(m[0]):02X}", folder)
    return f"{root}/{quoted}" if quoted else root


def _at(credentials: Any, host: str) -> Any:
    """The credentials for a server, at the address that it gave itself."""
    if credentials.host != host:
        credentials = copy.copy(credentials)
        credentials.host = host
    return credentials


def _word(text: object) -> str:
    """Registry text as it may stand in an error: short and printable."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown[:80]


def _from_environment(name: str, default: int) -> int:
    """A number from 0 to a day's seconds.

    Raises: ConfigurationError when the variable is something else.
    """
    value = os.environ.get(name, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,5}", value):
        raise ConfigurationError(f"{name} is not a whole number: check it.")
    return int(value)


def _unreachable(error: BaseException, what: str) -> TemplateError:
    """Why a request never got an answer, from the chain of exceptions. Its texts hold URLs: unsaid."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 10:
        chain.append(f"{type(cause).__name__} {cause}")
        cause = cause.__cause__ or cause.__context__
    text = " ".join(chain)
    if re.search(r"CERTIFICATE_VERIFY_FAILED|CertificateError|certificate verify failed", text):
        return UnreachableError(
            f"{what} shows a certificate that cannot be verified: name your CA's file in "
            "MLFLOW_TRACKING_SERVER_CERT_PATH."
        )
    reasons = {
        r"SSLError|SSLV3|WRONG_VERSION_NUMBER": "TLS fails (is it http, not https?)",
        r"NameResolutionError|Name or service not known|gaierror": "its host name is unknown",
        r"Connection refused": "the connection is refused",
        r"[Tt]imed? ?out|Timeout": "it does not answer in time",
        r"more bytes than": "its answer does not end",
    }
    reason = next((r for pattern, r in reasons.items() if re.search(pattern, text)), "no answer")
    return UnreachableError(
        f"{what} cannot be reached ({reason}): check the address and that the server runs."
    )
