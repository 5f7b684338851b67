"""Stands in for TEI's router behind the front of Thinkube's image.

Listens only after "loading", as TEI does. What it was started with goes to $STUB/started.json; `load`,
`unhealthy` and `batch` in $STUB say how it behaves. Checks wait while there is a `batch`; the most that
have waited at the same time are told at /waited.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent

waiting = threading.Lock()
checks: list[int] = [0, 0]  # that wait now, and the most that ever did


def wait_behind_the_batch() -> None:
    """As TEI's checks do, which go on waiting when their client has left."""
    with waiting:
        checks[0] += 1
        checks[1] = max(checks)
    while (HERE / "batch").exists():
        time.sleep(0.02)
    with waiting:
        checks[0] -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            wait_behind_the_batch()
            self.answer(503 if (HERE / "unhealthy").exists() else 200, b"")
        elif self.path == "/stream":  # two parts; the second waits for the client to have the first
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"one")
            self.wfile.flush()
            wait_for(HERE / "second")
            self.wfile.write(b"two")
        elif self.path == "/waited":
            self.answer(200, json.dumps(checks).encode())
        elif self.path == "/crash":
            os._exit(9)
        else:
            peer = f"{self.client_address[0]}:{self.client_address[1]}"
            self.answer(200, json.dumps({"path": self.path, "peer": peer}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        json_sent = (self.headers["Content-Type"] or "").startswith("application/json")
        self.answer(200 if json_sent else 415, body)

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


def main() -> None:
    started = {"arguments": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}
    (HERE / "started.part").write_text(json.dumps(started))
    (HERE / "started.part").rename(HERE / "started.json")
    wait_for(HERE / "load")
    if (HERE / "load").read_text() == "fail":
        sys.exit("warm-up failed")
    port = next(int(a.partition("=")[2]) for a in sys.argv if a.startswith("--port="))
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = False  # requests in flight are finished, as by TEI
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
