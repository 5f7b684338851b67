"""MLflow and its store behind an HTTP proxy: a real one in between, names that only it can resolve."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fetchkit.hostile import answering
from fetchkit.models import PinnedModel, embedding_model
from fetchkit.program import Pod, assert_failed, assert_ready
from fetchkit.store import Store, _Server, serve
from model_fetch.failures import ConfigurationError
from model_fetch.proxies import Proxies

NAME = "mlflow.example.com"  # resolved by nobody but the proxy
TINY = PinnedModel(embedding_model(weights=4096), "mlflow-artifacts:/model")


@dataclass
class Proxy:
    """A forward proxy that leads every name to one port of this machine."""

    upstream: int
    login: str | None = None
    status: int = 200
    seen: list[str] = field(default_factory=list)
    """Of each connection, what it was asked for."""

    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Forward

    def log_message(self, *_: object) -> None:
        pass

    def _lets_in(self) -> bool:
        proxy = self.server.proxy
        proxy.seen.append(f"{self.command} {self.path.split('?')[0]}")
        wrong = proxy.login and self.headers.get("Proxy-Authorization") != proxy.login
        status = 407 if wrong else proxy.status
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return status == 200

    def do_CONNECT(self) -> None:
        if not self._lets_in():
            return
        with socket.create_connection(("127.0.0.1", self.server.proxy.upstream)) as there:
            self.send_response(200, "Connection established")
            self.end_headers()
            self._between(there)

    def do_GET(self) -> None:
        if not self._lets_in():
            return
        parts = urlsplit(self.path)
        with socket.create_connection(("127.0.0.1", self.server.proxy.upstream)) as there:
            kept = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
            lines = "".join(f"{k}: {v}\r\n" for k, v in (kept | {"Connection": "close"}).items())
            target = parts.path + (f"?{parts.query}" if parts.query else "")
            there.sendall(f"{self.command} {target} HTTP/1.1\r\n{lines}\r\n".encode())
            self._between(there)

    def _between(self, there: socket.socket) -> None:
        def back() -> None:
            with suppress(OSError):
                while data := there.recv(65536):
                    self.connection.sendall(data)
                self.connection.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=back, daemon=True)
        thread.start()
        with suppress(OSError):
            while data := self.connection.recv(65536):
                there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        thread.join(5)


class _Forward(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)
        proxy.port = self.server_address[1]

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy(0)
    server = _Forward(made)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(mirrored: PinnedModel, proxy: Proxy) -> Iterator[Store]:
    with serve(mirrored.files) as running:
        proxy.upstream = running.port
        yield running


@pytest.fixture
def authority(tmp_path: Path, mirrored: PinnedModel, proxy: Proxy) -> Iterator[Path]:
    """A store with TLS, and the file of who signed its certificate."""
    trustme = pytest.importorskip("trustme", reason="no certificates here: install trustme")
    signer, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    signer.issue_cert(NAME).configure_cert(context)
    signer.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = _Server(Store({f"model/{path}": data for path, data in mirrored.files.items()}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    proxy.upstream = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield tmp_path / "ca.pem"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_a_store_without_tls_is_reached_through_it(
    variable: str, pod: Pod, mirrored: PinnedModel, store: Store, proxy: Proxy
) -> None:
    run = pod.run(mirrored, f"http://{NAME}:5000", env={variable: proxy.url})

    assert_ready(run, pod, mirrored)
    assert any(asked.startswith(f"GET http://{NAME}:5000/api/") for asked in proxy.seen)


@pytest.mark.parametrize("login", [None, "Basic dGVhbTpwQHNz"])  # team:p@ss
def test_a_store_with_tls_is_reached_through_a_tunnel(
    login: str | None, pod: Pod, mirrored: PinnedModel, authority: Path, proxy: Proxy
) -> None:
    proxy.login = login
    where = proxy.url.replace("//", "//team:p%40ss@") if login else proxy.url
    env = {"HTTPS_PROXY": where, "MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority)}
    run = pod.run(mirrored, f"https://{NAME}", env=env)

    assert_ready(run, pod, mirrored)
    assert set(proxy.seen) == {f"CONNECT {NAME}:443"}
    assert "p@ss" not in run.log
    assert "p%40ss" not in run.log


@pytest.mark.parametrize(
    ("login", "status", "code", "said"),
    [
        ("Basic eDp5", 200, 2, "asks for a login: write it into HTTPS_PROXY"),
        (None, 403, 5, "it answers 403"),
        (None, 502, 5, "it answers 502"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    login: str | None,
    status: int,
    code: int,
    said: str,
    pod: Pod,
    mirrored: PinnedModel,
    proxy: Proxy,
) -> None:
    proxy.login, proxy.status = login, status
    env = {"HTTPS_PROXY": proxy.url}
    run = pod.run(mirrored, f"https://{NAME}", "--retries", "1", env=env)

    assert_failed(run, pod, code)
    assert f"the proxy 127.0.0.1:{proxy.port}" in run.last
    assert said in run.last


def test_a_proxy_that_is_away_is_named(pod: Pod, mirrored: PinnedModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = {"HTTPS_PROXY": f"127.0.0.1:{port}"}
    run = pod.run(mirrored, f"https://{NAME}", "--retries", "1", env=env)

    assert_failed(run, pod, 5)
    assert f"the proxy 127.0.0.1:{port}: Connection refused" in run.last


@pytest.mark.parametrize("host", ["2852039166", "0xa9fea9fe", "metadata.google.internal"])
def test_no_server_sends_the_program_to_a_metadata_service_through_it(
    host: str, pod: Pod, proxy: Proxy
) -> None:
    """The proxy's machine has one too, and the proxy resolves what this machine does not."""
    moved = (302, {"Location": f"http://{host}/latest/meta-data/"}, b"")
    with answering(lambda asked: moved) as server:
        proxy.upstream = server.port
        run = pod.run(TINY, f"http://{NAME}:5000", env={"HTTP_PROXY": proxy.url})
    assert_failed(run, pod, 5)
    assert "link-local or metadata address" in run.last
    assert all(NAME in asked for asked in proxy.seen)


def test_a_server_of_this_machine_is_asked_itself(
    pod: Pod, mirrored: PinnedModel, store: Store, proxy: Proxy
) -> None:
    assert_ready(pod.run(mirrored, store.url, env={"HTTP_PROXY": proxy.url}), pod, mirrored)
    assert proxy.seen == []


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("", NAME, False),
        (".svc,.cluster.local", NAME, False),
        (".svc, .cluster.local", "mlflow.mlflow.svc.cluster.local", True),
        (".svc", "mlflow.mlflow.svc", True),
        ("example.com", NAME, True),
        ("ple.com", NAME, False),
        ("*", NAME, True),
        (f"{NAME}:5000", NAME, True),
        (f"{NAME}:80", NAME, False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("fd00::/8", "fd00::1", True),
        ("", "localhost", True),
        ("", "127.0.0.5", True),
        ("", "::1", True),
    ],
)
def test_who_is_asked_without_it(no_proxy: str, host: str, direct: bool) -> None:
    proxies = Proxies({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": no_proxy})

    assert (proxies.to("http", host, 5000) is None) == direct
    assert proxies.to("https", host, 5000) is None


@pytest.mark.parametrize("text", ["socks5://proxy:1080", "https://proxy", "http://", "http://a b"])
def test_what_is_no_proxy_is_said_so_without_its_login(text: str) -> None:
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY is not the address of a proxy") as e:
        Proxies({"HTTPS_PROXY": text.replace("//", "//user:hunter2@")})
    assert "hunter2" not in str(e.value)
