"""Which certificates a TLS connection trusts, and what one that is refused means."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cached_property

from .addresses import origin_text
from .failures import ConfigurationError
from .proxies import Proxies
from .settings import switched_on

# The names that MLflow's client, boto3, curl and OpenSSL look at, in the order of preference.
CA_VARIABLES = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
)
CLIENT_VARIABLE = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
# What OpenSSL says when the other side answers in plain HTTP.
NO_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE"}
)
# X509_V_ERR_… of OpenSSL
NOT_YET_VALID, EXPIRED, OTHER_HOST, OTHER_IP = 9, 10, 62, 64


class Trust:
    """Which authorities a TLS connection trusts: the system's, and the private one of the settings."""

    def __init__(self, environ: Mapping[str, str], *more_variables: str, insecure: str) -> None:
        """more_variables: looked at before CA_VARIABLES; insecure: the variable that turns it off.

        Raises: ConfigurationError when a file that is named is not there, or a proxy is none.
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
        self.insecure = insecure if switched_on(environ, insecure) else None
        """The variable that has turned all checks off."""
        self.proxies = Proxies(environ)
        """On the way to those servers."""

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
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _no_authorities(name: str, path: str) -> ConfigurationError:
    return ConfigurationError(f"{name} does not name a readable file of PEM certificates: {path}")


def _no_client(path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{CLIENT_VARIABLE} does not name a PEM file with a certificate and its key: {path}"
    )


def refused_certificate(url: str, error: ssl.SSLError | ssl.CertificateError) -> ConfigurationError:
    """What to do about a certificate that is not accepted."""
    code = getattr(error, "verify_code", None)
    reason = getattr(error, "verify_message", "") or "not valid"
    if code in (NOT_YET_VALID, EXPIRED):
        now = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        advice = f"this machine's clock says {now}; set it right, or renew the certificate"
    elif code in (OTHER_HOST, OTHER_IP):
        advice = "call the server by a name that the certificate has"
    else:
        advice = f"name the private authority's PEM file in {CA_VARIABLES[0]}"
    return ConfigurationError(
        f"the certificate of {origin_text(url)} is not trusted ({reason}): {advice}"
    )
