"""The entry point of Thinkube's image, with the real nginx and model-fetch and a stand-in for TEI."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from demo.registry import free_port
from tests.conftest import ROOT, Render
from tests.snapshots import register, snapshot

pytestmark = pytest.mark.skipif(
    not shutil.which("nginx"), reason="nginx is not installed (Debian: nginx-light)"
)

MODEL = "acme/small"
SECRETS = {
    "MLFLOW_CLIENT_SECRET": "client-secret-c3d4",
    "MLFLOW_AUTH_PASSWORD": "auth-password-0718",
    "ADMIN_PASSWORD": "admin-5e6f",
    "ANSIBLE_BECOME_PASS": "become-3c4d",
    "SEAWEEDFS_SECRET_KEY": "seaweed-29ab",
}
BAIT = {"HOSTNAME": "pod-1", "PORT": "80", "PROMETHEUS_PORT": "tcp://10.0.0.1:9090", "DTYPE": "x"}


@dataclass
class Container:
    """What a container of the image would be: its files below a folder, its process, two ports."""

    folder: Path
    port: int
    tei_port: int
    started: subprocess.Popen[str] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """Words before its own command."""

    @property
    def stub(self) -> Path:
        return self.folder / "stub"

    def start(self, **variables: str) -> None:
        script = self.folder / "opt/thinkube/start.sh"
        environment = {
            "PATH": f"{self.stub}:{os.environ['PATH']}",
            "HOME": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT / "template/images/model-fetch"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "MODEL_FETCH_TERMINATION_LOG": str(self.folder / "termination-log"),
            "MODEL_FETCH_RETRIES": "0",
        }
        self.log = (self.folder / "log").open("w+")
        self.started = subprocess.Popen(
            [*self.command, "bash", str(script)],
            env=environment | SECRETS | BAIT | variables,
            stdout=self.log,
            stderr=self.log,
            text=True,
        )

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 when nothing listens."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=90
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, body: str, kind: str = "application/json") -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def models(self) -> list[str]:
        """What the LLM gateway sees."""
        return [model["id"] for model in json.loads(self.get("/v1/models")[1])["data"]]

    def until(self, what: Callable[[], Any]) -> None:
        """Wait until something holds, while the container runs."""
        end = time.monotonic() + 60
        while not what():
            assert self.started is not None
            assert self.started.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.05)

    def load(self, how: str = "well") -> None:
        """Let TEI's stand-in be ready, after it was started."""
        self.until((self.stub / "started.json").exists)
        (self.stub / "load").write_text(how)

    def serve(self, **variables: str) -> None:
        self.start(**variables)
        self.load()
        self.until(lambda: self.get("/ready")[0] == 200)

    def end(self) -> int:
        assert self.started is not None
        code = self.started.wait(timeout=60)
        self.log.flush()
        return code

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def last_line(self) -> str:
        return self.said.splitlines()[-1]

    @property
    def reason(self) -> str:
        """What Kubernetes shows of a container that has ended."""
        return (self.folder / "termination-log").read_text().strip()

    @property
    def tei(self) -> dict[str, Any]:
        started: dict[str, Any] = json.loads((self.stub / "started.json").read_text())
        return started

    @property
    def processes(self) -> list[str]:
        """Command lines that belong to this container."""
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
        return [line for line in listed.stdout.splitlines() if str(self.folder) in line]


def build(project: Path, folder: Path) -> Container:
    """Lay out a rendered image below a folder, as its Dockerfile does below /."""
    made = Container(folder, free_port(), free_port())
    opt = folder / "opt/thinkube"
    shutil.copytree(project / "images/thinkube", opt)
    if (project / "images/playground").is_dir():  # an app
        shutil.copytree(project / "images/playground", folder / "opt/playground")
    for name in ("start.sh", "nginx.conf"):
        text = (opt / name).read_text().replace("7860", str(made.port))
        text = text.replace("8355", str(made.tei_port))
        for path in ("/tmp/front", "/mlflow-models", "/model/current", "/cache", "/opt/playground"):
            text = text.replace(path, f"{folder}{path}")
        if name == "nginx.conf" and os.geteuid() == 0:
            text = f"user root;\n{text}"  # else its worker is nobody, who may not look in here
        (opt / name).write_text(text)
    for path in ("model", "cache", "tmp", "stub"):
        (folder / path).mkdir()
    programs = {
        "python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "text-embeddings-router": f'#!/bin/sh\nexec {sys.executable} {folder}/stub/router.py "$@"\n',
    }
    shutil.copy(ROOT / "tests/stub_router.py", made.stub / "router.py")
    for name, text in programs.items():
        (made.stub / name).write_text(text)
        (made.stub / name).chmod(0o755)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, as MLflow's artifact store has it."""
    return snapshot(tmp_path_factory.mktemp("model"), sidecars=False)


