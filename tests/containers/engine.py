"""A real container engine for tests: a Docker daemon of the test run's own, and a Debian to build from.

    pytest_plugins = ["tests.containers.engine"]  # the fixture `engine`

Downloads and layers are kept in $XDG_CACHE_HOME/tkt-tests between runs. The engine has no network but
the machine's own: build and run with `--network=host`, or with none.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import docker
import docker.errors
import pytest

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tkt-tests"


@dataclass(frozen=True, slots=True)
class Engine:
    """A running Docker daemon."""

    host: str
    """DOCKER_HOST of it."""

    store: Path
    """A folder that is this engine's alone for as long as it runs, and there again the next time."""

    @property
    def client(self) -> docker.DockerClient:
        """Docker's own SDK, on this daemon."""
        return docker.DockerClient(base_url=self.host, timeout=600)

    def docker(
        self, *arguments: str | Path, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker` as the README and the Makefile do; its output is captured, errors with the rest."""
        # The classic builder is the least that a Dockerfile can meet.
        environment = os.environ | {"DOCKER_HOST": self.host, "DOCKER_BUILDKIT": "0"}
        done = subprocess.run(
            ["docker", *map(str, arguments)],
            env=environment,
            input=stdin,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        done.stdout = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
        if check and done.returncode:
            raise AssertionError(f"docker {' '.join(map(str, arguments))}\n{done.stdout[-4000:]}")
        return done

    def has(self, image: str) -> bool:
        """Whether the image is there, perhaps from an earlier run."""
        try:
            self.client.images.get(image)
        except docker.errors.ImageNotFound:
            return False
        return True

    def debian(self, packages: str) -> str:
        """An image of Debian bookworm with these packages (comma-separated); returns its name."""
        tar = debian_rootfs(packages)
        image = f"standin/debian:{tar.stem}"
        if not self.has(image):
            self.client.api.import_image_from_file(str(tar), *image.rsplit(":", 1))
        return image


def debian_rootfs(packages: str, release: str = "bookworm") -> Path:
    """A tar file of a Debian's root file system with these packages, made once.

    The mirror is Debian's own; 25 to 60 s on two cores.
    """
    script = [HERE / "debian_rootfs.sh", CACHE, packages, release]
    with _locked(CACHE / "debian.lock"):
        done = subprocess.run(script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file; yields whether it could be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker daemon of this test run's own, stopped at its end."""
    for program in ("docker", "dockerd", "debootstrap"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (Debian: docker.io, debootstrap)")
    if os.geteuid() != 0:
        pytest.skip("a Docker daemon of one's own needs root")
    # Two daemons cannot share a state: a second test run at the same time gets the next one.
    for number in range(8):
        state = CACHE / f"engine-{number}"
        with _locked(CACHE / f"engine-{number}.lock", wait=False) as free:
            if free:
                yield from _running(state)
                return
    pytest.fail(f"all engines in {CACHE} are in use")


def _running(state: Path) -> Iterator[Engine]:
    script = HERE / "ensure_engine.sh"
    # Not pytest's own folder: a socket's path must be shorter than 108 characters.
    with TemporaryDirectory(prefix="engine-") as run:
        try:
            started = subprocess.run(
                [script, "start", run, state / "docker"], text=True, capture_output=True
            )
            assert started.returncode == 0, started.stderr
            engine = Engine(started.stdout.strip(), state / "store")
            yield engine
            # Layers of former runs; those of today may serve again.
            engine.client.images.prune({"until": "24h"})
        finally:
            subprocess.run([script, "stop", run, state / "docker"], check=True)
