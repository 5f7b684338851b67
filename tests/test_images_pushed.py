"""`make image push` with a real engine and registry: what runs is what was built, and a revert goes back.

The Dockerfiles are cut down to what they copy, since it is the way of an image that is tested here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import copier
import pytest
import yaml

from demo.registry import free_port

if TYPE_CHECKING:
    from tests.containers.engine import Engine

pytest_plugins = ["tests.containers.engine"]

ROOT = Path(__file__).parent.parent
DOCKERFILES = {
    "images/tei": "FROM scratch\nCOPY patches /patches\n",
    "images/model-fetch": "FROM scratch\nCOPY requirements*.txt /\nCOPY model_fetch /app/model_fetch\n",
    "smoke": "FROM scratch\nCOPY smoke.py /\n",
}
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


@contextmanager
def serving(port: int, folder: Path, **storage: Any) -> Iterator[None]:
    """A registry on loopback until the block ends."""
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder)}, **storage},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    folder.mkdir(exist_ok=True)
    file = folder.parent / "registry.yml"
    file.write_text(yaml.safe_dump(settings))
    with (folder.parent / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", file], stdout=log, stderr=log)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder.parent / "registry.log").read_text()[-500:]
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


class Repository:
    """A rendered repository under Git, whose images go to a registry on loopback."""

    def __init__(self, folder: Path, engine: Engine, port: int) -> None:
        self.folder, self.engine, self.port = folder, engine, port
        data = {
            "accelerator": "cpu",
            "image_platform": {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}[
                platform.machine()
            ],
            "container_registry": f"localhost:{port}",
        }
        copier.run_copy(
            str(ROOT), folder, data=data, defaults=True, unsafe=True, quiet=True, vcs_ref="HEAD"
        )
        for part, text in DOCKERFILES.items():
            (folder / part / "Dockerfile").write_text(text)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]
        subprocess.run(["git", *who, *arguments], cwd=self.folder, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "state")

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = {"DOCKER_HOST": self.engine.host, "BUILDER": "docker"}
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env=os.environ | own,
            text=True,
            capture_output=True,
        )

    def pushed(self, *arguments: str) -> str:
        done = self.make("image", "push", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self) -> dict[str, str]:
        """The images of the pods and of the smoke test's Job, as Kubernetes would pull them."""
        found = {}
        for part in ("k8s", "smoke"):
            done = subprocess.run(
                ["kubectl", "kustomize", part], cwd=self.folder, text=True, capture_output=True
            )
            assert done.returncode == 0, done.stderr
            for thing in yaml.safe_load_all(done.stdout):
                pod = thing.get("spec", {}).get("template", {}).get("spec", {})
                for container in pod.get("containers", []) + pod.get("initContainers", []):
                    found[container["name"]] = container["image"]
        return found

    def registry_has(self, image: str) -> bool:
        name, _, digest = image.partition("@")
        path = name.rpartition(":")[0].partition("/")[2]
        request = urllib.request.Request(  # loopback
            f"http://127.0.0.1:{self.port}/v2/{path}/manifests/{digest}",
            headers={"Accept": MANIFEST},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bool(answer.headers["Docker-Content-Digest"] == digest)
        except urllib.error.HTTPError:
            return False


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def repository(
    engine: Engine, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Repository]:
    for program in ("docker-registry", "kubectl"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("images")
    with serving(port, folder / "registry"):
        yield Repository(folder / "repository", engine, port)


def append(repository: Repository, file: str) -> None:
    with (repository.folder / file).open("a") as opened:
        opened.write("\n# changed\n")


def test_a_change_rolls_out_a_revert_goes_back_and_nothing_changes_nothing(
    repository: Repository,
) -> None:
    before = repository.run()
    assert not any("@" in image for image in before.values())

    repository.pushed()
    first = repository.run()
    assert set(first) == {"tei", "model-fetch", "smoke"}
    assert all("@sha256:" in image for image in first.values())
    assert all(map(repository.registry_has, first.values()))
    repository.commit()

    # Not a byte is written where nothing changed, even where it is built anew.
    said = repository.pushed()
    assert said.count("unchanged since it was pushed") == 6
    repository.pushed("FORCE=1")
    assert repository.run() == first

    # A change of one image is a change of that one.
    append(repository, "images/model-fetch/model_fetch/__init__.py")
    warned = repository.make("--dry-run", "deploy")
    assert "scripts/images.py check" in warned.stdout
    stale = subprocess.run(
        ["python3", "scripts/images.py", "check"],
        cwd=repository.folder,
        text=True,
        capture_output=True,
    )
    assert stale.stderr.splitlines() == [
        "images: images/model-fetch is not what was pushed last: "
        "'make model-fetch-image model-fetch-push' first."
    ]
    repository.pushed()
    second = repository.run()
    assert {name for name in first if first[name] != second[name]} == {"model-fetch"}
    repository.commit()
    append(repository, "images/tei/patches/queue.edit")
    append(repository, "smoke/smoke.py")
    repository.pushed()
    third = repository.run()
    assert {name for name in second if second[name] != third[name]} == {"tei", "smoke"}
    repository.commit()

    # What ran before is there under its digest, and a revert names it.
    repository.git("revert", "--no-edit", "HEAD", "HEAD~1")
    assert repository.run() == first
    assert all(map(repository.registry_has, (*first.values(), *second.values(), *third.values())))
    assert repository.pushed().count("unchanged since it was pushed") == 6


def test_a_registry_that_takes_nothing_changes_nothing(
    engine: Engine, port: int, tmp_path: Path, repository: Repository
) -> None:
    other = free_port()
    maintenance = {"maintenance": {"readonly": {"enabled": True}}}
    with serving(other, tmp_path / "registry", **maintenance):
        refused = Repository(tmp_path / "repository", engine, other)
        assert refused.make("image").returncode == 0
        done = refused.make("push")

    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("images: ")]
    assert len(said) == 1
    assert said[0].startswith(f"images: localhost:{other} did not take localhost:{other}/text-emb")
    assert not any("@" in image for image in refused.run().values())
