"""One HTTP(S) connection at a time, kept alive: the part of a browser that a download needs."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from .failures import ConfigurationError

REDIRECTS = 5
# Statuses that a later try may find gone (RFC 9110, RFC 6585).
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
CREDENTIAL_HEADERS = frozenset({"authorization", "cookie"})
# The names that MLflow's client, boto3, curl and OpenSSL look at, in the order of preference.
CA_VARIABLES = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
)
CLIENT_VARIABLE = "MLFLOW_TRACKING_CLIENT_CERT_PATH"


class ConnectionFailed(Exception):
    """The server could not be reached, or broke off. Its text never holds a URL's query."""


@dataclass(frozen=True, slots=True)
class Request:
    """An address with the headers to send there. Hidden in `repr`: both can be credentials."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    method: str = "GET"
    body: bytes | None = field(default=None, repr=False)

    def with_headers(self, **headers: str) -> Request:
        return Request(self.url, {**self.headers, **headers}, self.method, self.body)


class Trust:
    """Which authorities a TLS connection trusts: the system's, and the private one of the settings."""

    def __init__(self, environ: Mapping[str, str], *more_variables: str, insecure: str) -> None:
        """more_variables: looked at before CA_VARIABLES; insecure: the variable that turns it off.

        Raises: ConfigurationError when a file that is named is not there.
        """
        variables = (*more_variables, *CA_VARIABLES)
        self._authorities = next(
            ((name, environ[name]) for name in variables if environ.get(name)), None
        )
        self._client = environ.get(CLIENT_VARIABLE)
        if self._authorities and not os.access(self._authorities[1], os.R_OK):
            raise _no_authorities(*self._authorities)
        if self._client and not os.access(self._client, os.R_OK):
            raise _no_client(self._client)
        self._insecure = environ.get(insecure, "").lower() in ("true", "1")

    @cached_property
    def context(self) -> ssl.SSLContext:
        """Made when the first TLS connection is: reading the authorities takes 40 ms.

        Raises: ConfigurationError when a file is not what it should be.
        """
        context = ssl.create_default_context()
        if self._authorities:
            path = self._authorities[1]
            where = {"capath" if os.path.isdir(path) else "cafile": path}
            try:
                context.load_verify_locations(**where)
            except (OSError, ssl.SSLError):
                raise _no_authorities(*self._authorities) from None
        if self._client:
            try:
                context.load_cert_chain(self._client)
            except (OSError, ssl.SSLError):
                raise _no_client(self._client) from None
        if self._insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _no_authorities(name: str, path: str) -> ConfigurationError:
    return ConfigurationError(f"{name} does not name a readable file of PEM certificates: {path}")


def _no_client(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{CLIENT_VARIABLE} does not name a PEM file with a certificate and its key: {path}"
    )


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port, the unit that credentials belong to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", _port(parts)


def place(url: str) -> str:
    """A URL as it may be shown: no user, no query (a presigned one is a credential)."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class Wire:
    """The connection of one worker. Not thread-safe, but `abort` may be called from anywhere."""

    def __init__(self, trust: Trust, timeout: float) -> None:
        """timeout: seconds without a single byte until a connection counts as dead."""
        self._trust = trust
        self._timeout = timeout
        self._origin: tuple[str, str, int] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._aborted = threading.Event()

    def send(self, request: Request) -> http.client.HTTPResponse:
        """Sends a request and returns the response with its body unread.

        Raises: ConnectionFailed.
        """
        for _ in range(REDIRECTS):
            response = self._send(request)
            target = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not target:
                return response
            self.finish(response)
            url = urljoin(request.url, target)
            if urlsplit(url).scheme not in ("http", "https"):
                raise ConnectionFailed(f"{place(request.url)} redirects to {place(url)}")
            headers = dict(request.headers)
            if origin(url) != origin(request.url):
                headers = {k: v for k, v in headers.items() if k.lower() not in CREDENTIAL_HEADERS}
            request = Request(url, headers, request.method, request.body)
        raise ConnectionFailed(f"{place(request.url)} redirects without end")

    @property
    def raw(self) -> socket.socket | None:
        """Where an answer's body can be taken from as it is; None when TLS must decode it."""
        sock = self._connection.sock if self._connection is not None else None
        return None if isinstance(sock, ssl.SSLSocket) else sock

    def finish(self, response: http.client.HTTPResponse) -> None:
        """Ends with a response: keeps the connection when little is left to read, else closes it."""
        try:
            if response.isclosed() or (response.length is not None and response.length <= 65536):
                response.read()
                if not response.will_close:
                    return
        except (OSError, http.client.HTTPException):
            pass
        self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        """Wakes a blocked reader up: every further use of this wire fails."""
        self._aborted.set()
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _send(self, request: Request) -> http.client.HTTPResponse:
        parts = urlsplit(request.url)
        target = parts.path or "/"
        if parts.query:
            target += "?" + parts.query
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": "model-fetch",
            **request.headers,
        }
        while True:
            if self._aborted.is_set():
                raise ConnectionFailed("stopped")
            reused = self._connection is not None and self._origin == origin(request.url)
            try:
                connection = self._connect(parts)
                connection.request(request.method, target, body=request.body, headers=headers)
                return connection.getresponse()
            except (ssl.SSLCertVerificationError, ssl.CertificateError) as error:
                self.close()
                reason = getattr(error, "verify_message", "") or "not valid"
                raise ConfigurationError(
                    f"the certificate of {place(request.url)} is not trusted ({reason}): "
                    f"name the private authority's PEM file in {CA_VARIABLES[0]}"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept connection that the server closed meanwhile says nothing about the server.
                stale = isinstance(
                    error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
                )
                if reused and stale:
                    continue
                raise ConnectionFailed(f"{place(request.url)}: {describe(error)}") from None

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        wanted = origin(parts.geturl())
        if self._connection is not None and self._origin == wanted:
            return self._connection
        self.close()
        scheme, host, port = wanted
        connection: http.client.HTTPConnection
        if scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=self._timeout, context=self._trust.context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout)
        self._connection, self._origin = connection, wanted
        connection.connect()
        return connection


def describe(error: BaseException) -> str:
    """What a network error means, without addresses that could hold a credential."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "host name not found"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


def read_json(response: http.client.HTTPResponse, limit: int = 1 << 20) -> dict[str, Any] | None:
    """The body as a JSON object; None when it is none (a login page, an ingress's error)."""
    try:
        value = json.loads(response.read(limit))
    except (ValueError, OSError, http.client.HTTPException):
        return None
    return value if isinstance(value, dict) else None


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)
