"""A real MLflow registry on loopback: for the demonstration, and for the tests.

One `mlflow server` process with one worker, SQLite, and artifacts in a local folder.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 180
"""Seconds that a server may take to start: its imports take 20 on two busy cores."""


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    folder: Path,
    *,
    python: str = sys.executable,
    arguments: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """Run `mlflow server` below `folder`; yields its address, stops it at the end.

    Args:
        python: interpreter that has the full `mlflow` package.
        arguments: where artifacts go; by default proxied, in `folder`/artifacts.
        environment: more variables for the server.
    Raises: RuntimeError with the end of its log when it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    store = ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = folder / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, *(store if arguments is None else arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **quiet, **(environment or {})},
            start_new_session=True,  # its workers stop with it
        )
    try:
        _wait(server, uri, log)
        yield uri
    finally:
        _stop(server)


def _wait(server: subprocess.Popen[bytes], uri: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):  # noqa: S310
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if server.poll() is not None:
                break
            time.sleep(0.1)
    raise RuntimeError(f"mlflow server did not start: {log.read_text()[-2000:]}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        return


def register_snapshot(uri: str, folder: Path, model_id: str) -> str:
    """Register a Hugging Face snapshot as a mirror job does: whole, below `model/` of a run.

    Args: folder: the snapshot. model_id: its Hugging Face id.
    Returns: the version's number.
    """
    client = connect(uri)
    run = client.create_run(experiment_id(client, "model-registry"), run_name=f"mirror-{model_id}")
    client.log_param(run.info.run_id, "model_id", model_id)
    with_tracking(uri, client.log_artifacts, run.info.run_id, str(folder), "model")
    client.set_terminated(run.info.run_id)
    return register(
        uri, model_id.replace("/", "-"), f"runs:/{run.info.run_id}/model", run.info.run_id
    )


def register(uri: str, name: str, source: str, run_id: str | None, **more: Any) -> str:
    """Create a version of a registered model, and the model with its first; returns the number."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return str(client.create_model_version(name, source, run_id, **more).version)


def connect(uri: str) -> Any:
    """The official client of this server."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def experiment_id(client: Any, name: str) -> str:
    """Id of an experiment, made when it is not there."""
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def with_tracking(uri: str, function: Any, *arguments: Any) -> Any:
    """Call with MLFLOW_TRACKING_URI set, which the client's artifact code reads."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        return function(*arguments)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
