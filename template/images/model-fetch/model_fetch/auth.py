"""Who asks: the credentials that MLflow's own variables name, renewed when they run out.

Keycloak is asked by the password grant when a user is configured, else by the client's own grant.
Nothing here is ever logged, written or put into an exception's text.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlencode

from .addresses import place
from .console import one_line
from .errors import repeats
from .failures import ConfigurationError, DeniedError, TemplateError, UnreachableError
from .settings import address
from .transport import RETRYABLE, ConnectionFailed, Reply, Request, ask
from .trust import Trust

# A token is renewed when this share of its life is over: in time for a request that is under way.
RENEW_AT = 0.8
UNKNOWN_LIFETIME = 300.0  # seconds; RFC 6749 makes `expires_in` optional
LONGEST_LIFETIME = 86_400.0  # seconds; who says more is asked again all the same
NO_LOGIN = (
    "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, or the "
    "MLFLOW_KEYCLOAK_ variables"
)


class Credentials:
    """The `Authorization` header for the registry. Safe to use from several threads."""

    advice = NO_LOGIN
    """What to do when they are refused."""

    def headers(self) -> dict[str, str]:
        """The headers to send now.

        Raises: ConnectionFailed when trying again may help, DeniedError, UnreachableError,
        ConfigurationError.
        """
        return {}

    def renew(self, refused: Mapping[str, str], login: bool = True) -> bool:
        """After a 401 or 403: whether `headers` now gives something other than what was refused.

        login: whether to log in anew, if that is what it takes
        """
        return False


class InWorkspace(Credentials):
    """Credentials for one workspace of the server (MLflow 3.10 and newer): a 400 without its name."""

    def __init__(self, credentials: Credentials, workspace: str) -> None:
        self._credentials, self._workspace = credentials, workspace
        self.advice = credentials.advice

    def headers(self) -> dict[str, str]:
        return {"X-MLFLOW-WORKSPACE": self._workspace, **self._credentials.headers()}

    def renew(self, refused: Mapping[str, str], login: bool = True) -> bool:
        return self._credentials.renew(refused, login)


class Fixed(Credentials):
    """A user and password, or a token that somebody else keeps fresh."""

    advice = "check the credentials and that they may read the model"

    def __init__(self, authorization: str) -> None:
        self._authorization = authorization

    def headers(self) -> dict[str, str]:
        return {"Authorization": self._authorization}


class Keycloak(Credentials):
    """Tokens of an OpenID Connect provider (RFC 6749, password and client-credentials grants)."""

    advice = Fixed.advice

    def __init__(self, url: str, form: Mapping[str, str], trust: Trust, timeout: float) -> None:
        """timeout: seconds for an answer."""
        self._url, self._form = url, dict(form)
        self._trust, self._timeout = trust, timeout
        self._lock = threading.Lock()
        self._token = ""
        self._renew_at = 0.0
        self._refused: TemplateError | None = None

    def headers(self) -> dict[str, str]:
        with self._lock:
            if not self._token or time.monotonic() >= self._renew_at:
                self._fetch()
            return {"Authorization": f"Bearer {self._token}"}

    def renew(self, refused: Mapping[str, str], login: bool = True) -> bool:
        with self._lock:
            if refused.get("Authorization") == f"Bearer {self._token}":
                if not login:
                    return False
                self._fetch()
            return True

    def _fetch(self) -> None:
        # A login that was refused is not tried again: Keycloak locks an account after a few.
        if self._refused is not None:
            raise self._refused
        request = Request(
            self._url,
            {"Content-Type": "application/x-www-form-urlencoded"},
            "POST",
            urlencode(self._form, errors="surrogateescape").encode(),
            follow=False,
        )
        try:
            reply = ask(request, self._trust, self._timeout)
            self._token, lifetime = self._read(reply)
        except TemplateError as error:
            self._refused = error
            raise
        self._renew_at = time.monotonic() + lifetime * RENEW_AT

    def _read(self, reply: Reply) -> tuple[str, float]:
        """The token of an answer, and its lifetime in seconds."""
        where, answer = place(self._url), reply.json or {}
        if reply.status in RETRYABLE:
            raise ConnectionFailed(where, f"answers {reply.status}")
        if reply.status in (400, 401, 403):
            reason = self._said(answer) or f"status {reply.status}"
            raise DeniedError(
                f"{where} gives no token ({reason}): check MLFLOW_KEYCLOAK_CLIENT_ID, "
                "MLFLOW_CLIENT_SECRET, MLFLOW_AUTH_USERNAME, MLFLOW_AUTH_PASSWORD and "
                "MLFLOW_KEYCLOAK_SCOPE"
            )
        token = answer.get("access_token")
        fit = isinstance(token, str) and token.isascii() and token.isprintable()
        if reply.status != 200 or not fit or not token or " " in token:
            text = (
                f"{where} answered {reply.status} without a token: check MLFLOW_KEYCLOAK_TOKEN_URL"
            )
            if reply.status in (404, 405):
                raise ConfigurationError(text)
            raise UnreachableError(text)
        lifetime = answer.get("expires_in")
        if not isinstance(lifetime, int | float) or not lifetime > 0:
            lifetime = UNKNOWN_LIFETIME
        return token, float(min(lifetime, LONGEST_LIFETIME))

    def _said(self, answer: Mapping[str, object]) -> str:
        """The provider's own reason, as it may be shown: short, and without what it was sent."""
        secrets = [self._form.get(name) for name in ("client_secret", "password")]
        said = []
        for name, most in (("error", 60), ("error_description", 80)):
            text = answer.get(name)
            if isinstance(text, str) and not repeats(text, secrets):
                said.append(one_line(text)[:most].strip())
        return ": ".join(filter(None, said))


