"""Thinkube's image, built by a real builder and run as the platform runs it, on a read-only mount.

The platform's base image cannot be had everywhere: a Debian made on the spot, with a stand-in for TEI,
takes its place. About a minute, and two more when nothing is kept from an earlier run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT, template  # noqa: F401
from tests.snapshots import snapshot
from tests.test_model_fetch_image import PACKAGES, served, wheels  # noqa: F401
from tests.test_thinkube_start import MODEL, pin_of

if TYPE_CHECKING:
    from tests.containers.engine import Engine

pytest_plugins = ["tests.containers.engine"]

IMAGE = "test/thinkube"
BASE = """\
ARG DEBIAN
FROM ${DEBIAN}
RUN ln -s /stub/text-embeddings-router /usr/local/bin/text-embeddings-router
"""
ROUTER = '#!/bin/sh\nexec /usr/bin/python3 /stub/router.py "$@"\n'
UNPATCHED = ("--network=none",)
PATCHED = (
    *("--network=none", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
    *(f"--tmpfs=/{name}:uid=10001,gid=10001" for name in ("tmp", "cache", "model")),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshot(tmp_path_factory.mktemp("model"), sidecars=False)


@pytest.fixture(scope="module")
def image(
    engine: Engine,
    template: Path,  # noqa: F811
    wheels: Path,  # noqa: F811
    files: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    import copier

    folder = tmp_path_factory.mktemp("image")
    base = folder / "base"
    base.mkdir()
    (base / "Dockerfile").write_text(BASE)
    debian = engine.debian(PACKAGES)
    engine.docker("build", f"--build-arg=DEBIAN={debian}", f"--tag={IMAGE}-base", base)

    answers = {"platform": "thinkube", "model_id": MODEL, "accelerator": "cpu"}
    answers["project_name"] = "search"
    copier.run_copy(
        str(template),
        folder / "project",
        data=answers | {"pin": pin_of(files)},
        defaults=True,
        unsafe=True,
        quiet=True,
    )
    with served(wheels) as url:
        engine.docker(
            *("build", "--network=host", f"--tag={IMAGE}"),
            *("--build-arg", "CONTAINER_REGISTRY=registry.example.net"),  # the platform's only one
            *("--build-arg", f"BASE_IMAGE={IMAGE}-base"),
            *("--build-arg", "PIP_NO_INDEX=1", "--build-arg", f"PIP_FIND_LINKS={url}"),
            folder / "project/images",
        )
    return IMAGE


@pytest.fixture
def run(engine: Engine, image: str, files: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a container on a read-only mount of the artifact store; returns its name."""
    name = f"thinkube-{tmp_path.name}"
    store = tmp_path / "store/artifacts/7/r1/artifacts/model"
    shutil.copytree(files, store)
    stub = tmp_path / "stub"
    stub.mkdir()
    shutil.copy(ROOT / "tests/stub_router.py", stub / "router.py")
    (stub / "text-embeddings-router").write_text(ROUTER)
    (stub / "load").write_text("well")
    for path, mode in ((stub, 0o777), (stub / "text-embeddings-router", 0o755)):
        path.chmod(mode)

    def start(options: tuple[str, ...], change: Callable[[Path], object] = bool) -> str:
        change(store)
        for path in (tmp_path / "store").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        volumes = [f"--volume={tmp_path / 'store'}:/mlflow-models:ro", f"--volume={stub}:/stub"]
        secret = "--env=MLFLOW_CLIENT_SECRET=client-secret-c3d4"
        engine.docker(
            *("run", "--detach", f"--name={name}", *options, *volumes, secret),
            *(f"--env=MODEL_ID={MODEL}", "--env=MODEL_FETCH_RETRIES=0", image),
        )
        return name

    yield start
    engine.docker("rm", "--force", name, check=False)


def ask(engine: Engine, name: str, path: str) -> Any:
    """The answer of the container's port 7860; None when there is none yet."""
    code = (
        "import urllib.request as r, sys\n"
        f"sys.stdout.write(r.urlopen('http://127.0.0.1:7860{path}', timeout=9).read().decode())"
    )
    done = engine.docker("exec", name, "/usr/bin/python3", "-c", code, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.parametrize("options", [UNPATCHED, PATCHED], ids=["as generated", "as patched"])
def test_it_serves_the_pin_from_the_read_only_mount(
    engine: Engine, run: Callable[..., str], options: tuple[str, ...]
) -> None:
    name = run(options)
    for _ in range(300):
        if ask(engine, name, "/ready") is not None:
            break
        time.sleep(0.1)
    said = engine.docker("logs", name).stdout
    listed = ask(engine, name, "/v1/models")
    assert listed is not None, said
    assert json.loads(listed)["data"][0]["id"] == MODEL
    assert "used in place" in said
    assert "client-secret-c3d4" not in said
    config = json.loads(engine.docker("inspect", name).stdout)[0]["Config"]
    assert config["User"] == "10001:10001"
    engine.docker("stop", "--time=60", name)
    assert engine.docker("wait", name).stdout.strip() == "0"


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda store: (store / "config.json").unlink(), "3", "config.json is gone"),
        (
            lambda store: (store / "tokenizer.json").write_text("{}"),
            "7",
            "tokenizer.json has 2 bytes",
        ),
    ],
    ids=["a file is missing", "a file has another size"],
)
def test_it_ends_when_the_mount_does_not_hold_the_pin(
    engine: Engine,
    run: Callable[..., str],
    change: Callable[[Path], object],
    code: str,
    said: str,
) -> None:
    name = run(PATCHED, change)
    assert engine.docker("wait", name).stdout.strip() == code
    assert said in engine.docker("logs", name).stdout
