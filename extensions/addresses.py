"""Addresses of servers: what is one, whose it is, and which are never asked on a server's word."""

from __future__ import annotations

import ipaddress
import re
import socket
import string
from urllib.parse import quote, urljoin, urlsplit

_HOST = re.compile(r"[A-Za-z0-9_.-]+")
# A browser would end the host at a backslash, so what it means depends on who reads it.
_WHERE = re.compile(r"(?:[^\\]*@)?(?:\[[^\]]*\]|[^\\:\[\]@]*)(?::[0-9]*)?")
_PRINTABLE = string.punctuation  # what `quote` leaves alone, beside letters and digits
_DEFAULT_PORTS = {"http": 80, "https": 443}

NEVER_ASKED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local (RFC 3927): metadata of AWS, Google, Azure, OpenStack
        "fe80::/10",  # link-local (RFC 4291)
        "fd00:ec2::/32",  # metadata and pod identity of AWS over IPv6 (EC2 and EKS user guides)
        "fd20:ce::254/128",  # metadata of Google Compute Engine over IPv6 (its documentation)
        "100.100.100.200/32",  # metadata of Alibaba Cloud (ECS user guide)
        "168.63.129.16/32",  # WireServer of Azure (Azure's virtual network documentation)
        "192.0.0.192/32",  # metadata of Oracle Cloud Classic (its documentation)
        "fd00:c1::a9fe:a9fe/128",  # metadata of Oracle Cloud over IPv6 (oci-python-sdk)
        "fd00:42::42/128",  # metadata of Scaleway over IPv6 (its documentation)
    )
)
"""Networks that answer with a machine's credentials, and that no registry or store is in."""

_NEVER_NAMED = frozenset(
    {
        *("metadata", "metadata.google.internal", "metadata.goog"),  # Google Compute Engine
        *("instance-data", "instance-data.ec2.internal"),  # AWS
        "metadata.tencentyun.com",
    }
)
"""Names of the same, where a proxy resolves them; else it is their address that tells."""

_WITH_IPV4 = (
    (ipaddress.ip_network("64:ff9b::/96"), 0),  # NAT64 (RFC 6052): the last 32 bits
    (ipaddress.ip_network("::ffff:0:0:0/96"), 0),  # IPv4-translated (RFC 2765)
    (ipaddress.ip_network("2002::/16"), 80),  # 6to4 (RFC 3056): the 32 bits behind the prefix
    (ipaddress.ip_network("::/96"), 0),  # IPv4-compatible (RFC 4291), deprecated
)


class BadAddress(ValueError):
    """What was given is no address of a server. The text never repeats it."""


def checked(url: str) -> str:
    """An http(s) address as it can be asked: its host in ASCII, no user, no fragment.

    Raises: BadAddress.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        if not _WHERE.fullmatch(parts.netloc):
            raise BadAddress("its host is none")
        host = _host(parts.hostname or "")
        path = quote(parts.path, safe=_PRINTABLE)
        query = quote(parts.query, safe=_PRINTABLE)
    except BadAddress:
        raise
    except ValueError:  # UnicodeError too
        raise BadAddress("its host or its port is none") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise BadAddress("it is neither http:// nor https://")
    if port == 0:
        raise BadAddress("its port is none")
    where = host if port is None else f"{host}:{port}"
    return f"{parts.scheme}://{where}{path}" + (f"?{query}" if query else "")


def _host(name: str) -> str:
    if ":" in name:
        return f"[{ipaddress.ip_address(name)}]"
    ascii_name = name.encode("idna").decode("ascii")
    if not _HOST.fullmatch(ascii_name):
        raise BadAddress("its host is none")
    return ascii_name


def joined(base: str, location: str) -> str:
    """Where a `Location` header leads.

    location: as http.client decodes it, a character for each byte (RFC 9110 has no other than ASCII)
    Raises: BadAddress.
    """
    try:
        raw = location.encode("latin-1")
        return checked(urljoin(base, quote(raw, safe=_PRINTABLE)))
    except BadAddress:
        raise
    except ValueError:
        raise BadAddress("its host or its port is none") from None


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a checked address, the unit that credentials belong to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)


def origin_text(url: str) -> str:
    """`http://host:port`, without user, path or query."""
    scheme, host, port = origin(url)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def place(url: str) -> str:
    """A URL as it may be shown: no user, no query (a presigned one is a credential)."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def leads_to_metadata(host: str) -> bool:
    """Whether a host is one that is never asked: by name, or by number in any form that is one."""
    if host.lower().rstrip(".") in _NEVER_NAMED or never_asked(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return any(never_asked(str(address[0])) for *_, address in found)


def never_asked(address: str) -> bool:
    """Whether a number, as the resolver gives it, is one that no server may send a program to."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    numbers = [number]
    if isinstance(number, ipaddress.IPv6Address):
        if number.ipv4_mapped is not None:
            numbers.append(number.ipv4_mapped)
        for network, shift in _WITH_IPV4:
            if number in network:
                numbers.append(ipaddress.IPv4Address((int(number) >> shift) & 0xFFFFFFFF))
    return any(n in network for n in numbers for network in NEVER_ASKED)
