"""A small HTTP(S) server on loopback that stands before MLflow: it can ask for a login, or refuse."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

Answer = tuple[int, dict[str, str], bytes]
HTML = {"Content-Type": "text/html"}
JSON = {"Content-Type": "application/json"}


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


def only_with(token: str) -> Callable[[Request], Answer | None]:
    """Lets requests through that carry this bearer token."""

    def rule(request: Request) -> Answer | None:
        allowed = request.headers.get("Authorization") == f"Bearer {token}"
        return None if allowed else (401, HTML, b"no")

    return rule


@dataclass
class Gateway:
    """Where it listens, and what it was asked."""

    uri: str
    requests: list[Request] = field(default_factory=list)


@contextmanager
def gateway(
    answer: Callable[[Request], Answer | None],
    upstream: str = "",
    certificate: Path | None = None,
) -> Iterator[Gateway]:
    """Answer requests with `answer`; where that gives None, pass them on to `upstream`.

    Args: certificate: a file with key and certificate, for TLS.
    """
    seen: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            request = Request(self.command, self.path, self.headers, self.rfile.read(length))
            seen.append(request)
            status, headers, body = answer(request) or _forward(upstream, request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _serve

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        scheme = "https" if certificate else "http"
        yield Gateway(f"{scheme}://127.0.0.1:{server.server_port}", seen)
    finally:
        server.shutdown()
        server.server_close()


def _forward(upstream: str, request: Request) -> Answer:
    kept = {n: v for n, v in request.headers.items() if n in ("Content-Type", "Accept", "Range")}
    asked = urllib.request.Request(
        upstream + request.path, request.body or None, kept, method=request.method
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, _kept(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, _kept(error.headers), error.read()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in headers.items() if n in ("Content-Type", "Content-Range", "ETag")}
