"""Real servers: MLflow in front of its own disk, MLflow in front of S3, and S3 itself.

`MLFLOW_BIN` names the `mlflow` command of an environment that also has boto3.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fetchkit.models import PinnedModel, embedding_model, write
from fetchkit.program import Pod, assert_failed, assert_ready
from model_fetch.registry import _below

KEYS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-store",
    "AWS_SECRET_ACCESS_KEY": "5ecret-of-the-store",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "mlflow"
MODEL = PinnedModel(embedding_model(weights=2 << 20), "", version="1")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not answers(url):
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def call(self, path: str, **body: Any) -> dict[str, Any]:
        """A call of MLflow's REST API."""
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.loads(response.read()))

    def register(self, name: str, artifact_location: str | None = None) -> dict[str, Any]:
        """A run whose folder `model` is registered as version 1 of a name; returns the run's info."""
        where = {"artifact_location": artifact_location} if artifact_location else {}
        experiment = self.call("experiments/create", name=f"of {name}", **where)["experiment_id"]
        info = dict(self.call("runs/create", experiment_id=experiment)["run"]["info"])
        self.call("registered-models/create", name=name)
        self.call(
            "model-versions/create",
            name=name,
            source=f"runs:/{info['run_id']}/model",
            run_id=info["run_id"],
        )
        self.call("registered-models/alias", name=name, alias="champion", version="1")
        return info


def mlflow_command() -> str:
    command = os.environ.get("MLFLOW_BIN") or str(Path(sys.executable).with_name("mlflow"))
    python = Path(command).with_name("python")
    check = [str(python), "-c", "import boto3, mlflow.server, flask"]
    if not python.exists() or subprocess.run(check, capture_output=True).returncode != 0:
        pytest.skip("no full MLflow with boto3 here: name its `mlflow` command in MLFLOW_BIN")
    return command


def launch(folder: Path, name: str, *options: str, **env: str) -> Server:
    port = free_port()
    log = folder / f"{name}.log"
    command = [
        *(mlflow_command(), "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder}/{name}.db", "--workers", "1", *options),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **env}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    return Server(f"http://127.0.0.1:{port}", process, log)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server with the workers that it started: its own session, so no one else's."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@dataclass
class Servers:
    s3: str
    local: Server
    """Artifacts on its own disk, sent through its proxy."""

    remote: Server
    """Artifacts in S3: of some experiments behind its proxy, of others direct."""

    folder: Path
    client: Any
    """A boto3 client of the S3 store."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    pytest.importorskip("moto.server", reason="no S3-compatible server here: install moto[server]")
    boto3 = pytest.importorskip("boto3", reason="no S3 client here: install boto3")
    folder = tmp_path_factory.mktemp("servers")
    port = free_port()
    s3 = f"http://127.0.0.1:{port}"
    processes = []
    try:
        local = launch(
            *(folder, "local", "--serve-artifacts"),
            *("--artifacts-destination", str(folder / "artifacts")),
        )
        processes.append(local.process)
        remote = launch(
            *(folder, "remote", "--serve-artifacts"),
            *("--artifacts-destination", f"s3://{BUCKET}/artifacts"),
            **{"MLFLOW_S3_ENDPOINT_URL": s3, "AWS_DEFAULT_REGION": "us-east-1", **KEYS},
        )
        processes.append(remote.process)
        log = folder / "s3.log"
        with log.open("wb") as stream:
            store = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        processes.append(store)
        wait_for(f"{s3}/moto-api/", store, log)
        client = boto3.client(
            "s3",
            endpoint_url=s3,
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        for server in (local, remote):
            wait_for(f"{server.url}/health", server.process, server.log)
        yield Servers(s3, local, remote, folder, client)
    finally:
        for process in processes:
            end(process)


def upload(servers: Servers, prefix: str) -> None:
    for path, content in MODEL.files.items():
        servers.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path}", Body=content)


@pytest.fixture(scope="module")
def on_disk(servers: Servers) -> dict[str, Any]:
    """The pin of a model on the server's disk."""
    info = servers.local.register("acme-tiny")
    root = info["artifact_uri"].removeprefix("mlflow-artifacts:/")
    write(MODEL.files, servers.folder / "artifacts" / root / "model")
    return {
        **MODEL.pin(),
        "run_id": info["run_id"],
        "artifact_uri": info["artifact_uri"] + "/model",
    }


