"""Who asks: the credentials that MLflow's own variables name, renewed when they run out.

Keycloak is asked by the password grant when a user is configured, else by the client's own grant.
Nothing here is ever logged, written or put into an exception's text.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

from .failures import ConfigurationError, DeniedError, UnreachableError
from .transport import RETRYABLE, ConnectionFailed, Request, Trust, Wire, place, read_json

# A token is renewed when this share of its life is over: in time for a request that is under way.
RENEW_AT = 0.8
UNKNOWN_LIFETIME = 300.0  # seconds; RFC 6749 makes `expires_in` optional


class Credentials:
    """The `Authorization` header for the registry. Safe to use from several threads."""

    def headers(self) -> dict[str, str]:
        """The headers to send now.

        Raises: ConnectionFailed when trying again may help, DeniedError, UnreachableError.
        """
        return {}

    def renew(self, refused: Mapping[str, str]) -> bool:
        """After a 401: whether `headers` now gives something other than what was refused."""
        return False


class Fixed(Credentials):
    """A user and password, or a token that somebody else keeps fresh."""

    def __init__(self, authorization: str) -> None:
        self._authorization = authorization

    def headers(self) -> dict[str, str]:
        return {"Authorization": self._authorization}


class Keycloak(Credentials):
    """Tokens of an OpenID Connect provider (RFC 6749, password and client-credentials grants)."""

    def __init__(self, url: str, form: Mapping[str, str], trust: Trust) -> None:
        self._url = url
        self._form = dict(form)
        self._trust = trust
        self._lock = threading.Lock()
        self._token = ""
        self._renew_at = 0.0

    def headers(self) -> dict[str, str]:
        with self._lock:
            if not self._token or time.monotonic() >= self._renew_at:
                self._fetch()
            return {"Authorization": f"Bearer {self._token}"}

    def renew(self, refused: Mapping[str, str]) -> bool:
        with self._lock:
            if refused.get("Authorization") == f"Bearer {self._token}":
                self._fetch()
            return True

    def _fetch(self) -> None:
        wire = Wire(self._trust, timeout=30)
        request = Request(
            self._url,
            {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"},
            "POST",
            urlencode(self._form).encode(),
        )
        try:
            response = wire.send(request)
            answer = read_json(response) or {}
        finally:
            wire.close()
        where = place(self._url)
        if response.status in RETRYABLE:
            raise ConnectionFailed(f"{where} answers {response.status}")
        if response.status in (400, 401, 403):
            reason = str(answer.get("error", f"status {response.status}"))[:60]
            raise DeniedError(
                f"{where} gives no token ({reason}): check MLFLOW_KEYCLOAK_CLIENT_ID, "
                "MLFLOW_CLIENT_SECRET, MLFLOW_AUTH_USERNAME and MLFLOW_AUTH_PASSWORD"
            )
        token = answer.get("access_token")
        if response.status != 200 or not isinstance(token, str) or not token.isprintable():
            raise UnreachableError(
                f"{where} answered {response.status} without a token: "
                "check MLFLOW_KEYCLOAK_TOKEN_URL"
            )
        lifetime = answer.get("expires_in")
        seconds = float(lifetime) if isinstance(lifetime, int | float) else UNKNOWN_LIFETIME
        self._token = token
        self._renew_at = time.monotonic() + seconds * RENEW_AT


def from_environment(environ: Mapping[str, str], trust: Trust) -> Credentials:
    """The credentials that the environment names; none when it names none.

    Keycloak goes before a user and password, and these before a token, as in MLflow's client.
    """
    url = environ.get("MLFLOW_KEYCLOAK_TOKEN_URL")
    if url:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ConfigurationError("MLFLOW_KEYCLOAK_TOKEN_URL must be an http or https address")
        client = environ.get("MLFLOW_KEYCLOAK_CLIENT_ID")
        if not client:
            raise ConfigurationError(
                "MLFLOW_KEYCLOAK_CLIENT_ID is missing: the client's name in Keycloak"
            )
        form = {
            "client_id": client,
            "scope": environ.get("MLFLOW_KEYCLOAK_SCOPE") or "openid",
            "grant_type": "client_credentials",
        }
        if environ.get("MLFLOW_CLIENT_SECRET"):
            form["client_secret"] = environ["MLFLOW_CLIENT_SECRET"]
        if environ.get("MLFLOW_AUTH_USERNAME"):
            form["grant_type"] = "password"
            form["username"] = environ["MLFLOW_AUTH_USERNAME"]
            form["password"] = environ.get("MLFLOW_AUTH_PASSWORD", "")
        elif "client_secret" not in form:
            raise ConfigurationError(
                "Keycloak needs MLFLOW_AUTH_USERNAME and MLFLOW_AUTH_PASSWORD, or MLFLOW_CLIENT_SECRET"
            )
        return Keycloak(url, form, trust)
    user = environ.get("MLFLOW_TRACKING_USERNAME")
    password = environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return Fixed("Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    token = (environ.get("MLFLOW_TRACKING_TOKEN") or "").strip()
    if token:
        if not token.isprintable() or " " in token:
            raise ConfigurationError("MLFLOW_TRACKING_TOKEN is not a token: it holds blanks")
        return Fixed(f"Bearer {token}")
    return Credentials()
