"""What all tests share: renders in this process, and pins as a registry would give them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import copier
import pytest

from demo.registry import free_port, serve
from extensions import catalog
from extensions.embedding_model import PinnedFile
from extensions.registry import registered_name

ROOT = Path(__file__).parent.parent

Render = Callable[..., Path]

os.environ["MLFLOW_LOGGING_LEVEL"] = "ERROR"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
# `make test` hands its own options down; a `make` that a test starts is to hear nothing of them.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)


# What is started in the background ignores interrupts and hands that down; our programs are to hear them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def program(path: Path) -> ModuleType:
    """A rendered program, which is in no package, as a module; it finds those beside it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a plain folder: Copier then renders it in place, without cloning."""
    folder = tmp_path_factory.mktemp("template")
    left_out = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", "node_modules")
    for name in ("extensions", "template"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    for name in ("copier.yml", "manifest.yaml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(autouse=True)
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test meets a registry, or a login, that it has not named itself."""
    for name in list(os.environ):
        if name.startswith(
            ("MLFLOW_TRACKING_", "MLFLOW_KEYCLOAK_", "MLFLOW_AUTH_", "MLFLOW_CLIENT_")
        ):
            monkeypatch.delenv(name)


@pytest.fixture
def render(template: Path, tmp_path: Path) -> Render:
    """Render the template with these answers, over the defaults; returns the new repository.

    Copier's own API, for pytest-copie (0.3.1) gives answers as defaults of a person (`user_defaults`), which
    no validator sees before the questions do, cannot leave files out, and shows -1 for any exit code.

    `program=False` leaves out model-fetch's program, which is the same for all answers: Copier
    starts a Git process per file.
    """
    count = iter(range(1_000_000))

    def run(destination: Path | None = None, program: bool = True, **answers: Any) -> Path:
        target = destination or tmp_path / f"rendered-{next(count)}"
        copier.run_copy(
            str(template),
            target,
            data=answers,
            defaults=True,
            unsafe=True,
            quiet=True,
            overwrite=True,
            exclude=[] if program else ["images/model-fetch/model_fetch"],
        )
        return target

    return run


@pytest.fixture
def pin_of() -> Callable[..., dict[str, Any]]:
    """`pin_of(model_id, **changes)`: a pin as a registry would give it."""
    return pinned


def pinned(model_id: str, **changes: Any) -> dict[str, Any]:
    """A pin of a model of the catalogue as a registry would give it, as the answer `pin`."""
    model = catalog.load()[model_id]
    digest = hashlib.sha256(model_id.encode()).hexdigest()
    weights = PinnedFile(
        "model.safetensors", "model.safetensors", model.facts.weights_bytes or 0, digest
    )
    small = ("config.json", "tokenizer.json", "1_Pooling/config.json")
    pin = catalog.resolve(model_id, "latest").to_mapping() | {
        "version": "3",
        "run_id": digest[:32],
        "artifact_uri": f"s3://mlflow/artifacts/1/{digest[:32]}/artifacts/model",
        "revision": digest[:40],
        "registered_model": registered_name(model_id),
        "files": [
            {"path": weights.path, "from": weights.source, "size": weights.size, "sha256": digest},
            *({"path": p, "from": p, "size": 700} for p in small),
        ],
    }
    return pin | changes


# Real MLflow servers. They start in about 20 s each, so they live as long as the session.


def environment(name: str) -> Path:
    """A Python environment of tests/environments, made when it is not there; its interpreter."""
    requirements = ROOT / "tests" / "environments" / f"{name}.txt"
    key = hashlib.sha256(requirements.read_bytes()).hexdigest()[:8]
    python = ROOT / ".cache" / "environments" / f"{name}-{key}" / "bin" / "python"
    if not python.exists():
        uv = [sys.executable, "-m", "uv", "--quiet"]
        venv = python.parent.parent
        subprocess.run([*uv, "venv", "--clear", "--python", sys.executable, str(venv)], check=True)
        install = [*uv, "pip", "install", "--python", str(python), "-r", str(requirements)]
        subprocess.run(install, check=True)
    return python


@pytest.fixture(scope="session")
def mlflow_proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow 3.17.2, artifacts on its own disk behind its proxy."""
    with serve(tmp_path_factory.mktemp("proxied")) as uri:
        yield uri


@pytest.fixture(scope="session")
def mlflow_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow 3.17.2 without a proxy, artifacts in a folder that its clients share."""
    folder = tmp_path_factory.mktemp("local")
    root = ["--no-serve-artifacts", "--default-artifact-root", f"file://{folder}/artifacts"]
    with serve(folder, arguments=root) as uri:
        yield uri


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3-compatible server with the bucket `mlflow`; yields the variables of its clients."""
    port = free_port()
    keys = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with (tmp_path_factory.mktemp("s3") / "moto.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        import boto3
        from botocore.exceptions import BotoCoreError

        with variables(keys):
            client = boto3.client("s3", endpoint_url=keys["MLFLOW_S3_ENDPOINT_URL"])
            for _ in range(100):
                try:
                    client.create_bucket(Bucket="mlflow")
                    break
                except BotoCoreError:  # the server is not up yet
                    time.sleep(0.2)
            client.head_bucket(Bucket="mlflow")
        yield keys
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture(scope="session")
def mlflow_s3(tmp_path_factory: pytest.TempPathFactory, s3: dict[str, str]) -> Iterator[str]:
    """MLflow 3.4.0 as Thinkube runs it: artifacts in S3, no proxy; only the server has the keys."""
    folder = tmp_path_factory.mktemp("s3-rooted")
    root = ["--default-artifact-root", "s3://mlflow/artifacts"]
    python = str(environment("mlflow-3.4.0"))
    with serve(folder, python=python, arguments=root, environment=s3) as uri:
        yield uri


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@dataclass(frozen=True)
class Run:
    """What came of one `copier` command."""

    code: int
    error: str
    """Standard error without colours."""

    output: str
    target: Path


@pytest.fixture
def copier_copy(template: Path, tmp_path: Path) -> Callable[..., Run]:
    """Run the real `copier copy` as a person would, with a home of its own."""

    def run(
        *data: str,
        python: Path | None = None,
        target: Path | None = None,
        words: tuple[str, ...] = (),
        **variables: str,
    ) -> Run:
        target = target or tmp_path / "target"
        answers = [word for item in data for word in ("-d", item)]
        command = [str(python or sys.executable), "-m", "copier", "copy", "--trust", "--defaults"]
        names = ("PATH", "LANG", "MLFLOW_LOGGING_LEVEL")
        clean = {name: os.environ[name] for name in names if name in os.environ}
        result = subprocess.run(
            [*command, *words, *answers, str(template), str(target)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=clean | {"HOME": str(tmp_path / "home")} | variables,
        )
        colours = re.compile(r"\x1b\[[0-9;]*m")
        return Run(result.returncode, colours.sub("", result.stderr), result.stdout, target)

    return run