def pin_of(files: Path) -> dict[str, Any]:
    names = ("config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors")
    return {
        "model_id": MODEL,
        "registered_model": "acme-small",
        "selector": "latest",
        "version": "4",
        "run_id": "r1",
        "logged_model_id": None,
        "artifact_uri": "s3://mlflow/artifacts/7/r1/artifacts/model",
        "revision": None,
        "files": [
            {"path": name, "from": name, "size": (files / name).stat().st_size} for name in names
        ],
        "facts": {
            "architecture": "bert",
            "class_name": "BertModel",
            "dimensions": 8,
            "max_input_tokens": 64,
            "pooling": "mean",
            "parameters": 248,
            "dtype": "float32",
            "weights_bytes": 992,
            "hidden_size": 8,
            "layers": 1,
            "attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 30,
            "normalize": True,
            "prompts": {},
            "license": None,
        },
    }


def mounted(container: Container, files: Path) -> Path:
    """The mount of the artifact store, with the model in it."""
    store = container.folder / "mlflow-models/artifacts/7/r1/artifacts/model"
    shutil.copytree(files, store)
    return store


@pytest.fixture(scope="module")
def rendered() -> dict[str, Path]:
    """Repositories by their answers: most tests want the same."""
    return {}


@pytest.fixture
def make(
    render: Render, tmp_path: Path, files: Path, rendered: dict[str, Path]
) -> Iterator[Callable[..., Container]]:
    made: list[Container] = []

    def of(**answers: Any) -> Container:
        given = {"model_id": MODEL, "pin": pin_of(files), "accelerator": "l4"} | answers
        key = json.dumps(given)
        if key not in rendered:
            rendered[key] = render(program=False, platform="thinkube", **given)
        made.append(build(rendered[key], tmp_path / f"container-{len(made)}"))
        return made[-1]

    yield of
    for container in made:
        if container.started and container.started.poll() is None:
            pid = container.started.pid
            if container.command:  # strace itself heeds no signal
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            os.kill(pid, signal.SIGTERM)
            (container.stub / "second").touch()
            (container.stub / "load").write_text("fail")
            container.started.wait(timeout=60)
        assert container.processes == []


def test_the_pinned_model_is_served_from_the_mount(
    make: Callable[..., Container], files: Path
) -> None:
    container = make()
    store = mounted(container, files)
    container.start(MODEL_ID=MODEL)

    container.until(lambda: container.get("/health")[0] == 200)
    assert json.loads(container.get("/v1/models")[1]) == {"object": "list", "data": []}
    status, body = container.get("/info")
    assert (status, json.loads(body)["error_type"]) == (503, "Unhealthy")
    assert container.get("/ready")[0] >= 500

    container.load()
    container.until(lambda: container.get("/ready")[0] == 200)
    (model,) = json.loads(container.get("/v1/models")[1])["data"]
    assert (model["id"], model["object"]) == (MODEL, "model")
    assert container.get("/health") == (200, "")
    for path in ("/info", "/metrics", "/embed?x=1"):
        assert json.loads(container.get(path)[1])["path"] == path

    assert (container.folder / "model/current").resolve() == store
    arguments = container.tei["arguments"]
    settings = (container.folder / "opt/thinkube/settings.sh").read_text()
    assert arguments[:4] == [
        f"--model-id={container.folder}/model/current",
        f"--served-model-name={MODEL}",
        "--hostname=127.0.0.1",
        f"--port={container.tei_port}",
    ]
    assert all(f"  {flag}\n" in settings for flag in arguments[4:])
    assert {"--pooling=mean", "--dtype=float16"} <= set(arguments)