@pytest.fixture(scope="module")
def behind_proxy(servers: Servers) -> dict[str, Any]:
    """The pin of a model in S3 behind the server's proxy."""
    info = servers.remote.register("proxied")
    root = info["artifact_uri"].removeprefix("mlflow-artifacts:/")
    upload(servers, f"artifacts/{root}/model")
    return {
        **MODEL.pin(),
        "run_id": info["run_id"],
        "artifact_uri": info["artifact_uri"] + "/model",
    }


@pytest.fixture(scope="module")
def direct(servers: Servers) -> dict[str, Any]:
    """The pin of a model in S3 as Thinkube has it: the run's artifacts are s3://."""
    info = servers.remote.register("direct", f"s3://{BUCKET}/direct")
    root = info["artifact_uri"].removeprefix(f"s3://{BUCKET}/")
    upload(servers, f"{root}/model")
    return {
        **MODEL.pin(),
        "run_id": info["run_id"],
        "artifact_uri": info["artifact_uri"] + "/model",
    }


def test_proxied_by_mlflow(servers: Servers, on_disk: dict[str, Any], pod: Pod) -> None:
    run = pod.run(on_disk, servers.local.url)
    assert_ready(run, pod, MODEL)
    assert "proxied by" in run.log
    assert "one stream" not in run.log


def test_a_gone_artifact_of_mlflow(servers: Servers, on_disk: dict[str, Any], pod: Pod) -> None:
    pin = {**on_disk, "artifact_uri": on_disk["artifact_uri"] + "-gone"}
    assert_failed(pod.run(pin, servers.local.url), pod, 3)


def test_presigned_behind_the_proxy(
    servers: Servers, behind_proxy: dict[str, Any], pod: Pod
) -> None:
    """No key of the store is in the pod."""
    run = pod.run(behind_proxy, servers.remote.url)
    assert_ready(run, pod, MODEL)
    assert "presigned by" in run.log
    marker = (pod.version_folder("1") / ".model-fetch.json").read_text()
    assert "X-Amz" not in run.log + marker


def test_presigned_for_a_run(servers: Servers, direct: dict[str, Any], pod: Pod) -> None:
    run = pod.run(direct, servers.remote.url)
    assert_ready(run, pod, MODEL)
    assert "presigned by" in run.log


def test_s3_with_keys(servers: Servers, direct: dict[str, Any], pod: Pod) -> None:
    env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": servers.s3}
    run = pod.run(direct, None, env=env)
    assert_ready(run, pod, MODEL)
    assert "S3 bucket mlflow" in run.log
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in run.log


def test_s3_with_keys_when_mlflow_signs_nothing(
    servers: Servers, direct: dict[str, Any], pod: Pod
) -> None:
    """As with servers before 3.15: this one knows no such run."""
    env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": servers.s3}
    run = pod.run(direct, servers.local.url, env=env)
    assert_ready(run, pod, MODEL)
    assert "not used: this MLflow server signs no addresses for this artifact" in run.log


def test_s3_without_keys(servers: Servers, direct: dict[str, Any], pod: Pod) -> None:
    run = pod.run(direct, None, env={"MLFLOW_S3_ENDPOINT_URL": servers.s3, "HOME": str(pod.folder)})
    assert_failed(run, pod, 2)
    assert "no keys for S3" in run.last


def test_s3_of_an_object_that_is_gone(servers: Servers, direct: dict[str, Any], pod: Pod) -> None:
    pin = {**direct, "artifact_uri": direct["artifact_uri"] + "-gone", "run_id": None}
    env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": servers.s3}
    assert_failed(pod.run(pin, None, env=env), pod, 3)


