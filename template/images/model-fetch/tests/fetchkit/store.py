"""A web server that holds artifacts as MLflow's proxy does, as fast or slow as a test wants it."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

PREFIX = "/api/2.0/mlflow-artifacts/artifacts/"


@dataclass
class Store:
    """What the server does; a test may change it while it runs."""

    files: dict[str, bytes]
    """By path below `mlflow-artifacts:/`."""

    ranges: bool = True
    validators: bool = True
    """Whether answers carry an ETag."""

    content_length: bool = True
    rate: float | None = None
    """Bytes per second and connection; None sends as fast as it goes."""

    tokens: set[str] | None = None
    """Authorization headers that are let in; None lets everybody in."""

    port: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every request for a file."""

    sent: int = 0
    """Bytes of files that were sent."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    etags: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def etag(self, path: str, content: bytes) -> str:
        """Computed once for each content: a large one is asked for a hundred times."""
        with self.lock:
            if self.etags.get(path, (0, ""))[0] != id(content):
                self.etags[path] = id(content), f'"{hashlib.md5(content).hexdigest()}"'
            return self.etags[path][1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        store = self.server.store
        if store.tokens is not None and self.headers.get("Authorization") not in store.tokens:
            return self._empty(401)
        path = unquote(self.path)
        if not path.startswith(PREFIX):
            return self._empty(404)
        content = store.files.get(path.removeprefix(PREFIX))
        with store.lock:
            store.requests.append((path.removeprefix(PREFIX), self.headers.get("Range")))
        if content is None:
            return self._empty(404)
        etag = store.etag(path.removeprefix(PREFIX), content)
        start, end, status = 0, len(content), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and store.ranges and self.headers.get("If-Range", etag) == etag:
            start, end, status = int(wanted[1]), min(int(wanted[2]) + 1, len(content)), 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if store.validators:
            self.send_header("ETag", etag)
        self.send_header("Content-Type", "application/octet-stream")
        if store.content_length:
            self.send_header("Content-Length", str(end - start))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._send(content[start:end])

    def _send(self, body: bytes) -> None:
        store = self.server.store
        step = 16384 if store.rate else 1 << 20
        try:
            for at in range(0, len(body), step):
                piece = body[at : at + step]
                self.wfile.write(piece)
                with store.lock:
                    store.sent += len(piece)
                if store.rate:
                    time.sleep(len(piece) / store.rate)
        except OSError:
            self.close_connection = True

    def _empty(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: Store) -> None:
        self.store = store
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serve(files: Mapping[str, bytes], folder: str = "model", **more: object) -> Iterator[Store]:
    """A running store that holds the files below `mlflow-artifacts:/<folder>`."""
    held = {f"{folder}/{path}": content for path, content in files.items()}
    store = Store(held, **more)  # type: ignore[arg-type]
    server = _Server(store)
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