def test_tei_gets_no_variable_that_it_could_misread_and_no_secret(
    make: Callable[..., Container], files: Path
) -> None:
    container = make()
    mounted(container, files)
    container.serve(
        MODEL_ID=MODEL, LOG_LEVEL="debug", NVIDIA_VISIBLE_DEVICES="0", CUDA_CACHE_PATH="/x"
    )

    environment = container.tei["environment"]
    assert environment["LOG_LEVEL"] == "debug"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "0"
    assert environment["CUDA_CACHE_PATH"] == "/x"
    assert not set(environment) & {*SECRETS, *BAIT, "MODEL_ID"}
    for secret in SECRETS.values():
        assert secret not in container.said


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_no_secret_is_ever_in_a_process_s_arguments(
    make: Callable[..., Container], files: Path
) -> None:
    """Not for a moment, not even of a program that becomes TEI: /proc shows them to every user."""
    container = make()
    mounted(container, files)
    trace = container.folder / "trace"
    container.command = (
        "strace",
        "-f",
        "-qq",
        "-s",
        "4000",
        "-e",
        "trace=execve",
        "-o",
        str(trace),
    )
    container.serve(MODEL_ID=MODEL, API_KEY="key-of-clients-7c7c")

    assert container.tei["environment"]["API_KEY"] == "key-of-clients-7c7c"
    called = trace.read_text()
    assert "text-embeddings-router" in called
    for secret in ("key-of-clients-7c7c", *SECRETS.values()):
        assert secret not in called


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (lambda store: (store / "config.json").unlink(), 3, "model/config.json is gone"),
        (
            lambda store: (store / "tokenizer.json").write_text("{}"),
            7,
            "tokenizer.json has 2 bytes",
        ),
    ],
    ids=["a file is missing", "a file has another size"],
)
def test_a_mount_that_does_not_hold_the_pin_is_not_used(
    make: Callable[..., Container],
    files: Path,
    damage: Callable[[Path], object],
    code: int,
    said: str,
) -> None:
    """The network is tried, here without success; then the container ends, and TEI never starts."""
    container = make(mlflow_tracking_uri=f"http://127.0.0.1:{free_port()}")
    damage(mounted(container, files))
    container.start(MODEL_ID=MODEL, ADMIN_PASSWORD="")
    assert container.end() == code
    assert said in container.last_line
    assert f"start: {container.reason}" == container.last_line
    assert not (container.stub / "started.json").exists()


def test_a_component_without_a_model_is_idle(make: Callable[..., Container], files: Path) -> None:
    container = make()
    mounted(container, files)
    container.start()
    container.until(lambda: container.get("/health")[0])
    assert container.get("/health") == (200, '{"status":"idle"}\n')
    assert json.loads(container.get("/v1/models")[1])["data"] == []
    assert container.get("/v1/embeddings")[0] == 503
    assert not (container.stub / "started.json").exists()
    assert container.started is not None
    container.started.send_signal(signal.SIGTERM)
    assert container.end() == 0


def test_an_app_serves_its_pin_whatever_the_platform_says(
    make: Callable[..., Container], files: Path
) -> None:
    container = make(project_name="search")
    mounted(container, files)
    container.serve(MODEL_ID="acme/another")
    (model,) = json.loads(container.get("/v1/models")[1])["data"]
    assert model["id"] == MODEL


def test_an_app_on_a_gpu_is_healthy_only_once_it_serves(
    make: Callable[..., Container], files: Path
) -> None:
    """Its startup probe waits; its readiness must not be true before."""
    container = make(project_name="search", accelerator="l4")
    mounted(container, files)
    container.start()
    container.until(lambda: container.get("/health")[0])
    assert container.get("/health")[0] == 503
    container.load()
    container.until(lambda: container.get("/health")[0] == 200)


