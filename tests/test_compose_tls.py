"""The profile `tls` of compose: the real Caddy with the rendered Caddyfile, before the stub."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.registry import free_port
from extensions import edge
from tests.conftest import Render
from tests.tei_stub.server import Stub
from tests.tei_stub.server import serving as stub

CADDY = shutil.which("caddy")
needs_caddy = pytest.mark.skipif(CADDY is None, reason="Caddy is not installed (Debian: caddy)")


class Front:
    """Caddy on loopback, and what its clients trust."""

    def __init__(self, port: int, authority: Path) -> None:
        self.port, self.authority = port, authority

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        trust = ssl.create_default_context(cafile=str(self.authority))
        one = http.client.HTTPSConnection("localhost", self.port, timeout=30, context=trust)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        one.request(method, path, body, {"Content-Type": "application/json"} | given)
        answer = one.getresponse()
        answer.text = answer.read().decode(errors="replace")  # type: ignore[attr-defined]
        return answer


@pytest.fixture
def front(render: Render, tmp_path: Path) -> Iterator[Front]:
    project = render(program=False, accelerator="cpu", components=["api-key"])
    port, data = free_port(), tmp_path / "data"
    with stub(Stub(key="right")) as url:
        text = (project / "tls/Caddyfile").read_text()
        for there, here in {
            "8443": str(port),
            "tei:8355": url.removeprefix("http://"),
            "/page\n": f"{project}/playground\n",
        }.items():
            assert text.count(there) == 1
            text = text.replace(there, here)
        (tmp_path / "Caddyfile").write_text(text)
        clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TLS_NAME": "localhost"}
        server = subprocess.Popen(
            [str(CADDY), "run", "--config", tmp_path / "Caddyfile", "--adapter", "caddyfile"],
            env=clean | {"XDG_DATA_HOME": str(data), "XDG_CONFIG_HOME": str(tmp_path)},
            stderr=(tmp_path / "log").open("w"),
        )
        made = Front(port, data / "caddy/pki/authorities/local/root.crt")
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    made.ask("GET", "/")
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < end, (tmp_path / "log").read_text()
                    time.sleep(0.1)
            yield made
        finally:
            server.terminate()
            server.wait(timeout=30)


@needs_caddy
def test_the_network_gets_the_api_with_its_key_and_the_page(front: Front) -> None:
    body = b'{"input": "a text", "model": "m"}'
    key = {"Authorization": "Bearer right"}
    assert front.ask("POST", "/v1/embeddings", body, **key).status == 200
    assert front.ask("POST", "/v1/embeddings", body).status == 401
    for path in ("/health", "/ping", "/info", "/metrics", "/docs", "/tls/Caddyfile", "/serve.py"):
        assert front.ask("GET", path, **key).status == 404
    assert front.ask("POST", "/", body, **key).status == 404  # TEI's own, which waits in its queue
    for path in edge.PAGE_PATHS:
        answer = front.ask("GET", path)
        assert answer.status == 200
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Server") is None
    assert "<!doctype html>" in front.ask("GET", "/").text


@needs_caddy
def test_there_is_no_way_around_tls(front: Front) -> None:
    plain = http.client.HTTPConnection("localhost", front.port, timeout=30)
    plain.request("GET", "/")
    assert plain.getresponse().status == 400
    stranger = http.client.HTTPSConnection("localhost", front.port, timeout=30)
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.request("GET", "/")


def test_without_a_key_there_is_no_such_service(render: Render) -> None:
    project = render(program=False, accelerator="cpu")
    assert not (project / "tls").exists()
    rendered = yaml.safe_load((project / "compose.yaml").read_text())
    assert "tls" not in rendered["services"]
    assert "tls" not in rendered["volumes"]
