"""A real TCP proxy between a client and an HTTP server, which breaks what it is told to break."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Several of these may be set at once."""

    status: int | None = None
    """Answer with this status instead of asking the server."""

    headers: tuple[str, ...] = ()
    """Header lines of that answer, e.g. `Retry-After: 0`."""

    body: bytes = b""
    """Body of that answer."""

    cut_after: int | None = None
    """Break the connection after so many bytes of the body."""

    reset: bool = False
    """Break it by a TCP reset instead of an orderly end."""

    drip: float | None = None
    """Seconds that every KiB of the body takes, sixteen bytes at a time."""

    stall: float | None = None
    """Seconds of silence before the body."""

    flip_at: int | None = None
    """Flip one bit of this byte of the body."""

    length: int | None = None
    """Add so much to the announced Content-Length."""

    hide_length: bool = False
    """Announce no Content-Length; the end of the connection ends the body."""

    without_range: bool = False
    """Take the Range header out of the request."""

    etag: str | None = None
    """Another ETag in the answer."""


Plan = Callable[[int, str, str | None], Fault | None]
"""(number of the request, path, value of Range) -> what happens to it."""


@dataclass
class Proxy:
    upstream: int
    plan: Plan
    port: int = 0
    requests: int = 0
    faults: int = 0
    """How many requests a fault really happened to."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def breaking(upstream: int, plan: Plan) -> Iterator[Proxy]:
    """A proxy in front of 127.0.0.1:upstream."""
    proxy = Proxy(upstream, plan)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy.port = listener.getsockname()[1]

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(proxy, client), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _serve(proxy: Proxy, client: socket.socket) -> None:
    try:
        with client:
            while _exchange(proxy, client):
                pass
    except OSError:
        pass


def _exchange(proxy: Proxy, client: socket.socket) -> bool:
    """One request and its answer; whether the connection goes on."""
    head = _read_head(client)
    if head is None:
        return False
    lines, rest = head
    body = _rest_of_body(client, lines, rest)
    path = lines[0].split(" ")[1]
    wanted = _header(lines, "range")
    with proxy.lock:
        proxy.requests += 1
        number = proxy.requests
    fault = proxy.plan(number, path, wanted) or Fault()
    if fault != Fault():
        with proxy.lock:
            proxy.faults += 1
    if fault.status is not None:
        answer = [
            f"HTTP/1.1 {fault.status} Fault",
            *fault.headers,
            f"Content-Length: {len(fault.body)}",
        ]
        client.sendall(("\r\n".join(answer) + "\r\n\r\n").encode() + fault.body)
        return True
    if fault.without_range:
        lines = [line for line in lines if not re.match("(if-)?range:", line, re.IGNORECASE)]
    lines = [line for line in lines if not re.match("connection:", line, re.IGNORECASE)]
    with socket.create_connection(("127.0.0.1", proxy.upstream), timeout=60) as server:
        server.sendall(("\r\n".join([*lines, "Connection: close"]) + "\r\n\r\n").encode() + body)
        return _relay(server, client, fault)


def _relay(server: socket.socket, client: socket.socket, fault: Fault) -> bool:
    head = _read_head(server)
    if head is None:
        return False
    lines, first = head
    length = _header(lines, "content-length")
    lines = [line for line in lines if not re.match("connection:", line, re.IGNORECASE)]
    if fault.etag is not None:
        lines = [line for line in lines if not re.match("etag:", line, re.IGNORECASE)] + [
            f"ETag: {fault.etag}"
        ]
    if fault.length is not None and length is not None:
        lines = [line for line in lines if not re.match("content-length:", line, re.IGNORECASE)]
        lines.append(f"Content-Length: {int(length) + fault.length}")
    if fault.hide_length:
        lines = [line for line in lines if not re.match("content-length:", line, re.IGNORECASE)]
    keep = length is not None and not fault.hide_length and fault.length is None
    if not keep:
        lines.append("Connection: close")
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    if fault.stall:
        time.sleep(fault.stall)
    position = 0
    left = int(length) if length is not None else None
    data = first
    while True:
        if data:
            piece = bytearray(data)
            if fault.flip_at is not None and position <= fault.flip_at < position + len(piece):
                piece[fault.flip_at - position] ^= 1
            if fault.cut_after is not None and position + len(piece) >= fault.cut_after:
                client.sendall(piece[: max(fault.cut_after - position, 0)])
                if fault.reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            step = 16 if fault.drip else len(piece)
            for at in range(0, len(piece), step):
                client.sendall(piece[at : at + step])
                time.sleep((fault.drip or 0) * step / 1024)
            position += len(piece)
        if left is not None and position >= left:
            return keep
        data = server.recv(65536)
        if not data:
            return False


def _read_head(sock: socket.socket) -> tuple[list[str], bytes] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return None
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode("latin-1").split("\r\n"), rest


def _rest_of_body(sock: socket.socket, lines: list[str], rest: bytes) -> bytes:
    length = int(_header(lines, "content-length") or 0)
    while len(rest) < length:
        rest += sock.recv(65536)
    return rest


def _header(lines: list[str], name: str) -> str | None:
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return None