@pytest.mark.parametrize(
    ("answers", "page"),
    [({"project_name": "search"}, True), ({"project_name": "text-embeddings"}, False)],
    ids=["app", "component"],
)
def test_an_app_shows_its_page_at_its_root(
    make: Callable[..., Container], files: Path, answers: dict[str, Any], page: bool
) -> None:
    """No second process, and nothing else of the folder; POST / stays TEI's."""
    container = make(**answers)
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    status, body = container.get("/")
    assert (status, "<!doctype html>" in body) == (200, page)
    for name in ("style.css", "page.js", "service.js", "vectors.js"):
        assert container.get(f"/{name}")[0] == (200 if page else 404)
    assert container.get("/serve.py")[1].startswith('{"path"')  # TEI's answer
    sent = json.dumps({"inputs": "a text"})
    assert container.post("/", sent) == (200, sent)
    if page:
        with urllib.request.urlopen(f"http://127.0.0.1:{container.port}/") as answer:
            assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
            assert answer.headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize("name", ["../../etc", '$(id)"'])
def test_what_is_no_model_is_refused_and_not_repeated(
    make: Callable[..., Container], name: str
) -> None:
    container = make()
    container.start(MODEL_ID=name)
    assert container.end() == 2
    assert container.last_line == "start: MODEL_ID is not the name of a model"
    assert container.reason == "MODEL_ID is not the name of a model"
    assert name not in container.said.replace(str(container.folder), "")


def test_a_failed_load_ends_the_container(make: Callable[..., Container], files: Path) -> None:
    """The LLM gateway sees a failure only in the pod's end."""
    container = make()
    mounted(container, files)
    container.start(MODEL_ID=MODEL)
    container.load("fail")
    assert container.end() == 1
    assert container.reason == f"{MODEL} is not served: TEI ended with 1: warm-up failed"
    assert container.last_line == f"start: {container.reason}"
    assert container.said.splitlines()[-2] == "warm-up failed"


@pytest.mark.parametrize("which", ["tei", "nginx"])
def test_the_end_of_one_process_ends_the_container(
    make: Callable[..., Container], files: Path, which: str
) -> None:
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    if which == "tei":
        container.get("/crash")
        assert container.end() == 9
        assert container.reason == f"{MODEL} is not served: TEI ended with 9"
    else:
        pid = (container.folder / "tmp/front/nginx.pid").read_text().strip()
        workers = subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True)
        for process in (pid, *workers.stdout.split()):
            os.kill(int(process), signal.SIGKILL)
        assert container.end() == 1
    with pytest.raises(ProcessLookupError):
        os.kill(container.tei["pid"], 0)


def test_an_unhealthy_tei_is_not_listed(make: Callable[..., Container], files: Path) -> None:
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    (container.stub / "unhealthy").touch()
    assert container.get("/health")[0] == 503
    assert json.loads(container.get("/v1/models")[1])["data"] == []


def test_requests_in_flight_are_finished_before_the_end(
    make: Callable[..., Container], files: Path
) -> None:
    """And bytes pass as they come: the client has the first part before the second is there."""
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    client = http.client.HTTPConnection("127.0.0.1", container.port, timeout=60)
    client.request("GET", "/stream")
    answer = client.getresponse()
    assert answer.read(3) == b"one"
    assert container.started is not None
    container.started.send_signal(signal.SIGTERM)
    container.until(lambda: "stopping" in container.said)
    (container.stub / "second").touch()
    assert answer.read() == b"two"
    assert container.end() == 0


def test_a_component_that_stops_is_listed_no_more_but_still_serves(
    make: Callable[..., Container], files: Path
) -> None:
    """Its pod counts for the LLM gateway until its end."""
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    assert container.models == [MODEL]
    assert container.started is not None
    container.started.send_signal(signal.SIGTERM)
    container.until(lambda: container.models == [])
    assert container.get("/info")[0] == 200
    assert container.end() == 0


