"""The units for Podman: its own generator reads them, and runs what compose runs."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from extensions import accelerator
from tests import booted
from tests.conftest import Render

MODEL = "nomic-ai/nomic-embed-text-v1.5"
ROWS: dict[str, dict[str, Any]] = {
    "gb10": {"accelerator": "gb10", "components": ["api-key"]},
    "cpu": {"accelerator": "cpu"},
    "official": {"accelerator": "l4", "tei_image": "official"},
    "a prompt": {"accelerator": "cpu", "default_prompt": '$HOME ${PORT} 100% "it\'s" \\n: '},
}
IMAGES = ("example.com/fetch:1", f"example.com/tei@sha256:{'1' * 64}")
ENVIRONMENT = {"COMPOSE_MLFLOW_URI": "http://mlflow:5000", "BIND": "127.0.0.1", "PORT": "8355"}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return booted.quadlet(tmp_path_factory.mktemp("quadlet"))


def unit(text: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            rows.setdefault(key, []).append(value)
    return rows


def words(line: str) -> list[str]:
    """As systemd reads a line: its quotes are the shell's, but for what follows a `$` or a `%`."""
    filled = line.replace("$$", "\0").replace("%%", "\1")
    for name, value in ENVIRONMENT.items():
        filled = filled.replace(f"${{{name}}}", value)
    return shlex.split(filled.replace("\0", "$").replace("\1", "%"))


@pytest.fixture(params=ROWS)
def made(
    request: pytest.FixtureRequest,
    render: Render,
    pin_of: Callable[..., dict[str, Any]],
    generator: Path,
    tmp_path: Path,
) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]], Path]:
    """Compose's services, and the units by name."""
    row = ROWS[request.param]
    platform = accelerator.for_name(row["accelerator"]).platforms[0]
    more = {"model_id": MODEL, "pin": pin_of(MODEL), "image_platform": platform}
    project = render(program=False, advanced=True, **more, **row)
    written = tmp_path / "quadlets"
    script = ["bash", project / "service/service.sh", "write_quadlets", *IMAGES]
    subprocess.run(script, env=os.environ | {"QUADLETS": str(written)}, check=True)
    done = subprocess.run(
        [generator, "-dryrun"],
        env={"QUADLET_UNIT_DIRS": str(written)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "unsupported" not in done.stderr
    parts = done.stdout.split("---")[1:]
    units = {name: unit(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    services = yaml.safe_load((project / "compose.yaml").read_text())["services"]
    return services, units, project


def test_podman_runs_what_compose_runs(made: Any) -> None:
    services, units, project = made
    assert set(units) == {"text-embeddings-fetch.service", "text-embeddings.service"}
    for name, key, image in (("-fetch", "model-fetch", IMAGES[0]), ("", "tei", IMAGES[1])):
        [start] = units[f"text-embeddings{name}.service"]["ExecStart"]
        said, service = words(start), services[key]
        place = said.index(image)
        options = " ".join(said[:place])
        wanted = [word.replace("$$", "$") for word in service["command"]]
        if key == "model-fetch":
            wanted = [word.replace("${KEEP:-1}", "1") for word in wanted]
            wanted = [word for word in wanted if "KEEP_HOURS" not in word]  # 24, its own default
        assert said[place + 1 :] == wanted
        for option in (
            *("--read-only ", "--read-only-tmpfs=false", "--cap-drop all", "--pull=never"),
            *("--security-opt=no-new-privileges", "--user 10001:10001"),
            *(f"--tmpfs {service['tmpfs'][0]}", f"--memory={service['mem_limit']}"),
            f"--memory-swap={service['memswap_limit']}",
        ):
            assert option in f"{options} ", option
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            place = f"{project}{source[1:]}" if source[0] == "." else f"text-embeddings-{source}"
            assert f"-v {place}:{rest}" in options
        for variable, value in service["environment"].items():
            if variable == "API_KEY" or value is None:
                assert f"--env={variable} " in options  # systemd has it from .env
            elif not value.startswith("${"):
                assert f"--env {variable}={value} " in options
        assert "nvidia.com/gpu=all" in options or "deploy" not in service
    assert "--env=MLFLOW_TRACKING_URI=http://mlflow:5000" in words(
        units["text-embeddings-fetch.service"]["ExecStart"][0]
    )


def test_it_listens_on_loopback_and_is_ended_when_it_hangs(made: Any) -> None:
    services, units, project = made
    server = units["text-embeddings.service"]
    said = words(server["ExecStart"][0])
    assert "--publish=127.0.0.1:8355:8355" in said
    assert said[said.index("--health-on-failure") + 1] == "kill"
    check = yaml.safe_load(said[said.index("--health-cmd") + 1])
    assert check == services["tei"]["healthcheck"]["test"][1:]
    assert server["Restart"] == ["always"]
    assert f"EnvironmentFile=-{project}/.env" in "".join(
        f"EnvironmentFile={value}" for value in server["EnvironmentFile"]
    )
    [allowed] = [row for row in server["ExecStartPre"] if "allowed" in row]
    (project / ".env").write_text("BIND=0.0.0.0\n")
    refused = subprocess.run(shlex.split(allowed), capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    (project / ".env").write_text("API_KEY=a-key\n")
    assert subprocess.run(shlex.split(allowed)).returncode == 0
