"""compose.yaml runs the same two containers as the pod, hardened alike."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from extensions import accelerator

ROWS: dict[str, dict[str, Any]] = {
    "gb10": {"accelerator": "gb10"},
    "cpu with a key": {"accelerator": "cpu", "components": ["api-key"]},
    "official image": {"accelerator": "l4", "tei_image": "official"},
    "login": {"accelerator": "a100", "mlflow_auth": "keycloak", "project_name": "no"},
    "mount": {"accelerator": "gb10", "model_storage": "mount"},
}
MODEL = "BAAI/bge-base-en-v1.5"
CREDENTIALS = {
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_KEYCLOAK_TOKEN_URL", "MLFLOW_KEYCLOAK_CLIENT_ID", "MLFLOW_CLIENT_SECRET"),
    *("MLFLOW_AUTH_USERNAME", "MLFLOW_AUTH_PASSWORD", "MLFLOW_S3_ENDPOINT_URL"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}


@pytest.fixture(scope="session")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture(params=ROWS)
def rendered(
    request: pytest.FixtureRequest,
    kept: dict[str, Path],
    render: Callable[..., Path],
    pin_of: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    name: str = request.param
    if name not in kept:
        row = ROWS[name]
        platform = accelerator.for_name(row["accelerator"]).platforms[0]
        target = tmp_path_factory.mktemp("compose") / "rendered"
        more = {"model_id": MODEL, "pin": pin_of(MODEL), "image_platform": platform}
        kept[name] = render(target, program=False, advanced=True, **more, **row)
    return kept[name]


def compose(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "compose.yaml").read_text())
    return found


def pod(folder: Path) -> dict[str, Any]:
    deployment = yaml.safe_load((folder / "k8s/base/deployment.yaml").read_text())
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def test_compose_itself_takes_it(rendered: Path) -> None:
    if shutil.which("docker-compose"):
        command = ["docker-compose"]
    elif (
        subprocess.run(["sh", "-c", "docker compose version"], capture_output=True).returncode == 0
    ):
        command = ["docker", "compose"]
    else:
        pytest.skip("neither docker-compose nor docker compose is installed")
    done = subprocess.run(
        [*command, "--file", rendered / "compose.yaml", "config"],
        cwd=rendered,
        env={**os.environ, "API_KEY": "a-key"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"model-fetch", "tei"}


def test_both_containers_are_hardened(rendered: Path) -> None:
    for name, service in compose(rendered)["services"].items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["tmpfs"][0].startswith("/tmp:size="), name
        assert service["mem_limit"], name
        assert not {"privileged", "cap_add", "network_mode", "devices"} & service.keys(), name


def test_tei_gets_the_flags_of_the_pod(rendered: Path) -> None:
    [container] = pod(rendered)["containers"]
    service = compose(rendered)["services"]["tei"]
    assert service["command"] == container["args"]
    assert f"{container['resources']['limits']['memory'][:-2]}m" == service["mem_limit"]


def test_tei_waits_for_the_model_and_cannot_change_it(rendered: Path) -> None:
    service = compose(rendered)["services"]["tei"]
    assert service["depends_on"] == {"model-fetch": {"condition": "service_completed_successfully"}}
    volumes = dict(volume.split(":", 1) for volume in service["volumes"])
    assert volumes["cache"] == "/cache:ro"
    assert volumes["model"] == "/model:ro"


def test_it_listens_on_this_machine_alone(rendered: Path) -> None:
    services = compose(rendered)["services"]
    assert services["tei"]["ports"] == ["127.0.0.1:8355:8355"]
    assert "ports" not in services["model-fetch"]


def test_it_is_healthy_when_health_answers_200(rendered: Path) -> None:
    service = compose(rendered)["services"]["tei"]
    kind, shell, option, script = service["healthcheck"]["test"]
    assert (kind, shell, option) == ("CMD", "bash", "-c")
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    from tests.tei_stub.server import Stub, serving

    for fault, code in (("", 0), ("health", 1)):
        with serving(Stub(fault=fault)) as url:
            here = script.replace("127.0.0.1/8355", url.removeprefix("http://").replace(":", "/"))
            assert here != script
            done = subprocess.run(["bash", "-c", here], timeout=20, capture_output=True)
        assert (done.returncode != 0) == bool(code), fault


def test_credentials_come_from_the_shell_that_calls(rendered: Path) -> None:
    environment = compose(rendered)["services"]["model-fetch"]["environment"]
    assert environment.keys() >= CREDENTIALS
    assert [name for name in CREDENTIALS if environment[name] is not None] == []


def test_a_gpu_is_reserved_where_there_is_one(rendered: Path) -> None:
    service = compose(rendered)["services"]["tei"]
    gpu = "nvidia.com/gpu" in pod(rendered)["containers"][0]["resources"]["limits"]
    assert ("deploy" in service) == gpu
    if gpu:
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
