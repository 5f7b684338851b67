"""`make install-service` on a booted machine: real systemd, Docker with its bridge, TEI and a real model.

The stand-ins are those of test_one_machine; the network between the containers is Docker's own here.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import booted, real_tei
from tests.booted import Machine
from tests.conftest import template  # noqa: F401
from tests.containers.engine import CACHE, debian_rootfs
from tests.test_model_fetch_image import PACKAGES, served, wheels_in
from tests.test_one_machine import NAME, pin, versions  # noqa: F401

pytestmark = pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT)

FOLDER = "/opt/text-embeddings"
MLFLOW = 5000  # as the machine reaches it
UNIT = "text-embeddings.service"
# Eight requests at once, each told when it was answered.
LOAD = """
import json, threading, urllib.request
body = json.dumps({"inputs": ["some words of a longer text " * 20] * 8}).encode()
kind = {"Content-Type": "application/json"}
answered = []
def ask():
    asked = urllib.request.Request("http://127.0.0.1:8355/embed", body, kind)
    with urllib.request.urlopen(asked, timeout=200) as answer:
        answered.append(len(json.load(answer)))
threads = [threading.Thread(target=ask) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(answered)
"""


class Service:
    """A repository on a machine."""

    def __init__(self, machine: Machine, template: Path, uri: str) -> None:  # noqa: F811
        self.machine, self._template, self.uri = machine, template, uri
        self.folder = machine.root / FOLDER.lstrip("/")
        self.first = ""

    def pin(self, version: str) -> None:
        pin(self._template, self.folder, self.uri, version)

    def make(self, target: str, check: bool = True) -> str:
        return self.machine.does(f"make -C {FOLDER} --no-print-directory {target}", check)

    def setting(self, name: str) -> str:
        """As one_machine.sh has it of the answers."""
        text = (self.folder / "scripts/one_machine.sh").read_text()
        line = next(row for row in text.splitlines() if row.startswith(f"{name}="))
        return shlex.split(line.partition("=")[2])[0]

    @property
    def vector(self) -> str:
        """Of a fixed text, cut: which weights answer."""
        asked = shlex.quote(json.dumps({"inputs": "which version?"}))
        said = self.machine.does(f"curl -sf --max-time 20 127.0.0.1:8355/embed --json {asked}")
        return str([round(value, 4) for value in json.loads(said)[0]][:8])

    def serves(self) -> bool:
        return self.machine.succeeds("curl --silent --fail --max-time 5 127.0.0.1:8355/metrics")

    @property
    def pid(self) -> str:
        """Of TEI, as the machine counts."""
        return self.machine.does("pgrep -f ^text-embeddings-router").split()[0]

    def journal(self) -> str:
        return self.machine.does(f"journalctl --no-pager --output=cat --unit={UNIT}")


@pytest.fixture(scope="module")
def service(
    template: Path,  # noqa: F811
    versions: str,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """A fresh machine with the repository, and an image of TEI; nothing else was made."""
    folder = tmp_path_factory.mktemp("booted")
    for machine in booted.machine(folder):
        service = Service(machine, template, versions)
        service.pin("1")
        (service.folder / ".env").write_text("COMPOSE_MLFLOW_URI=http://172.17.0.1:5000\n")
        router = real_tei.router()
        assert router
        made = machine.root / "tei"
        made.mkdir()
        shutil.copy(router, made)
        (made / "Dockerfile").write_text(
            "FROM debian:standin\nCOPY text-embeddings-router /usr/local/bin/\n"
            'ENTRYPOINT ["text-embeddings-router"]\n'
        )
        shutil.copy(debian_rootfs(PACKAGES), machine.root / "standin.tar")
        machine.does("docker import /standin.tar debian:standin && rm /standin.tar")
        machine.does(f"docker build --tag={service.setting('OWN_IMAGE')} /tei")
        yield service


@pytest.fixture(scope="module")
def served_once(service: Service) -> Service:
    """By one command, with nothing but the repository; model-fetch's packages come from a mirror."""
    machine = service.machine
    with (
        served(wheels_in(CACHE / "booted")) as url,
        machine.reaches(url, 5001),
        machine.reaches(service.uri, MLFLOW),
    ):
        arguments = {
            "BASE_IMAGE": "debian:standin",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "http://172.17.0.1:5001/",  # plain HTTP, and not loopback
            "PIP_TRUSTED_HOST": "172.17.0.1",
        }
        words = " ".join(f"--build-arg {name}={value}" for name, value in arguments.items())
        said = service.make(f"up BUILD_ARGS='{words}'")
    assert said.splitlines()[-1] == f"Serves {NAME}, version 1 at http://127.0.0.1:8355"
    service.first = service.vector
    return service


def test_systemd_keeps_it_from_boot_to_boot(served_once: Service) -> None:
    """From here on MLflow is away."""
    service, machine, first = served_once, served_once.machine, served_once.first
    service.make("install-service")
    assert machine.does(f"systemctl is-enabled {UNIT}").strip() == "enabled"
    assert "Finished" in service.journal()
    units = f"/etc/systemd/system/{UNIT.partition('.')[0]}*"
    assert machine.does(f"systemd-analyze verify {units}") == ""  # Docker's unit is here

    before = service.pid
    machine.does(f"kill -9 {before}")
    machine.until(service.serves)
    assert service.pid != before

    machine.reboot()
    machine.until(service.serves)
    assert service.vector == first
    machine.cut()
    machine.boot()
    machine.until(service.serves)
    assert service.vector == first
    machine.until(lambda: machine.succeeds(f"systemctl is-active {UNIT}"))


def test_what_was_asked_is_answered_before_it_stops(served_once: Service) -> None:
    service, machine = served_once, served_once.machine
    (machine.root / "load.py").write_text(LOAD)
    count = "curl -s 127.0.0.1:8355/metrics | sed -n 's/^te_request_count{method=.batch.} //p'"
    machine.until(service.serves)
    before = int(machine.does(count) or 0)
    machine.does("python3 /load.py >/load.out 2>&1 &")
    machine.until(lambda: int(machine.does(count) or 0) >= before + 8)
    machine.does(f"systemctl stop {UNIT}")
    machine.until(lambda: (machine.root / "load.out").read_text() != "")
    assert json.loads((machine.root / "load.out").read_text()) == [8] * 8
    assert not service.serves()
