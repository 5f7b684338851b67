"""MLflow: find a model version, list its files with sizes, read a small file of it.

All requests go through the official client's own transport (`mlflow.utils.rest_utils`), so its
authentication, TLS settings, plug-ins and retries hold. `mlflow` is imported only here, and only
when a lookup happens. Works with servers 3.4.0 and 3.17.2, whatever their artifact store: listings
and small files are asked of the tracking server, which has the store's keys. Weights never travel.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from .addresses import BadAddress, checked
from .embedding_model import Entry
from .errors import (
    ConfigurationError,
    DeniedError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    UnsuitableModelError,
)

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,190}")
"""Registered names that are offered or shown. MLflow allows more; other names stay unsaid."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TIMEOUT_S = 20
_RETRIES = 2
_MOST_MODELS = 2_000
_MOST_ENTRIES = 5_000


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
        try:
            self._credentials = _host_credentials(uri)
        except ModuleNotFoundError:
            raise ConfigurationError(
                "MLFLOW_TRACKING_URI is set, but MLflow's client is not installed here: install "
                "mlflow-skinny beside copier, or unset the variable."
            ) from None

    # Model versions

    def names(self) -> list[str]:
        """Names of the registered models, in MLflow's order."""
        names: list[str] = []
        page: str | None = ""
        while page is not None and len(names) < _MOST_MODELS:
            answer = self._json(
                "/api/2.0/mlflow/registered-models/search", max_results=1000, page_token=page
            )
            rows = answer.get("registered_models", [])
            names += [n for row in rows if NAME.fullmatch(n := str(row.get("name", "")))]
            page = answer.get("next_page_token") or None
        return names

    def find(self, name: str, selector: str) -> ModelVersion:
        """The version that `selector` names: latest (the highest number), a number, or @alias.

        Raises: NotFoundError (with the closest names), UnsuitableModelError, and what requests raise.
        """
        row = self._row(name, selector)
        version = str(row.get("version", ""))
        if not re.fullmatch(r"[1-9][0-9]*", version):
            raise UnreachableError(f"MLflow at {self.shown} gave {name} no version number.")
        status = str(row.get("status", "READY"))
        if status != "READY":
            raise UnsuitableModelError(
                f"Version {version} of {name} is not ready ({_word(status)}): wait for its "
                "registration or choose another version."
            )
        return self._locate(name, version, row)

    def _row(self, name: str, selector: str) -> Mapping[str, Any]:
        api = "/api/2.0/mlflow"
        if selector == "latest":
            answer = self._json(
                f"{api}/model-versions/search",
                filter=f"name='{name}'",
                max_results=1,
                order_by="version_number DESC",
            )
            rows = answer.get("model_versions") or [None]
            row = rows[0]
        elif selector.startswith("@"):
            row = self._found(f"{api}/registered-models/alias", name=name, alias=selector[1:])
        else:
            row = self._found(f"{api}/model-versions/get", name=name, version=selector)
        if row is not None:
            return dict(row)
        known = self._found(f"{api}/registered-models/get", "registered_model", name=name)
        if known is None:
            raise NotFoundError(self._unknown(name))
        if selector == "latest":
            raise NotFoundError(f"{name} has no version in MLflow at {self.shown}: register one.")
        raise NotFoundError(f"{name} has no {self._lacking(name, selector, known)}")

    def _lacking(self, name: str, selector: str, known: Mapping[str, Any]) -> str:
        if selector.startswith("@"):
            aliases = [f"@{_word(a.get('alias'))}" for a in known.get("aliases", [])]
            what, have = f"alias {selector}", f"its aliases are {', '.join(sorted(aliases)[:10])}"
            return f"{what}: {have if aliases else 'it has no alias at all'}."
        answer = self._json(
            "/api/2.0/mlflow/model-versions/search",
            filter=f"name='{name}'",
            max_results=10,
            order_by="version_number DESC",
        )
        rows = [_word(r.get("version")) for r in answer.get("model_versions", [])]
        return f"version {selector}: it has {', '.join(rows) or 'none'}."

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
        source, run_id = str(row.get("source", "")), row.get("run_id") or None
        if logged := re.fullmatch(r"models:/(m-[0-9A-Za-z]+)", source):
            return self._logged(name, version, logged[1])
        if run := re.fullmatch(r"runs:/([0-9A-Za-z]+)/(.+)", source):
            info, hub_id = self._run(run[1], f"version {version} of {name}")
            folder = run[2].strip("/")
            if self._run_entries(run[1], folder):
                uri = f"{str(info.get('artifact_uri', '')).rstrip('/')}/{folder}"
                return ModelVersion(name, version, run[1], None, uri, hub_id, folder)
            logged_id = self._logged_of_run(run[1], folder, str(info.get("experiment_id", "")))
            if logged_id:
                return self._logged(name, version, logged_id)
            raise UnsuitableModelError(
                f"Version {version} of {name} has no files: its run holds nothing at "
                f"'{_word(folder)}'; register it again."
            )
        if run_id:
            info, hub_id = self._run(str(run_id), f"version {version} of {name}")
            root = str(info.get("artifact_uri", "")).rstrip("/")
            if root and source.startswith(f"{root}/"):
                folder = source[len(root) + 1 :].strip("/")
                return ModelVersion(name, version, str(run_id), None, source, hub_id, folder)
        raise UnsuitableModelError(
            f"Version {version} of {name} points outside of its run's artifacts: register it from "
            "a run or a logged model."
        )

    def _logged(self, name: str, version: str, model_id: str) -> ModelVersion:
        model = self._found(f"/api/2.0/mlflow/logged-models/{model_id}", "model")
        info = (model or {}).get("info", {})
        if not info.get("artifact_uri"):
            raise UnsuitableModelError(
                f"Version {version} of {name} points to a logged model that is gone: register "
                "it again."
            )
        status = str(info.get("status", "LOGGED_MODEL_READY"))
        if status not in ("LOGGED_MODEL_READY", "2"):
            raise UnsuitableModelError(
                f"Version {version} of {name} is not complete ({_word(status)}): log it again."
            )
        run_id = info.get("source_run_id") or None
        params = (model or {}).get("data", {}).get("params", [])
        uri = str(info["artifact_uri"]).rstrip("/")
        return ModelVersion(name, version, run_id, model_id, uri, _hub_id(params), "")

    def _run(self, run_id: str, of: str) -> tuple[Mapping[str, Any], str | None]:
        run = self._found("/api/2.0/mlflow/runs/get", "run", run_id=run_id)
        if run is None:
            raise UnsuitableModelError(f"The run of {of} is gone: register the model again.")
        return run.get("info", {}), _hub_id(run.get("data", {}).get("params", []))

    def _logged_of_run(self, run_id: str, name: str, experiment_id: str) -> str | None:
        """MLflow 3 resolves runs:/R/name to the logged model of that name, if the run has no files."""
        answer = self._json(
            "/api/2.0/mlflow/logged-models/search",
            body={"experiment_ids": [experiment_id], "filter": f"name = '{_word(name)}'"},
        )
        for model in answer.get("models", []):
            if model.get("info", {}).get("source_run_id") == run_id:
                return str(model["info"].get("model_id", "")) or None
        return None

    # Files

    def _run_entries(self, run_id: str, path: str) -> list[Entry]:
        return self._entries("/api/2.0/mlflow/artifacts/list", path, run_id=run_id, path=path)

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
        page: str | None = ""
        while page is not None and len(entries) < _MOST_ENTRIES:
            answer = self._found(url, None, page_token=page, **params) or {}
            for row in answer.get("files", []):
                path = str(row.get("path", ""))
                inside = path.startswith(f"{folder}/") if folder else True
                # A listing is untrusted: what does not stand in the folder asked for is not there.
                if not inside or ".." in path.split("/") or not path.isprintable():
                    continue
                is_folder = bool(row.get("is_dir"))
                entries.append(Entry(path, None if is_folder else int(row.get("file_size") or 0)))
            page = answer.get("next_page_token") or None
        return entries

    def read(self, version: ModelVersion, path: str) -> bytes:
        """A small file of the version, whole. Never call it for weights: see MLflow's get-artifact."""
        if version.logged_model_id:
            url = f"/ajax-api/2.0/mlflow/logged-models/{version.logged_model_id}/artifacts/files"
            response = self._ask(url, artifact_file_path=path)
        else:
            below = "/".join(p for p in (version.folder, path) if p)
            response = self._ask("/get-artifact", run_id=str(version.run_id), path=below)
        if response.status_code != 200:
            raise self._failure(response, f"reading {_word(path)}")
        return bytes(response.content)

    def head(self, version: ModelVersion, path: str, size: int) -> bytes | None:
        """The first bytes of a large file; None where the server cannot send a part of it.

        Only proxied artifacts on the server's own disk, from MLflow 3.15 on, answer a range
        without reading the whole file; everything else would make the server fetch the weights.
        """
        root = re.fullmatch(r"mlflow-artifacts:/+(.*)", version.artifact_uri)
        if root is None or not self._serves_ranges():
            return None
        url = f"/api/2.0/mlflow-artifacts/artifacts/{quote(f'{root[1]}/{path}')}"
        response = self._ask(url, headers={"Range": f"bytes=0-{size - 1}"}, stream=True)
        try:
            partial = response.status_code == 206
            return bytes(response.raw.read(size)) if partial else None
        finally:
            response.close()

    def _serves_ranges(self) -> bool:
        response = self._ask("/version")
        numbers = re.match(r"(\d+)\.(\d+)", response.text if response.status_code == 200 else "")
        if not numbers or (int(numbers[1]), int(numbers[2])) < (3, 15):
            return False
        info = self._ask("/api/3.0/mlflow/server-info")
        try:
            return info.status_code == 200 and info.json()["multipart_downloads_enabled"] is False
        except (ValueError, KeyError, TypeError):
            return False

    # Requests

    def _json(self, url: str, body: object = None, **params: Any) -> dict[str, Any]:
        """A JSON answer that must be there."""
        response = self._ask(url, body, **params)
        if response.status_code != 200:
            raise self._failure(response, f"asking {url}")
        return self._parsed(response)

    def _found(self, url: str, key: str | None = "model_version", **params: Any) -> Any:
        """A part of a JSON answer, or None when the server knows no such thing."""
        response = self._ask(url, **params)
        if response.status_code in (400, 404) and "json" in response.headers.get(
            "Content-Type", ""
        ):
            code = self._parsed(response).get("error_code")
            # A missing alias is a 400 INVALID_PARAMETER_VALUE, all else a 404.
            if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
                return None
        if response.status_code != 200:
            raise self._failure(response, f"asking {url}")
        answer = self._parsed(response)
        return answer if key is None else answer.get(key)

    def _parsed(self, response: Any) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnreachableError(
                f"{self.shown} answers, but not as MLflow does: check MLFLOW_TRACKING_URI, and "
                "whether a login page stands before it."
            )
        return answer

    def _ask(
        self,
        url: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        **params: Any,
    ) -> Any:
        """One request; raises TemplateErrors for what stops every request."""
        from mlflow.exceptions import MlflowException
        from mlflow.utils.rest_utils import http_request

        asked = {k: v for k, v in params.items() if v != ""}
        try:
            response = http_request(
                self._credentials,
                url,
                "GET" if body is None else "POST",
                max_retries=_from_environment("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES),
                timeout=_from_environment("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT_S),
                raise_on_status=False,
                extra_headers=headers,
                stream=stream,
                **({"params": asked} if body is None else {"json": body}),
            )
        except MlflowException as error:
            raise _unreachable(error, f"MLflow at {self.shown}") from None
        if response.status_code in (401, 403):
            raise self._denied(response)
        return response

    def _denied(self, response: Any) -> TemplateError:
        if "Invalid Host header" in response.text[:500]:
            return DeniedError(
                f"MLflow at {self.shown} refuses its own host name (403): start the server with "
                "--allowed-hosts that includes it."
            )
        creds = self._credentials
        given = creds.token or creds.username or creds.auth
        if response.status_code == 403:
            return DeniedError(
                f"MLflow at {self.shown} does not let this login read the model (403): ask for "
                "READ permission on it."
            )
        if given:
            return DeniedError(
                f"MLflow at {self.shown} refuses the credentials of the environment (401): check "
                "user, password or token, and whether it has expired."
            )
        return DeniedError(
            f"MLflow at {self.shown} wants a login (401): set MLFLOW_TRACKING_TOKEN, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the MLFLOW_KEYCLOAK_* "
            "variables."
        )

    def _failure(self, response: Any, doing: str) -> TemplateError:
        detail = ""
        if "json" in response.headers.get("Content-Type", ""):
            detail = _word(self._parsed(response).get("error_code", ""))
        return UnreachableError(
            f"MLflow at {self.shown} failed at {doing} (HTTP {response.status_code}"
            f"{', ' + detail if detail else ''}): look into the server's log."
        )


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """The files of one model version, as `embedding_model.inspect` reads them."""

    registry: Registry
    version: ModelVersion

    def entries(self, path: str) -> list[Entry]:
        return self.registry.entries(self.version, path)

    def read(self, path: str) -> bytes:
        return self.registry.read(self.version, path)

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

    form = keycloak_form()
    _checked("MLFLOW_KEYCLOAK_TOKEN_URL", url)
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    try:
        response = requests.post(
            url, data=form, timeout=_TIMEOUT_S, verify=ca or True, allow_redirects=False
        )
    except requests.exceptions.RequestException as error:
        raise _unreachable(error, f"Keycloak at {shown}") from None
    try:
        answer = response.json()
    except ValueError:
        answer = {}
    token = answer.get("access_token") if isinstance(answer, dict) else None
    if response.status_code == 200 and isinstance(token, str) and token:
        return token
    reason = _word(answer.get("error", "")) if isinstance(answer, dict) else ""
    if response.status_code in (400, 401, 403):
        raise DeniedError(
            f"Keycloak at {shown} refuses the login ({reason or response.status_code}): check the "
            f"client, the secret, and the user of the {form['grant_type']} grant."
        )
    raise UnreachableError(
        f"Keycloak at {shown} gave no token (HTTP {response.status_code}): check "
        "MLFLOW_KEYCLOAK_TOKEN_URL."
    )


# Small helpers


def _hub_id(params: list[Mapping[str, Any]]) -> str | None:
    """The Hugging Face id that a mirroring run recorded. Registry text: only if it is one."""
    for param in params if isinstance(params, list) else []:
        value = str(param.get("value", ""))
        if param.get("key") == "model_id" and _HUB_ID.fullmatch(value):
            return value
    return None


def _word(text: object) -> str:
    """Registry text as it may stand in an error: short and printable."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return shown[:80]


def _from_environment(name: str, default: int) -> int | None:
    """None, which lets MLflow read its own variable, where the user has set it."""
    return None if os.environ.get(name) else default


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
    }
    reason = next((r for pattern, r in reasons.items() if re.search(pattern, text)), "no answer")
    return UnreachableError(
        f"{what} cannot be reached ({reason}): check the address and that the server runs."
    )
