"""A server that answers whatever a test tells it to, byte by byte if need be."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .models import PinnedModel
from .store import PREFIX

Send = Callable[[bytes], None]


@dataclass(frozen=True)
class Asked:
    """A request, as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def file(self) -> str:
        """The pinned file that is asked of MLflow's proxy; '' for all else."""
        return self.path.removeprefix(f"{PREFIX}model/") if PREFIX in self.path else ""


# An answer: status, headers and body; or what sends it by itself; None for a 404.
Answer = tuple[int, Mapping[str, str], Any] | Callable[[Send], None] | None
Handler = Callable[[Asked], Answer]


@dataclass
class Hostile:
    port: int
    scheme: str
    asked: list[Asked] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"


@contextmanager
def answering(handler: Handler, certificate: Path | None = None) -> Iterator[Hostile]:
    """certificate: folder with cert.pem and key.pem, for TLS."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    server = Hostile(listener.getsockname()[1], "https" if certificate else "http")
    context = None
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    over = threading.Event()

    def converse(raw: socket.socket) -> None:
        try:
            with context.wrap_socket(raw, server_side=True) if context else raw as client:
                while (asked := _read(client)) is not None and not over.is_set():
                    server.asked.append(asked)
                    answer = handler(asked)
                    if callable(answer):
                        answer(client.sendall)
                        return
                    client.sendall(encoded(*(answer or (404, {}, b""))))
        except (OSError, ValueError):
            pass

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=converse, args=(raw,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def encoded(status: int, headers: Mapping[str, str], body: Any) -> bytes:
    """An answer as bytes; what is no bytes becomes JSON."""
    given = dict(headers)
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
        given.setdefault("Content-Type", "application/json")
    given.setdefault("Content-Length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode("latin-1") + body


def dripping(data: bytes, first: bytes = b"", every: float = 0.1, step: int = 1) -> Answer:
    """Sends `first` at once, and then so many bytes at a time."""

    def send(out: Send) -> None:
        out(first)
        for at in range(0, len(data), step):
            out(data[at : at + step])
            time.sleep(every)

    return send


def flooding(piece: bytes, first: bytes = b"", most: int = 1 << 28) -> Answer:
    """Sends `piece` again and again, as fast as it goes."""

    def send(out: Send) -> None:
        out(first)
        many = piece * max(1, (1 << 16) // len(piece))
        for _ in range(most // len(many)):
            out(many)

    return send


def honest(model: PinnedModel) -> Handler:
    """Answers as MLflow's proxy in front of its own disk does, with ranges."""

    def answer(asked: Asked) -> Answer:
        content = model.files.get(asked.file)
        if content is None:
            return None
        wanted = asked.headers.get("range", "")
        etag = {"ETag": '"x"'}
        if not wanted:
            return 200, etag, content
        start, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(last) + 1]
        place = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        return 206, {"Content-Range": place, **etag}, part

    return answer


def signing(model: PinnedModel, sign: Callable[[str], Any]) -> Handler:
    """Answers as an MLflow that signs addresses; `sign` gives its answer for a file."""
    proxy = honest(model)

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/server-info"):
            return 200, {}, {"multipart_downloads_enabled": True}
        if "/presigned/model/" in asked.path:
            return 200, {}, sign(asked.path.partition("/presigned/model/")[2])
        return proxy(asked)

    return answer


def instead(handler: Handler, of: str, answer: Answer) -> Handler:
    """The handler, but for requests whose path ends with `of`."""
    return lambda asked: answer if asked.path.endswith(of) else handler(asked)


def _read(client: socket.socket) -> Asked | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(65536)
        if not more:
            return None
        data += more
        if data.startswith(b"\x16\x03"):  # TLS, which real servers answer so as well
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    length = int(headers.get("content-length", 0))
    client.settimeout(5)
    while len(body) < length:
        body += client.recv(65536)
    client.settimeout(None)
    return Asked(method, path, headers, body)
