"""Who may read: MLflow's own variables, Keycloak's two grants, private authorities, no leak."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from fetchkit.models import PinnedModel
from fetchkit.program import Pod, assert_failed, assert_ready
from fetchkit.proxy import Fault, breaking
from fetchkit.store import Store, serve

SECRETS = {
    "MLFLOW_CLIENT_SECRET": "client-5ecret-kc",
    "MLFLOW_AUTH_PASSWORD": "pa55word-kc",
    "MLFLOW_TRACKING_PASSWORD": "pa55word-basic",
    "MLFLOW_TRACKING_TOKEN": "t0ken-fixed",
}


@dataclass
class Keycloak:
    """An identity provider whose tokens the store accepts; each one retires those before."""

    store: Store
    expires_in: int | None = 300
    port: int = 0
    forms: list[dict[str, str]] = field(default_factory=list)
    refuse: bool = False
    unavailable: int = 0
    """So many of the next answers are 503."""

    @property
    def env(self) -> dict[str, str]:
        return {
            "MLFLOW_KEYCLOAK_TOKEN_URL": f"http://127.0.0.1:{self.port}/realms/x/token",
            "MLFLOW_KEYCLOAK_CLIENT_ID": "fetch",
            "MLFLOW_CLIENT_SECRET": SECRETS["MLFLOW_CLIENT_SECRET"],
        }


@contextmanager
def keycloak(store: Store, **more: object) -> Iterator[Keycloak]:
    provider = Keycloak(store, **more)  # type: ignore[arg-type]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if provider.unavailable > 0:
                provider.unavailable -= 1
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            provider.forms.append({name: values[0] for name, values in parse_qs(body).items()})
            token = f"t0ken-{len(provider.forms)}-kc"
            answer = {"access_token": token, "expires_in": provider.expires_in}
            if provider.refuse:
                answer = {"error": "unauthorized_client"}
            else:
                store.tokens = {f"Bearer {token}"}
            content = json.dumps(answer).encode()
            self.send_response(401 if provider.refuse else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def locked(mirrored: PinnedModel) -> Iterator[Store]:
    """A store that lets nobody in yet."""
    with serve(mirrored.files, tokens=set()) as store:
        yield store


def assert_no_secret(pod: Pod, log: str) -> None:
    """Neither in what was said nor in any file."""
    texts = [log, pod.termination.read_text()]
    texts += [p.read_text(errors="replace") for p in pod.cache.rglob("*") if p.is_file()]
    for secret in (*SECRETS.values(), "t0ken"):
        assert not any(secret in text for text in texts), secret


def test_keycloak_with_a_user(pod: Pod, mirrored: PinnedModel, locked: Store) -> None:
    user = {"MLFLOW_AUTH_USERNAME": "ada", "MLFLOW_AUTH_PASSWORD": SECRETS["MLFLOW_AUTH_PASSWORD"]}
    with keycloak(locked) as provider:
        run = pod.run(mirrored, locked.url, env={**provider.env, **user})
    assert_ready(run, pod, mirrored)
    assert provider.forms[0]["grant_type"] == "password"
    assert provider.forms[0]["username"] == "ada"
    assert provider.forms[0]["scope"] == "openid"
    assert_no_secret(pod, run.log)


def test_keycloak_with_a_client(pod: Pod, mirrored: PinnedModel, locked: Store) -> None:
    with keycloak(locked) as provider:
        env = {**provider.env, "MLFLOW_KEYCLOAK_SCOPE": "mlflow"}
        run = pod.run(mirrored, locked.url, env=env)
    assert_ready(run, pod, mirrored)
    assert provider.forms[0]["grant_type"] == "client_credentials"
    assert provider.forms[0]["scope"] == "mlflow"
    assert len(provider.forms) == 1
    assert_no_secret(pod, run.log)


def test_a_token_is_renewed_before_it_expires(
    pod: Pod, mirrored: PinnedModel, locked: Store
) -> None:
    locked.rate = 3e5
    with keycloak(locked, expires_in=1) as provider:
        run = pod.run(mirrored, locked.url, env=provider.env)
    assert_ready(run, pod, mirrored)
    assert len(provider.forms) > 2


def test_a_token_that_is_refused_in_mid_download_is_renewed(
    pod: Pod, mirrored: PinnedModel, locked: Store
) -> None:
    def revoke(number: int, path: str, wanted: str | None) -> None:
        if number in (6, 14):
            locked.tokens = set()

    with keycloak(locked) as provider, breaking(locked.port, revoke) as proxy:
        run = pod.run(mirrored, proxy.url, env=provider.env)
    assert_ready(run, pod, mirrored)
    assert len(provider.forms) >= 3
    assert_no_secret(pod, run.log)


def test_a_provider_that_is_away_for_a_moment_is_asked_again(
    pod: Pod, mirrored: PinnedModel, locked: Store
) -> None:
    with keycloak(locked, unavailable=3) as provider:
        run = pod.run(mirrored, locked.url, env=provider.env)
    assert_ready(run, pod, mirrored)
    assert provider.unavailable == 0


def test_a_provider_that_refuses_is_said(pod: Pod, mirrored: PinnedModel, locked: Store) -> None:
    with keycloak(locked, refuse=True) as provider:
        run = pod.run(mirrored, locked.url, env=provider.env)
    assert_failed(run, pod, 4)
    assert "unauthorized_client" in run.last
    assert_no_secret(pod, run.log)


def test_a_provider_that_is_down_is_the_network(
    pod: Pod, mirrored: PinnedModel, locked: Store
) -> None:
    env = {
        "MLFLOW_KEYCLOAK_TOKEN_URL": "http://127.0.0.1:9/token",
        "MLFLOW_KEYCLOAK_CLIENT_ID": "fetch",
        "MLFLOW_CLIENT_SECRET": SECRETS["MLFLOW_CLIENT_SECRET"],
    }
    assert_failed(pod.run(mirrored, locked.url, "--retries", "1", env=env), pod, 5)


@pytest.mark.parametrize(
    "env",
    [
        {"MLFLOW_KEYCLOAK_TOKEN_URL": "not an address", "MLFLOW_KEYCLOAK_CLIENT_ID": "x"},
        {"MLFLOW_KEYCLOAK_TOKEN_URL": "http://127.0.0.1:9/"},
        {"MLFLOW_KEYCLOAK_TOKEN_URL": "http://127.0.0.1:9/", "MLFLOW_KEYCLOAK_CLIENT_ID": "x"},
        {"MLFLOW_TRACKING_TOKEN": "two words"},
        {"MLFLOW_TRACKING_SERVER_CERT_PATH": "/nowhere.pem"},
        {"MLFLOW_TRACKING_CLIENT_CERT_PATH": "/nowhere.pem"},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_said(
    pod: Pod, mirrored: PinnedModel, locked: Store, env: dict[str, str]
) -> None:
    assert_failed(pod.run(mirrored, locked.url, env=env), pod, 2)


def test_user_and_password_go_before_a_token(
    pod: Pod, mirrored: PinnedModel, locked: Store
) -> None:
    password = SECRETS["MLFLOW_TRACKING_PASSWORD"]
    basic = base64.b64encode(f"ada:{password}".encode()).decode()
    locked.tokens = {f"Basic {basic}"}
    env = {
        "MLFLOW_TRACKING_USERNAME": "ada",
        "MLFLOW_TRACKING_PASSWORD": password,
        "MLFLOW_TRACKING_TOKEN": SECRETS["MLFLOW_TRACKING_TOKEN"],
    }
    run = pod.run(mirrored, locked.url, env=env)
    assert_ready(run, pod, mirrored)
    assert_no_secret(pod, run.log)


def test_a_token(pod: Pod, mirrored: PinnedModel, locked: Store) -> None:
    token = SECRETS["MLFLOW_TRACKING_TOKEN"]
    locked.tokens = {f"Bearer {token}"}
    run = pod.run(mirrored, locked.url, env={"MLFLOW_TRACKING_TOKEN": token})
    assert_ready(run, pod, mirrored)
    locked.tokens = set()
    pod.link.unlink()
    other = Pod(pod.folder / "other")
    refused = other.run(mirrored, locked.url, env={"MLFLOW_TRACKING_TOKEN": token})
    assert_failed(refused, other, 4)
    assert_no_secret(other, refused.log)


def test_credentials_do_not_follow_a_redirect_to_another_host(
    pod: Pod, mirrored: PinnedModel
) -> None:
    token = SECRETS["MLFLOW_TRACKING_TOKEN"]
    with serve(mirrored.files, tokens={None}) as elsewhere:  # type: ignore[arg-type]
        to = f"Location: http://localhost:{elsewhere.port}/api/2.0/mlflow-artifacts/artifacts"

        def plan(number: int, path: str, wanted: str | None) -> Fault:
            return Fault(status=307, headers=(f"{to}/{path.partition('/artifacts/')[2]}",))

        with breaking(elsewhere.port, plan) as proxy:
            run = pod.run(mirrored, proxy.url, env={"MLFLOW_TRACKING_TOKEN": token})
    assert_ready(run, pod, mirrored)


@contextmanager
def over_tls(store: Store, certificate: Path) -> Iterator[str]:
    """The address of a TLS terminator in front of the store."""
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def pump(a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve_one(raw: socket.socket) -> None:
        try:
            with (
                context.wrap_socket(raw, server_side=True) as client,
                socket.create_connection(("127.0.0.1", store.port)) as server,
            ):
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()
                pump(client, server)
                back.join()
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve_one, args=(raw,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(2)
        listener.close()


@pytest.mark.parametrize(
    "variable",
    ["MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"],
)
def test_a_private_authority(
    pod: Pod, mirrored: PinnedModel, certificate: Path, variable: str
) -> None:
    with serve(mirrored.files) as store, over_tls(store, certificate) as url:
        untrusted = pod.run(mirrored, url)
        assert_failed(untrusted, pod, 2)
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in untrusted.last
        run = pod.run(mirrored, url, env={variable: str(certificate / "cert.pem")})
    assert_ready(run, pod, mirrored)
