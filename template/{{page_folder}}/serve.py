"""Serve the page on loopback, in front of any running service: `python3 serve.py --url https://…`.

A browser may not ask another address with an API key (TEI allows no such header across origins), so
the page and the service must have one: this hands the API's requests on, and nothing else. In the
cluster the route does that, and this serves the files alone (--page-alone).
"""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

HERE = Path(__file__).resolve().parent
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/service.js": ("service.js", "text/javascript; charset=utf-8"),
    "/vectors.js": ("vectors.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
ASKED = {"GET": {"/info"}, "POST": {"/v1/embeddings"}}
LONGEST_BODY = 2_000_000
"""Bytes: TEI's own --payload-limit."""
LONGEST_ANSWER = 64_000_000
SECONDS = 300
AT_A_TIME = 64
"""Connections; more wait."""


class Page(BaseHTTPRequestHandler):
    """The page's files, and the requests that it makes."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    service: SplitResult | None
    """None: the files alone."""

    names: frozenset[str]
    """Host names of this page, beside addresses and localhost."""

    def do_GET(self) -> None:
        """A file of the page, or what the service says of itself."""
        path = self.path.partition("?")[0]
        if path in FILES:
            name, kind = FILES[path]
            self.answer(200, (HERE / name).read_bytes(), kind)
        else:
            self.hand_on(path)

    def do_POST(self) -> None:
        """A request of the page."""
        self.hand_on(self.path)

    def hand_on(self, path: str) -> None:
        """Ask the service the same, if it is the API's and comes from the page itself."""
        if self.service is None or path not in ASKED[self.command]:
            self.close_connection = True
            return self.say(404, "not a part of this page")
        # Another page in the same browser could send its requests here; a browser says whose they are.
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.is_own(host) or (origin and urlsplit(origin).netloc != host):
            self.close_connection = True
            return self.say(
                403,
                "only the page itself may ask, called by its address or by one of --names (PAGE_NAMES)",
            )
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > LONGEST_BODY:
            self.close_connection = True
            return self.say(413, f"at most {LONGEST_BODY:,} bytes per request")
        body = self.rfile.read(int(length))
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self.headers.get("Authorization"):
            headers["Authorization"] = key
        try:
            connection = connect(self.service)
            connection.request(self.command, self.service.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            said = answer.read(LONGEST_ANSWER + 1)
            connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            return self.say(502, f"{self.service.netloc} cannot be reached: {reason(error)}")
        if 300 <= answer.status < 400 or len(said) > LONGEST_ANSWER:
            return self.say(502, f"{self.service.netloc} is no embeddings service")
        return self.answer(answer.status, said, "application/json")

    def is_own(self, host: str) -> bool:
        """Whether this is an address or a known name: any other may be a stranger's that leads here."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name == "localhost" or name in self.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def say(self, status: int, text: str) -> None:
        """Answer with one sentence."""
        self.answer(
            status, b'{"message": "%s"}' % text.replace('"', "'").encode(), "application/json"
        )

    def answer(self, status: int, body: bytes, kind: str) -> None:
        """Answer, and let nothing be kept."""
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: texts and keys stay in memory."""


class Server(ThreadingHTTPServer):
    """A bounded number of connections at a time."""

    daemon_threads = True
    places = threading.BoundedSemaphore(AT_A_TIME)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Waits for a place."""
        self.places.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives it back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a browser that leaves is no error."""


def connect(service: SplitResult) -> http.client.HTTPConnection:
    """A connection to the service, which is not made yet."""
    host, port = service.hostname or "", service.port
    if service.scheme == "https":
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=SECONDS, context=context)
    return http.client.HTTPConnection(host, port, timeout=SECONDS)


def service_at(url: str) -> SplitResult:
    """The service at an address.

    Raises: ValueError, in words.
    """
    sys.path[:0] = [str(folder / "smoke") for folder in list(HERE.parents)[:2]]
    from endpoint import base_url

    # What the README names for OpenAI's client is the same service.
    return urlsplit(base_url(url).removesuffix("/v1"))


def reason(error: Exception) -> str:
    """Why it failed, in a few printable characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(c for c in str(text) if c.isprintable() and c != "\\")[:200]


def main() -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8355")
    parser.add_argument("--port", type=int, default=8356, help="of the page")
    parser.add_argument("--listen", default="127.0.0.1", help="address of the page")
    parser.add_argument("--names", default="", help="names of the machine, separated by commas")
    parser.add_argument("--page-alone", action="store_true", help="hand nothing on")
    given = parser.parse_args()
    Page.names = frozenset(given.names.split(",")) - {""}
    try:
        Page.service = None if given.page_alone else service_at(given.url)
    except ValueError as error:
        print(f"playground: {error}", file=sys.stderr)
        return 1
    try:
        server = Server((given.listen, given.port), Page)
    except (OSError, OverflowError) as error:
        print(
            f"playground: {given.listen}, port {given.port} cannot be used ({reason(error)}): PAGE_PORT=… "
            "takes another",
            file=sys.stderr,
        )
        return 1
    shown = Page.service.geturl() if Page.service else "what its route leads to"
    print(f"http://{given.listen}:{server.server_port}/ shows {shown}; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