@pytest.mark.parametrize(
    ("selector", "code"), [("latest", 0), ("1", 0), ("@champion", 0), ("9", 3), ("@nobody", 3)]
)
def test_a_pin_without_a_version_is_resolved_at_start(
    servers: Servers, on_disk: dict[str, Any], pod: Pod, selector: str, code: int
) -> None:
    pytest.importorskip("mlflow", reason="the registry's client is not here: install mlflow-skinny")
    pin = {
        **on_disk,
        "model_id": "acme-tiny",
        "selector": selector,
        "version": None,
        "run_id": None,
        "artifact_uri": None,
        "files": [],
    }
    run = pod.run(pin, servers.local.url)
    if code:
        assert_failed(run, pod, code)
        return
    assert_ready(run, pod, MODEL)
    assert f"{selector} is version 1" in run.log
    marker = json.loads((pod.version_folder("1") / ".model-fetch.json").read_text())
    assert (marker["pin"]["version"], marker["pin"]["selector"]) == ("1", selector)
    pod.link.unlink()
    # Without MLflow, what was true last is served; another name could mean another version.
    away = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    again = pod.run(pin, "http://127.0.0.1:9", env=away)
    assert_ready(again, pod, MODEL)
    assert "version 1 is here" in again.log
    for other in {"@another", "2"}:
        refused = pod.run(pin | {"selector": other}, "http://127.0.0.1:9", env=away)
        assert refused.code == 5, refused.log


ODD_STORE = """
import os, shutil
from urllib.parse import urlparse
from mlflow.store.artifact.artifact_repo import ArtifactRepository

class Odd(ArtifactRepository):
    def __init__(self, uri, *args, **more):
        super().__init__(uri)
        self.root = urlparse(uri).path  # as those of gs:, wasbs: and hdfs: do

    def list_artifacts(self, path=None):
        return []

    def _download_file(self, remote_file_path, local_path):
        shutil.copyfile(os.path.join(self.root, remote_file_path), local_path)

    log_artifact = log_artifacts = None
"""


def odd_store(pod: Pod, tmp_path: Path) -> str:
    """Teaches MLflow's client a scheme, by a plug-in of it; returns the PYTHONPATH that it takes."""
    pytest.importorskip("mlflow", reason="the registry's client is not here: install mlflow-skinny")
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "odd_store.py").write_text(ODD_STORE)
    (plugin / "odd_store-1.0.dist-info").mkdir()
    (plugin / "odd_store-1.0.dist-info/METADATA").write_text("Name: odd-store\nVersion: 1.0\n")
    (plugin / "odd_store-1.0.dist-info/entry_points.txt").write_text(
        "[mlflow.artifact_repository]\nodd = odd_store:Odd\n"
    )
    return f"{plugin}:{pod.environment(None)['PYTHONPATH']}"


def test_another_store_goes_through_mlflows_client(pod: Pod, tmp_path: Path) -> None:
    path = odd_store(pod, tmp_path)
    write(MODEL.files, tmp_path / "store")
    pin = {**MODEL.pin(), "artifact_uri": f"odd://{tmp_path}/store"}
    run = pod.run(pin, None, env={"PYTHONPATH": path})
    assert_ready(run, pod, MODEL)
    assert "MLflow's client" in run.log
    shutil.rmtree(tmp_path / "store")
    pod.link.unlink()
    other = Pod(tmp_path / "other")
    assert_failed(other.run(pin, None, env={"PYTHONPATH": path}), other, 5)


@pytest.mark.parametrize("folder", ["50% off/a?b#c d", "%41/é+&/a%2Fb"])
def test_names_in_another_store_are_taken_as_they_are(
    pod: Pod, tmp_path: Path, folder: str
) -> None:
    """Keys of a store may hold what ends a path in an address, or looks quoted."""
    path = odd_store(pod, tmp_path)
    names = ("50%.json", "a?b.json", "a#b.json", "%41.json", "c d/é.json")
    model = PinnedModel({**MODEL.files, **dict.fromkeys(names, b"{}")}, "unused")
    write(model.files, tmp_path / folder)
    pin = model.pin() | {"artifact_uri": _below(f"odd://{tmp_path}", folder)}
    assert_ready(pod.run(pin, None, env={"PYTHONPATH": path}), pod, model)


@pytest.mark.parametrize("host", ["169.254.169.254", "0xA9FEA9FE", "2852039166", "[fe80::1]"])
def test_no_store_is_at_the_address_of_a_machine_s_credentials(pod: Pod, host: str) -> None:
    for uri in (f"ftp://{host}/model", f"mlflow-artifacts://{host}/model", f"http://{host}/model"):
        pin = MODEL.pin() | {"artifact_uri": uri}
        run = pod.run(pin, None, "--timeout", "1", "--retries", "0", timeout=30)
        assert run.code in (2, 5), run.log
        assert "no store is at" in run.log or "is not asked" in run.log, run.log
