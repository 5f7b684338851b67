"""One HTTP(S) connection at a time, kept alive: the part of a browser that a download needs."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from . import limits, reading
from .addresses import (
    BadAddress,
    joined,
    leads_to_metadata,
    never_asked,
    origin,
    origin_text,
    place,
)
from .failures import ConfigurationError, DeniedError, UnreachableError
from .proxies import Proxy
from .trust import NO_TLS, Trust, refused_certificate

# Statuses that a later try may find gone (RFC 9110, RFC 6585).
RETRYABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
# What another server may be sent of a request: nothing that could be a credential.
PORTABLE_HEADERS = frozenset({"range", "if-range", "accept"})
TLS_ALERT = "\x15\x03"  # how a TLS server's answer to a plain request begins (RFC 8446)


class ConnectionFailed(Exception):
    """The server could not be reached, or broke off. Its text never holds a URL's query."""

    def __init__(self, where: str, reason: str, tries: int | None = None) -> None:
        """where: the address, as it may be shown; tries: how many are worth while, None for any."""
        super().__init__(f"{where}: {reason}")
        self.reason, self.tries = reason, tries


@dataclass(frozen=True, slots=True)
class Request:
    """An address with the headers to send there. Hidden in `repr`: both can be credentials."""

    url: str = field(repr=False)
    """As `addresses.checked` makes it."""

    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    method: str = "GET"
    body: bytes | None = field(default=None, repr=False)

    own: bool = True
    """Whether the settings name the address; one that a server names may not be a link-local one."""

    follow: bool = True
    """Whether a redirect is followed; its answer is the response otherwise."""

    def with_headers(self, **headers: str) -> Request:
        return replace(self, headers={**self.headers, **headers})


def redirected(request: Request, status: int, location: str | None) -> Request | None:
    """The request that an answer asks for instead; None when it is no redirect to follow.

    Raises: UnreachableError for one that must not be followed.
    """
    if status not in (301, 302, 303, 307, 308) or not location or not request.follow:
        return None
    here = place(request.url)
    try:
        url = joined(request.url, location)
    except BadAddress as error:
        raise UnreachableError(f"{here} redirects to no address ({error})") from None
    there = origin_text(url)
    if urlsplit(request.url).scheme == "https" and urlsplit(url).scheme == "http":
        raise UnreachableError(
            f"{here} redirects to {there}, which is without TLS: mend the server's own address"
        )
    moved = replace(request, url=url)
    # As browsers do (RFC 9110 15.4): only 307 and 308 keep the method.
    if request.body is not None and status in (301, 302, 303):
        kept = {k: v for k, v in request.headers.items() if k.lower() != "content-type"}
        moved = replace(moved, headers=kept, method="GET", body=None)
    if origin(url) == origin(request.url):
        return moved
    if moved.body is not None:
        raise UnreachableError(
            f"{here} redirects to {there}, which is not sent what was asked here: "
            "name that address in MLFLOW_TRACKING_URI"
        )
    portable = {k: v for k, v in moved.headers.items() if k.lower() in PORTABLE_HEADERS}
    return replace(moved, headers=portable, own=False)


def _lost_login(first: Request, last: Request) -> bool:
    """Whether a redirect to another origin cost a request its credentials."""
    return "Authorization" in first.headers and "Authorization" not in last.headers


class _Clock(io.RawIOBase):
    """A connection's bytes until a deadline, however few come at a time; and no more than due."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw, self._sock = raw, sock
        self.within(sock.gettimeout() or limits.ANSWER_SECONDS, limits.HEAD_BYTES)

    def within(self, seconds: float, most: int) -> None:
        self._until = time.monotonic() + seconds
        self._left = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if self._left <= 0:
            raise http.client.LineTooLong("answer")
        self._sock.settimeout(left)
        count = self._raw.readinto(buffer)
        self._left -= count or 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """A response that is read by a deadline: its head by the connection's, its body by `within`."""

    def __init__(self, sock: socket.socket, *args: Any, **more: Any) -> None:
        super().__init__(sock, *args, **more)
        self._clock = _Clock(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._clock)

    def within(self, seconds: float, most: int) -> None:
        """Reading fails when it is not done in so many seconds from now.

        most: bytes of the body that will be read until then; what frames them is limited by it too
        """
        self._clock.within(seconds, limits.FRAMING * most + limits.HEAD_BYTES)

    def small(self, most: int, seconds: float) -> bytes:
        """Up to `most` bytes of the body. Raises: OSError, http.client.HTTPException."""
        self.within(seconds, most)
        return self.read(most)


