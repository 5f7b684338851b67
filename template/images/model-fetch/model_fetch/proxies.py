"""The HTTP proxy on the way to a server: HTTPS_PROXY, HTTP_PROXY and NO_PROXY, as curl and Go read them."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass_environment

from .addresses import BadAddress, checked, origin
from .failures import ConfigurationError


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where requests go instead, and with which login."""

    host: str
    port: int
    headers: Mapping[str, str] = field(repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port}"


class Proxies:
    """Which servers are asked through a proxy. This machine never is."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises: ConfigurationError when a variable names no proxy."""
        self._of = {scheme: _proxy(environ, f"{scheme}_proxy") for scheme in ("http", "https")}
        self._direct = _variable(environ, "no_proxy")[1].replace(" ", "")

    def to(self, scheme: str, host: str, port: int) -> Proxy | None:
        """The proxy that leads to a server; None where it is asked itself."""
        proxy = self._of[scheme]
        return None if proxy is None or self._passed_by(host, port) else proxy

    def _passed_by(self, host: str, port: int) -> bool:
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            if host == "localhost":
                return True
        else:
            if number.is_loopback or any(number in net for net in self._networks()):
                return True
        return bool(proxy_bypass_environment(f"{host}:{port}", {"no": self._direct}))

    def _networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """Of NO_PROXY, what is a network (10.0.0.0/8)."""
        found = []
        for part in self._direct.split(","):
            try:
                found += [ipaddress.ip_network(part, strict=False)]
            except ValueError:
                pass
        return found


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Name and value of a variable in small letters, which comes first, or in capitals."""
    found = name if environ.get(name, "").strip() else name.upper()
    return found, environ.get(found, "").strip()


def _proxy(environ: Mapping[str, str], variable: str) -> Proxy | None:
    name, text = _variable(environ, variable)
    if not text:
        return None
    try:
        url = checked(text if "://" in text else f"http://{text}")
        login = urlsplit(text if "://" in text else f"//{text}")
        if not url.startswith("http://"):
            raise BadAddress("its own address must be http://")
    except BadAddress as error:
        raise ConfigurationError(
            f"{name} is not the address of a proxy ({error}): use http://host:port"
        ) from None
    _, host, port = origin(url)
    headers = {}
    if login.username is not None:
        pair = f"{unquote(login.username)}:{unquote(login.password or '')}"
        headers = {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return Proxy(host, port, headers)