def from_environment(
    environ: Mapping[str, str], trust: Trust, timeout: float = UNKNOWN_LIFETIME
) -> Credentials:
    """The credentials that the environment names; none when it names none.

    Keycloak goes before a user and password, and these before a token, as in MLflow's client.
    Raises: ConfigurationError.
    """

    def secret(name: str) -> str:
        # `kubectl create secret --from-file` keeps the line feed at a file's end.
        return environ.get(name, "").rstrip("\r\n")

    url = address(environ, "MLFLOW_KEYCLOAK_TOKEN_URL")
    if url:
        client = environ.get("MLFLOW_KEYCLOAK_CLIENT_ID", "").strip()
        if not client:
            raise ConfigurationError(
                "MLFLOW_KEYCLOAK_CLIENT_ID is missing: the client's name in Keycloak"
            )
        form = {
            "client_id": client,
            "scope": environ.get("MLFLOW_KEYCLOAK_SCOPE", "").strip() or "openid",
            "grant_type": "client_credentials",
        }
        if secret("MLFLOW_CLIENT_SECRET"):
            form["client_secret"] = secret("MLFLOW_CLIENT_SECRET")
        if secret("MLFLOW_AUTH_USERNAME"):
            form["grant_type"] = "password"
            form["username"] = secret("MLFLOW_AUTH_USERNAME")
            form["password"] = secret("MLFLOW_AUTH_PASSWORD")
        elif "client_secret" not in form:
            raise ConfigurationError(
                "Keycloak needs MLFLOW_AUTH_USERNAME and MLFLOW_AUTH_PASSWORD, or MLFLOW_CLIENT_SECRET"
            )
        return Keycloak(url, form, trust, timeout)
    user, password = secret("MLFLOW_TRACKING_USERNAME"), secret("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        pair = f"{user}:{password}".encode(errors="surrogateescape")
        return Fixed("Basic " + base64.b64encode(pair).decode())
    token = environ.get("MLFLOW_TRACKING_TOKEN", "").strip()
    if token:
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ConfigurationError(
                "MLFLOW_TRACKING_TOKEN is not a token: it holds blanks, or other characters than ASCII"
            )
        return Fixed(f"Bearer {token}")
    return Credentials()