class Wire:
    """The connection of one worker. Not thread-safe, but `abort` may be called from anywhere."""

    def __init__(self, trust: Trust, timeout: float) -> None:
        """timeout: seconds until an answer's head must be there, and for each part of its body."""
        self._trust = trust
        self._timeout = timeout
        self._origin: tuple[str, str, int] | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._aborted = threading.Event()

    def send(self, request: Request) -> Answer:
        """Sends a request and returns the response with its body unread.

        Raises: ConnectionFailed when trying again may help, ConfigurationError, UnreachableError,
        DeniedError where a redirect led to a server that wants the credentials too.
        """
        first = request
        for _ in range(limits.REDIRECTS + 1):
            response = self._send(request)
            following = redirected(request, response.status, response.headers.get("Location"))
            if following is None:
                if response.status == 401 and _lost_login(first, request):
                    raise DeniedError(
                        f"{origin_text(first.url)} leads to {origin_text(request.url)}, which gets "
                        "no credentials that way: name that address in MLFLOW_TRACKING_URI"
                    )
                return response
            self.finish(response)
            request = following
        raise ConnectionFailed(place(first.url), "redirects without end")

    @property
    def raw(self) -> socket.socket | None:
        """Where an answer's body can be taken from as it is; None when TLS must decode it."""
        sock = self._connection.sock if self._connection is not None else None
        return None if isinstance(sock, ssl.SSLSocket) else sock

    def finish(self, response: Answer) -> None:
        """Ends with a response: keeps the connection when what is left comes at once, else closes it."""
        try:
            if self._connection is not None and not response.isclosed():
                response.small(limits.DRAIN_BYTES, limits.DRAIN_SECONDS)
            if response.isclosed() and not response.will_close:
                return
        except (OSError, http.client.HTTPException, ValueError):
            pass
        response.close()
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

    def _send(self, request: Request) -> Answer:
        parts = urlsplit(request.url)
        target = parts.path or "/"
        if parts.query:
            target += "?" + parts.query
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": "model-fetch",
            **request.headers,
        }
        proxy = self._trust.proxies.to(*origin(request.url))
        if proxy is not None and parts.scheme == "http":
            target, headers = request.url, headers | proxy.headers
        where = place(request.url)
        while True:
            if self._aborted.is_set():
                raise ConnectionFailed(where, "stopped")
            reused = self._connection is not None and self._origin == origin(request.url)
            try:
                connection = self._connect(request)
                connection.request(request.method, target, body=request.body, headers=headers)
                response = connection.getresponse()
                assert isinstance(response, Answer)
                return response
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.close()
                # A kept connection that the server closed meanwhile says nothing about the server.
                stale = isinstance(
                    error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
                )
                if reused and stale:
                    continue
                raise _meant(request.url, error) from None

    def _connect(self, request: Request) -> http.client.HTTPConnection:
        wanted = origin(request.url)
        kept = self._connection
        if kept is not None and kept.sock is not None and self._origin == wanted:
            kept.sock.settimeout(self._timeout)
            return kept
        self.close()
        scheme, host, port = wanted
        until = time.monotonic() + min(limits.CONNECT_SECONDS, self._timeout)
        proxy = self._trust.proxies.to(*wanted)
        sock = _dial(request, host, port, until) if proxy is None else _led(request, proxy, until)
        connection: http.client.HTTPConnection
        try:
            if scheme == "https":
                context = self._trust.context
                sock.settimeout(max(until - time.monotonic(), 0.001))
                sock = _encrypted(sock, context, request.url, host)
                connection = http.client.HTTPSConnection(host, port, context=context)
            else:
                connection = http.client.HTTPConnection(host, port)
        except BaseException:
            sock.close()
            raise
        sock.settimeout(self._timeout)
        connection.sock = sock
        connection.response_class = Answer
        self._connection, self._origin = connection, wanted
        return connection


def _encrypted(sock: socket.socket, context: ssl.SSLContext, url: str, host: str) -> socket.socket:
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except TimeoutError:
        # A plain HTTP server may wait for the end of a line that TLS never sends.
        reason = "TLS is not answered in time (is it http://?)"
        raise ConnectionFailed(place(url), reason, limits.SETTING_TRIES) from None


