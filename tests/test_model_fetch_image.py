"""The image of model-fetch, built by a real builder and run as a pod runs it.

The base image cannot be had everywhere, so a Debian made on the spot, with its own Python, stands in
for it, and a folder of wheels on loopback for the package index. The first run takes about two
minutes, most of it for Debian and the wheels; what it made is kept for the next.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from docker.models.containers import Container

    from tests.containers.engine import Engine

pytest_plugins = ["tests.containers.engine"]

SOURCES = Path(__file__).parents[1] / "template/images/model-fetch"
PACKAGES = "ca-certificates,python3,python3-venv"
PYTHON = "3.11"  # of Debian bookworm
HARDENED: dict[str, Any] = {
    **{"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges"]},
    "user": "10001:10001",
}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server that serves a folder on loopback."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build context as a render has it: links into the template have become files."""
    folder = tmp_path_factory.mktemp("context") / "model-fetch"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    return folder


@pytest.fixture(scope="module")
def wheels(engine: Engine) -> Path:
    return wheels_in(engine.store)


def wheels_in(store: Path) -> Path:
    """The pinned dependencies, as files for the stand-in's Python."""
    requirements = sorted(SOURCES.glob("requirements*.txt"))
    name = hashlib.sha256(b"".join(r.read_bytes() for r in requirements)).hexdigest()[:12]
    folder = store / f"wheels-{name}"
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"),
                *("--require-hashes", "--dest", str(part)),
                *(f"--requirement={file}" for file in requirements),
            ],
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        part.rename(folder)
    return folder


@pytest.fixture(scope="module")
def image(engine: Engine, context: Path, wheels: Path) -> str:
    with served(wheels) as url:
        engine.docker(
            *("build", "--network=host", "--tag=test/model-fetch"),
            *("--build-arg", f"BASE_IMAGE={engine.debian(PACKAGES)}"),
            *("--build-arg", "PIP_NO_INDEX=1", "--build-arg", f"PIP_FIND_LINKS={url}"),
            *("--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abc"),
            context,
        )
    return "test/model-fetch"


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """The pod's volumes, which belong to its user."""
    found = {name: tmp_path / name for name in ("cache", "model", "tmp", "pin", "store")}
    for name, path in found.items():
        path.mkdir()
        if name in ("cache", "model", "tmp"):
            os.chown(path, 10001, 10001)
    return found


def model(volumes: dict[str, Path], url: str) -> dict[str, bytes]:
    """A small model in the store, and the pin of it."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}}).encode()
    config: dict[str, Any] = {
        **{"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 100},
        **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
        **{"intermediate_size": 1536, "max_position_embeddings": 512, "hidden_act": "gelu"},
        **{"hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12},
        **{"pad_token_id": 0, "type_vocab_size": 2},
    }
    files = {
        "model.safetensors": len(header).to_bytes(8, "little") + header + os.urandom(1024),
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
    }
    for path, content in files.items():
        (volumes["store"] / path).write_bytes(content)
    pin = {
        **{"model_id": "acme/tiny", "registered_model": "acme-tiny", "selector": "3"},
        **{"version": "3", "run_id": None, "logged_model_id": None, "revision": None},
        "artifact_uri": url,
        "files": [{"path": p, "from": p, "size": len(content)} for p, content in files.items()],
        "facts": {"architecture": "bert", "pooling": "mean"},
    }
    (volumes["pin"] / "pin.json").write_text(json.dumps(pin))
    return files


def ran(engine: Engine, image: str, volumes: dict[str, Path], **options: Any) -> tuple[int, str]:
    """(exit code, log) of a container that has what a pod gives it, and no more."""
    container = started(engine, image, volumes, **options)
    try:
        code = container.wait(timeout=120)["StatusCode"]
        return code, container.logs().decode()
    finally:
        container.remove(force=True)


def started(engine: Engine, image: str, volumes: dict[str, Path], **options: Any) -> Container:
    places = {"cache": "/cache", "model": "/model", "tmp": "/tmp"}
    mounts = {str(volumes[name]): {"bind": place} for name, place in places.items()}
    mounts[str(volumes["pin"])] = {"bind": "/etc/model", "mode": "ro"}
    return engine.client.containers.run(
        image, detach=True, volumes=mounts, **HARDENED | {"network_mode": "host"} | options
    )


def test_the_image_is_what_it_says(engine: Engine, image: str) -> None:
    config = engine.client.images.get(image).attrs["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == "1.2.3"
    held = engine.client.containers.run(
        image,
        ["-R", "/opt/model-fetch/app"],
        entrypoint="/bin/ls",
        network_mode="none",
        remove=True,
    ).decode()
    assert "cli.py" in held
    assert "test_" not in held


def test_it_fetches_with_nothing_that_a_pod_may_not_have(
    engine: Engine, image: str, volumes: dict[str, Path]
) -> None:
    with served(volumes["store"]) as url:
        files = model(volumes, url)
        code, log = ran(engine, image, volumes)
    assert code == 0, log
    assert "acme-tiny version 3 is ready" in log
    folder = volumes["cache"] / "acme-tiny/3"
    assert {path: (folder / path).read_bytes() for path in files} == files
    assert os.readlink(volumes["model"] / "current") == "/cache/acme-tiny/3"
    code, log = ran(engine, image, volumes, network_mode="none")
    assert code == 0, log
    assert "already there" in log


def test_it_fails_in_one_line_with_its_exit_code(
    engine: Engine, image: str, volumes: dict[str, Path]
) -> None:
    model(volumes, "http://127.0.0.1:9")
    code, log = ran(engine, image, volumes, environment={"MODEL_FETCH_RETRIES": "0"})
    assert code == 5, log
    assert log.rstrip().splitlines()[-1].startswith("error: ")
    assert not (volumes["cache"] / "acme-tiny/3").exists()


def test_signals_reach_it_as_the_first_process(
    engine: Engine, image: str, volumes: dict[str, Path]
) -> None:
    """As PID 1 it gets no default action from the kernel."""
    model(volumes, "http://127.0.0.1:9")
    container = started(engine, image, volumes, environment={"MODEL_FETCH_RETRIES": "1000"})
    try:
        for _ in range(300):
            if b"version 3" in container.logs():
                break
            time.sleep(0.1)
        container.stop(timeout=30)
        assert container.wait()["StatusCode"] == 143
        assert b"stopped by SIGTERM" in container.logs()
    finally:
        container.remove(force=True)


def test_all_that_it_may_need_is_in_the_image(engine: Engine, image: str) -> None:
    """Read-only, without a network: signing for S3, MLflow's client, the conversion of Jina."""
    code = "import boto3, mlflow.artifacts, numpy; from model_fetch import jina, pin, registry"
    engine.client.containers.run(
        image, ["-c", code], entrypoint="python", network_mode="none", tmpfs={"/tmp": ""}, remove=True,
        **HARDENED,
    )  # fmt: skip