def test_no_number_of_checks_fills_tei_s_queue(make: Callable[..., Container], files: Path) -> None:
    """The eighth check that waits ends TEI, also when nobody waits for its answer any more."""
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    (container.stub / "batch").touch()
    impatient = socket.create_connection(("127.0.0.1", container.port))
    impatient.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    container.until(lambda: json.loads(container.get("/waited")[1])[0] == 1)
    impatient.close()

    paths = ("/health", "/", "/ping", "/ready", "//health", "/%68ealth", "/v1/models") * 3
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = [pool.submit(container.get, path) for path in paths]
        done = [wait([a], timeout=1).done for a in answers]
        assert json.loads(container.get("/waited")[1]) == [3, 3]
        assert container.get("/info")[0] == 200
        (container.stub / "batch").unlink()
        codes = [answer.result()[0] for answer in answers]
    assert done.count(set()) == 2  # they waited, and were answered then
    assert codes.count(503) + paths.count("/v1/models") >= len(paths) - 2
    container.until(lambda: json.loads(container.get("/waited")[1])[0] == 0)
    assert container.get("/health") == (200, "")
    assert container.models == [MODEL]


TOKEN_IDS = [
    {"model": MODEL, "input": [[3923, 374, 279]]},
    {"input": [40000, 50000], "model": MODEL},
    {"inputs": [[0]]},
    {"input": [[999999, 1], [2]], "encoding_format": "base64"},
]
TEXTS = [
    {"input": "one text"},
    {"input": ["7 dwarfs", "[1, 2]"]},
    {"inputs": ['"input": [1, 2]', "\\", '\\"input": [[3']},
    {"model": "[1]", "dimensions": 8, "input": ["a"]},
    {"input": []},
]


@pytest.mark.parametrize("indent", [None, 2])
def test_token_ids_are_refused_and_texts_pass(
    make: Callable[..., Container], files: Path, indent: int | None
) -> None:
    """TEI reads ids of another tokenizer as text of its own, and ends when it knows none of them."""
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    for path in ("/v1/embeddings", "/embeddings", "/embed", "/"):
        for body in TOKEN_IDS:
            status, answer = container.post(path, json.dumps(body, indent=indent))
            assert status == 422, body
            assert "token ids are not supported" in json.loads(answer)["error"]
        for body in TEXTS:
            sent = json.dumps(body, indent=indent)
            assert container.post(path, sent) == (200, sent), body
    status, answer = container.post("/embed", "{}", "text/plain")
    assert (status, "application/json" in answer) == (415, True)


def test_an_idle_connection_outlives_the_one_of_the_gateway_s_proxy(render: Render) -> None:
    """Go's http.Transport closes an idle connection after 90 s; nginx must not close it before."""
    conf = (render(program=False, platform="thinkube") / "images/thinkube/nginx.conf").read_text()
    (seconds,) = re.findall(r"^ *keepalive_timeout (\d+)s;", conf, re.MULTILINE)
    assert int(seconds) > 90


def test_connections_to_tei_stay_open_and_bodies_pass_unchanged(
    make: Callable[..., Container], files: Path
) -> None:
    container = make()
    mounted(container, files)
    container.serve(MODEL_ID=MODEL)
    peers = set()
    for path in ("/health", "/v1/models", "/ready", "/info") * 5:
        status, body = container.get(path)
        assert status == 200
        peers |= {json.loads(body)["peer"]} if path == "/info" else set()
    assert len(peers) == 1
    body = os.urandom(3_000_000)  # more than TEI takes: that is TEI's to say
    url = f"http://127.0.0.1:{container.port}/v1/embeddings"
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.read() == body


def test_without_a_mount_the_model_is_fetched_and_another_one_too(
    make: Callable[..., Container],
    files: Path,
    mlflow_proxied: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    name = f"acme-{tmp_path.name.replace('_', '-')}"
    for model in (name, f"{name}-other"):
        register(mlflow_proxied, files, model)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)
    from extensions import pin

    resolved = pin.resolve(name, "latest").to_mapping()
    container = make(model_id=name, pin=resolved, mlflow_tracking_uri=mlflow_proxied)
    container.serve(MODEL_ID=name)
    assert (container.folder / "model/current/model.safetensors").is_file()
    assert "--pooling=mean" in container.tei["arguments"]

    other = make(model_id=name, pin=resolved, mlflow_tracking_uri=mlflow_proxied)
    other.serve(MODEL_ID=f"{name}-other")
    assert json.loads(other.get("/v1/models")[1])["data"][0]["id"] == f"{name}-other"
    assert not any(a.startswith("--pooling") for a in other.tei["arguments"])
    assert "is not the pinned model" in other.said