def _led(request: Request, proxy: Proxy, until: float) -> socket.socket:
    """A connection that a proxy leads to the server; for http:// it is the proxy's own."""
    scheme, host, port = origin(request.url)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if leads_to_metadata(host):  # the proxy's resolver would know
        _may_not_be_asked(request)
    sock = None
    try:
        sock = _dial(Request(f"http://{proxy.host}:{proxy.port}"), proxy.host, proxy.port, until)
        if scheme == "https":
            lines = {"Host": where, **proxy.headers}.items()
            head = "".join(f"{name}: {value}\r\n" for name, value in lines)
            sock.sendall(f"CONNECT {where} HTTP/1.1\r\n{head}\r\n".encode("ascii"))
            answer = Answer(sock, method="CONNECT")
            answer.begin()
            answer.close()
            if answer.status == 407:
                raise ConfigurationError(
                    f"{proxy} asks for a login: write it into HTTPS_PROXY, http://user:password@host:port"
                )
            if answer.status != 200:
                raise OSError(None, f"it answers {answer.status}")
        return sock
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError | http.client.HTTPException | ValueError):
            reason = f"{proxy}: {describe(error)}"
            raise ConnectionFailed(place(request.url), reason, limits.SETTING_TRIES) from None
        raise


def _may_not_be_asked(request: Request) -> None:
    """Refuses a link-local or metadata address that a server named."""
    if not request.own:
        raise UnreachableError(
            f"{place(request.url)} is a link-local or metadata address, which is not asked "
            "because a server says so: look at what the registry and its store are"
        )


def _dial(request: Request, host: str, port: int, until: float) -> socket.socket:
    """A connection to the first address of a host that takes one."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure = OSError("no address")
    for family, kind, protocol, _, address in found[: limits.ADDRESSES]:
        if never_asked(str(address[0])):
            _may_not_be_asked(request)
        try:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(until - time.monotonic(), 0.001))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            failure = error
    raise failure


def _meant(url: str, error: Exception) -> Exception:
    """What a failed request means."""
    where = place(url)
    if isinstance(error, ssl.SSLCertVerificationError | ssl.CertificateError):
        return refused_certificate(url, error)
    if isinstance(error, ssl.SSLError) and error.reason in NO_TLS:
        return ConfigurationError(
            f"{origin_text(url)} answers without TLS: is its address http:// instead of https://?"
        )
    if isinstance(error, http.client.BadStatusLine) and str(error).startswith(TLS_ALERT):
        return ConfigurationError(
            f"{origin_text(url)} answers with TLS: is its address https:// instead of http://?"
        )
    if isinstance(error, socket.gaierror | UnicodeError):
        return ConnectionFailed(where, describe(error), limits.SETTING_TRIES)
    return ConnectionFailed(where, describe(error))


def describe(error: BaseException) -> str:
    """What a network error means, without addresses that could hold a credential."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "host name not found"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut"
    if isinstance(error, http.client.HTTPException | ValueError):
        return "the answer is not HTTP"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__


@dataclass(frozen=True, slots=True)
class Reply:
    """A small answer, whole."""

    status: int
    is_page: bool
    """Whether it is a web page, as a login or an ingress shows it."""

    json: dict[str, Any] | None
    """None when the body is no JSON object."""


def ask(request: Request, trust: Trust, timeout: float) -> Reply:
    """Asks a question whose answer is JSON, over a connection of its own.

    Raises: ConnectionFailed when trying again may help, ConfigurationError, UnreachableError.
    """
    seconds = min(limits.ANSWER_SECONDS, timeout)
    wire = Wire(trust, seconds)
    try:
        # Proxies like oauth2-proxy answer with a login page to who does not ask for JSON.
        response = wire.send(request.with_headers(Accept="application/json"))
        body = response.small(limits.ANSWER_BYTES + 1, seconds)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionFailed(place(request.url), describe(error)) from None
    finally:
        wire.close()
    return Reply(response.status, is_page(response), _object(body))


def is_page(response: http.client.HTTPResponse) -> bool:
    return response.headers.get_content_type() == "text/html"


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        return reading.mapping(reading.document(body, longest=limits.ANSWER_BYTES), "the answer")
    except reading.UnreadableError:
        return None
