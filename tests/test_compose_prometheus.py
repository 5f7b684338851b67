"""The profile `monitoring` of compose: the real Prometheus, started as its container is, before the stub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.registry import free_port
from tests.conftest import Render
from tests.tei_stub.server import Stub
from tests.tei_stub.server import serving as stub


@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="Prometheus is not installed (Debian: the same)"
)
def test_it_scrapes_the_service_and_knows_the_alerts(render: Render, tmp_path: Path) -> None:
    project = render(program=False, accelerator="cpu", components=["monitoring"])
    service = yaml.safe_load((project / "compose.yaml").read_text())["services"]["prometheus"]
    assert service["profiles"] == ["monitoring"]
    assert service["ports"] == ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"]
    port = free_port()
    with stub(Stub()) as url:
        body = b'{"input": "a text", "model": "m"}'  # a metric appears with its first use
        asked = {"Content-Type": "application/json"}
        used = urllib.request.Request(f"{url}/v1/embeddings", body, asked)
        urllib.request.urlopen(used, timeout=30).close()
        config = (project / "monitoring/prometheus.yaml").read_text()
        (tmp_path / "prometheus.yaml").write_text(
            config.replace("tei:8355", url.removeprefix("http://"))
            .replace("/tmp/rules", f"{tmp_path}/rules")
            .replace("15s", "1s")
        )
        [command] = service["command"]
        for mount in service["volumes"]:
            source, _, place = mount.partition(":")
            if source.startswith("./") and "prometheus.yaml" not in place:
                command = command.replace(place.removesuffix(":ro"), str(project / source))
        command = command.replace("/tmp/rules", f"{tmp_path}/rules")
        command = command.replace("/etc/prometheus/prometheus.yaml", f"{tmp_path}/prometheus.yaml")
        command = command.replace("=/prometheus", f"={tmp_path}/data")
        server = subprocess.Popen(
            [*service["entrypoint"], f"{command} --web.listen-address=127.0.0.1:{port}"],
            env={"PATH": os.environ["PATH"]},
            stderr=(tmp_path / "log").open("w"),
        )

        def ask(path: str) -> Any:
            address = f"http://127.0.0.1:{port}/api/v1/{path}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]

        try:
            end = time.monotonic() + 60
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                try:
                    result = ask("query?query=up")["result"]
                    if result and result[0]["value"][1] == "1":
                        break
                except OSError:
                    pass
                time.sleep(0.2)
            assert result[0]["metric"]["job"] == "text-embeddings/text-embeddings"
            groups = ask("rules")["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            assert "TextEmbeddingsDown" in {rule["name"] for rule in rules}
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
            assert ask("query?query=te_request_count")["result"]
        finally:
            server.terminate()
            server.wait(timeout=30)


def test_without_monitoring_there_is_no_such_service(render: Render) -> None:
    project = render(program=False, accelerator="cpu")
    assert "prometheus" not in yaml.safe_load((project / "compose.yaml").read_text())["services"]
