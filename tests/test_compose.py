"""compose.yaml runs the same two containers as the pod, hardened alike."""

from __future__ import annotations

import json
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


def test_one_thread_computes_a_small_model(
    render: Callable[..., Path], pin_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """In the pod as in compose; a larger model's threads are as many as the pod has cores."""
    for size, threads in ((384, "1"), (768, None)):
        pin = pin_of(MODEL)
        pin["facts"]["hidden_size"] = size
        more = {
            "model_id": MODEL,
            "pin": pin,
            "accelerator": "cpu",
            "image_platform": "linux/amd64",
        }
        folder = render(tmp_path / str(size), program=False, **more)
        pod = yaml.safe_load((folder / "k8s/base/deployment.yaml").read_text())
        container = pod["spec"]["template"]["spec"]["containers"][0]
        variables = {row["name"]: row.get("value") for row in container["env"]}
        assert variables["OMP_NUM_THREADS"] == threads
        assert variables.get("RAYON_NUM_THREADS") == threads
        assert compose(folder)["services"]["tei"]["environment"].get("OMP_NUM_THREADS") == threads


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
    assert set(yaml.safe_load(done.stdout)["services"]) >= {"model-fetch", "tei"}


def test_both_containers_are_hardened(rendered: Path) -> None:
    services = compose(rendered)["services"]
    # Caddy's image is root's, whose powers are taken all the same but the one that its file asks for.
    assert services.pop("tls", {}).get("cap_add", ["NET_BIND_SERVICE"]) == ["NET_BIND_SERVICE"]
    for name, service in services.items():
        # Whoever owns the volume in its image.
        assert service["user"] == ("65534:65534" if name == "prometheus" else "10001:10001"), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["tmpfs"][0].startswith("/tmp:size="), name
        assert service["mem_limit"] == service["memswap_limit"], name
        assert service["logging"]["options"] == {"max-size": "20m", "max-file": "5"}, name
        assert "cpus" not in service, name  # an engine refuses more than its machine has
        assert not {"privileged", "cap_add", "network_mode", "devices"} & service.keys(), name


def test_tei_gets_the_flags_of_the_pod(rendered: Path) -> None:
    [container] = pod(rendered)["containers"]
    service = compose(rendered)["services"]["tei"]
    link = "/model/BAAI-bge-base-en-v1.5/3"
    assert service["command"] == [
        f"--model-id={link}" if arg.startswith("--model-id=") else arg for arg in container["args"]
    ]
    assert f"--link={link}" in compose(rendered)["services"]["model-fetch"]["command"]
    assert f"{container['resources']['limits']['memory'][:-2]}m" == service["mem_limit"]


def test_tei_waits_for_the_model_and_cannot_change_it(rendered: Path) -> None:
    service = compose(rendered)["services"]["tei"]
    assert service["depends_on"] == {"model-fetch": {"condition": "service_completed_successfully"}}
    volumes = dict(volume.split(":", 1) for volume in service["volumes"])
    assert volumes["cache"] == "/cache:ro"
    assert volumes["model"] == "/model:ro"


def test_it_listens_on_this_machine_alone_if_nothing_else_is_asked_for(rendered: Path) -> None:
    services = compose(rendered)["services"]
    assert services["tei"]["ports"] == ["${BIND:-127.0.0.1}:${PORT:-8355}:8355"]
    assert "ports" not in services["model-fetch"]


def test_it_is_healthy_by_what_waits_behind_no_batch(rendered: Path) -> None:
    healthcheck = compose(rendered)["services"]["tei"]["healthcheck"]
    kind, shell, option, script = healthcheck["test"]
    assert (kind, shell, option) == ("CMD", "bash", "-c")
    assert "GET /metrics " in script
    assert healthcheck["retries"] == 3  # what counts while it loads is start_period alone
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    from tests.tei_stub.server import Stub, serving

    with serving(Stub(fault="health")) as url:  # its /health is not asked
        here = script.replace("127.0.0.1/8355", url.removeprefix("http://").replace(":", "/"))
        assert here != script
        assert subprocess.run(["bash", "-c", here], timeout=20).returncode == 0
    done = subprocess.run(["bash", "-c", here], timeout=20, capture_output=True)
    assert done.returncode != 0  # nothing listens


def test_the_server_changes_with_what_is_pinned_and_only_then(
    render: Callable[..., Path], pin_of: Callable[..., dict[str, Any]]
) -> None:
    """Else the next crash changes the vectors: compose restarts what has changed in this file."""

    def made(model_id: str, **changes: Any) -> tuple[dict[str, Any], str]:
        pin = pin_of(model_id) | changes
        services = compose(render(program=False, model_id=model_id, pin=pin))["services"]
        link = next(a for a in services["model-fetch"]["command"] if a.startswith("--link="))
        return services["tei"], link.removeprefix("--link=")

    base, link = made(MODEL)
    assert made(MODEL) == (base, link)
    assert made(MODEL, revision="0" * 40) == (base, link)
    others = [made(MODEL, version="4"), made("BAAI/bge-large-en-v1.5")]
    for other, other_link in others:
        assert other != base
        assert other_link != link
        assert f"--model-id={other_link}" in other["command"]
    assert (
        made(MODEL, version=None, files=[], run_id=None, artifact_uri=None)[1] == "/model/current"
    )


def test_two_tasks_of_a_version_do_not_share_a_link(
    render: Callable[..., Path], pin_of: Callable[..., dict[str, Any]]
) -> None:
    model_id = "jinaai/jina-embeddings-v3"
    links = set()
    for task in ("retrieval.passage", "retrieval.query"):
        project = render(
            program=False,
            **{"model_id": model_id, "pin": pin_of(model_id), "model_task": task},
            accept_license=True,
        )
        command = compose(project)["services"]["tei"]["command"]
        links |= {arg for arg in command if arg.startswith("--model-id=")}
    assert len(links) == 2


def test_tei_without_its_link_asks_nobody(rendered: Path) -> None:
    assert (
        compose(rendered)["services"]["tei"]["environment"]["HF_ENDPOINT"] == "http://127.0.0.1:9"
    )


def test_mlflow_on_this_machine_has_a_name_and_an_address_of_its_own(rendered: Path) -> None:
    """MLFLOW_TRACKING_URI of the shell is the address for whoever renders."""
    service = compose(rendered)["services"]["model-fetch"]
    assert service["extra_hosts"] == ["host.docker.internal:host-gateway"]
    assert service["environment"]["MLFLOW_TRACKING_URI"].startswith("${COMPOSE_MLFLOW_URI:-")
    assert "--keep=${KEEP:-1}" in service["command"]


def test_what_is_of_one_machine_is_not_committed(rendered: Path) -> None:
    for name in (".env", "compose.override.yaml"):
        (rendered / name).write_text("API_KEY=a-secret\n")
    git = ["git", "-c", f"safe.directory={rendered}"]
    subprocess.run([*git, "init", "--quiet"], cwd=rendered, check=True)
    listed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=all"],
        cwd=rendered,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "compose.yaml" in listed.stdout
    assert ".env" not in listed.stdout
    assert "override" not in listed.stdout


def test_systemd_takes_the_units(rendered: Path, tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    done = subprocess.run(
        ["bash", rendered / "service/service.sh", "write"],
        env=os.environ | {"UNITS": str(units)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = sorted(units.iterdir())
    assert len(written) == 3
    for unit in written:
        assert "@FOLDER@" not in unit.read_text()
        # Of another package, which need not be here.
        unit.write_text(unit.read_text().replace("Requires=docker.service\n", ""))
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    verified = subprocess.run(
        ["systemd-analyze", "verify", *written], capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stderr
    assert str(units) not in verified.stderr, verified.stderr
    assert verified.stderr == ""
    for unit in units.glob(
        "*.service"
    ):  # of 100; what is left is Docker's socket and the caller's network
        secured = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=30", unit],
            capture_output=True,
            text=True,
        )
        assert secured.returncode == 0, secured.stdout[-200:]


PROGRAMS = {
    "no compose": ({}, "There is no Docker Compose here"),
    "an old podman-compose": (
        {"podman-compose": 'echo "podman-compose version: 1.0.3"'},
        "install 1.6.0 or newer",
    ),
    "no engine": (
        {"docker": '[ "$1" = compose ] || exit 1'},
        "docker does not answer",
    ),
    "no NVIDIA runtime": (
        {"docker": 'case "$*" in "info --format"*) echo "{runc}" ;; esac'},
        "nvidia-ctk runtime configure",
    ),
    "a half-written .env": (
        {
            "docker": 'case "$*" in "compose config"*) echo "unexpected character" >&2; exit 15 ;; esac'
        },
        "compose: unexpected character",
    ),
}


@pytest.mark.parametrize("lacking", PROGRAMS)
def test_what_is_missing_ends_it_in_one_line(
    render: Callable[..., Path], tmp_path: Path, lacking: str
) -> None:
    programs, said = PROGRAMS[lacking]
    project = render(program=False, accelerator="gb10")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    for tool in ("bash", "sed", "tail", "grep", "dirname"):
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    done = subprocess.run(
        ["bash", project / "scripts/one_machine.sh", "up"],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("env", "components", "refused"),
    [
        ("BIND=0.0.0.0", [], True),
        ("BIND='192.168.1.20'", [], True),
        ("BIND=::", [], True),
        ("OPEN_TO_EVERYONE=no\nBIND=0.0.0.0", [], True),
        ("BIND=0.0.0.0 # the network", [], True),
        ('export BIND="0.0.0.0"\r', [], True),
        ("BIND=127.0.0.1 # not 0.0.0.0", [], False),
        ("BIND='127.0.0.1' # 'quoted'", [], False),
        ("BIND=127.0.0.1\r", [], False),
        ("BIND=127.0.0.5", [], False),
        ("PORT=9000", [], False),
        ("BIND=0.0.0.0\nOPEN_TO_EVERYONE=yes", [], False),
        ("BIND=0.0.0.0", ["api-key"], False),
    ],
)
def test_the_network_gets_in_with_a_key_or_by_one_s_word(
    render: Callable[..., Path], tmp_path: Path, env: str, components: list[str], refused: bool
) -> None:
    project = render(program=False, accelerator="cpu", components=components)
    (project / ".env").write_text(f"{env}\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sed", "tail", "dirname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        ["bash", project / "scripts/one_machine.sh", "up"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    # What is not refused ends where there is no engine.
    assert ("lets whoever reaches this machine" in done.stderr) == refused
    assert ("no Docker Compose here" in done.stderr) == (not refused)


def test_what_was_pushed_is_pulled_by_its_digest(
    render: Callable[..., Path], tmp_path: Path
) -> None:
    """Of this very content: what was changed since is built."""
    project = render(accelerator="cpu")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "docker").write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n'
        'case "$1 $2" in "compose config" | "compose version" | info* | pull* | tag*) exit 0 ;; esac\n'
        "exit 1\n"
    )
    (tools / "docker").chmod(0o755)
    images = ["python3", "-B", "scripts/images.py"]
    named = subprocess.run([*images, "tag", "model-fetch"], cwd=project, capture_output=True)
    name, _, tag = named.stdout.decode().strip().rpartition(":")
    digest = f"sha256:{'1' * 64}"
    record = project / json.loads((project / "images/images.json").read_text())["component"]
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"images:\n  - name: {name}\n    newTag: {tag}\n    digest: {digest}\n")

    def asked() -> str:
        (tmp_path / "asked").write_text("")
        done = subprocess.run(
            ["bash", project / "scripts/one_machine.sh", "fetch"],
            env={"PATH": f"{tools}:{os.environ['PATH']}", "PORT": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "COMPOSE_MLFLOW_URI" in done.stderr or "could not be built" in done.stderr
        return (tmp_path / "asked").read_text()

    assert f"pull {name}@{digest}\n" in asked()
    program = project / "images/model-fetch/model_fetch/__init__.py"
    program.write_text(program.read_text() + "# changed\n")
    assert "pull" not in asked()


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
