"""model-fetch beside what a user would pick instead: the same bytes, the same server, one run.

    python benchmarks/fetch.py --full .venv-full/bin/mlflow --skinny .venv/bin/mlflow --work /dev/shm

Every command is a process of its own, measured from its start to its end, interpreter and imports
included. Methods take turns, round by round, so that a busy moment of the machine meets them all;
tables give medians. Needs nginx, curl and openssl (Debian: nginx-light, curl, openssl).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "template/images/model-fetch"
PREFIX = "/api/2.0/mlflow-artifacts/artifacts"
MB = 1_000_000
BIG = 1_610_612_736  # bytes of weights: 1.5 GiB
SHARD = 160 << 20  # bytes of each of the three shards of the model of seven files
BUCKET = "bench"
KEYS = {
    "AWS_ACCESS_KEY_ID": "k",
    "AWS_SECRET_ACCESS_KEY": "s",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Sample:
    """One process: seconds of wall clock and processor, and the most memory it had, in MB."""

    seconds: float
    cpu: float
    rss: float


@dataclass
class Method:
    name: str
    command: list[str]
    env: Mapping[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def median(self, what: str) -> float:
        return statistics.median(getattr(sample, what) for sample in self.samples)


@dataclass
class Case:
    """Methods that bring the same files to `target`."""

    title: str
    bytes: int
    target: Path
    methods: list[Method]

    def round(self) -> None:
        for method in self.methods:
            shutil.rmtree(self.target, ignore_errors=True)
            self.target.mkdir(parents=True)
            method.samples.append(run(method.command, method.env))
        shutil.rmtree(self.target, ignore_errors=True)

    def table(self) -> str:
        rows = [
            f"### {self.title}",
            "",
            "| method | s | best s | MB/s | CPU s | peak MB |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for method in self.methods:
            seconds = method.median("seconds")
            best = min(sample.seconds for sample in method.samples)
            rows.append(
                f"| {method.name} | {seconds:.2f} | {best:.2f} | {self.bytes / MB / seconds:,.0f} "
                f"| {method.median('cpu'):.2f} | {method.median('rss'):.0f} |"
            )
        return "\n".join(rows) + "\n"

    def seconds(self, name: str) -> float:
        return next(m for m in self.methods if m.name == name).median("seconds")


LAUNCHER = """
import json, os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=2)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.monotonic() - began
print(json.dumps([os.waitstatus_to_exitcode(status), seconds,
                  usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""
"""Starts what is measured out of a small process: a child's peak memory begins at its parent's."""


def run(command: list[str], env: Mapping[str, str]) -> Sample:
    """Runs a command to its end and measures it; its output is shown only when it fails."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        env={"PATH": os.environ["PATH"], "HOME": tempfile.gettempdir(), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    code, *sample = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return Sample(*sample)


# The models


def write_weights(path: Path, size: int) -> None:
    """A valid safetensors file with one tensor of noise."""
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    block = random.Random(path.name).randbytes(16 << 20)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for at in range(0, size, len(block)):
            stream.write(block[: size - at])


def make_models(folder: Path, big: int) -> None:
    for name in ("one", "seven"):
        (folder / name).mkdir(parents=True)
    write_weights(folder / "one/model.safetensors", big)
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for name in names:
        write_weights(folder / "seven" / name, SHARD)
    small = {
        "model.safetensors.index.json": {
            "weight_map": {str(n): name for n, name in enumerate(names)}
        },
        "config.json": {
            **{"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522},
            **{"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
            **{"intermediate_size": 1536, "max_position_embeddings": 512, "hidden_act": "gelu"},
        },
        "tokenizer.json": {"vocab": list(range(60_000))},
        "modules.json": [],
    }
    for path, content in small.items():
        (folder / "seven" / path).write_text(json.dumps(content))
    for path in ("config.json", "tokenizer.json"):
        shutil.copy(folder / "seven" / path, folder / "one")


def write_pin(where: Path, folder: Path, uri: str, version: str) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pin = {
        **{"model_id": "bench", "registered_model": "bench", "selector": version},
        **{"version": version, "run_id": None, "logged_model_id": None, "revision": None},
        "artifact_uri": uri,
        "files": [
            {"path": path.name, "from": path.name, "size": path.stat().st_size} for path in files
        ],
        "facts": {"architecture": "bert", "pooling": "mean"},
    }
    where.write_text(json.dumps(pin))
    return where


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# The servers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def server(command: list[str], ready: str, log: Path, env: Mapping[str, str]) -> Iterator[None]:
    """A server that runs until the end of the block."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        for _ in range(900):
            try:
                urllib.request.urlopen(ready, timeout=2).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended: {log.read_text()[-2000:]}") from None
                time.sleep(0.2)
        yield
    finally:
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(5)
        except subprocess.TimeoutExpired:  # SeaweedFS takes its time
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def certificate(work: Path) -> tuple[Path, Path]:
    """A certificate for the loopback address, signed by itself, and its key."""
    certificate, key = work / "certificate.pem", work / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@contextmanager
def nginx(work: Path, models: Path) -> Iterator[tuple[str, str]]:
    """nginx that answers as MLflow's artifact proxy does: files, and a listing of each folder.

    Yields its addresses without and with TLS.
    """
    port, tls_port = free_port(), free_port()
    pem, key = certificate(work)
    listings = ""
    for folder in models.iterdir():
        rows = [
            {"path": path.name, "is_dir": False, "file_size": path.stat().st_size}
            for path in folder.iterdir()
        ]
        answer = json.dumps({"files": rows})
        listings += f"if ($arg_path = {folder.name}) {{ return 200 '{answer}'; }}\n"
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (work / "nginx" / name).mkdir(parents=True, exist_ok=True)
    temp = "\n".join(
        f"{name}_temp_path {work}/nginx/{name if name != 'client_body' else 'body'};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = work / "nginx.conf"
    config.write_text(
        f"""daemon off; worker_processes 2; pid {work}/nginx.pid; error_log {work}/nginx.log;
{"user root;" if os.geteuid() == 0 else ""}
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000; default_type application/octet-stream;
  {temp}
  server {{
    listen 127.0.0.1:{port};
    listen 127.0.0.1:{tls_port} ssl; ssl_certificate {pem}; ssl_certificate_key {key};
    location = /ready {{ return 200; }}
    location = {PREFIX} {{ default_type application/json; {listings} return 200 '{{}}'; }}
    location {PREFIX}/ {{ alias {models}/; }}
  }}
}}
"""
    )
    url = f"http://127.0.0.1:{port}"
    with server(["nginx", "-c", str(config)], f"{url}/ready", work / "nginx.out", {}):
        yield url, f"https://127.0.0.1:{tls_port}"


@contextmanager
def mlflow_server(work: Path, models: Path, command: str) -> Iterator[str]:
    port = free_port()
    arguments = [
        *(command, "server", "--host", "127.0.0.1", "--port", str(port), "--serve-artifacts"),
        *("--backend-store-uri", f"sqlite:///{work}/mlflow.db"),
        *("--artifacts-destination", str(models)),
    ]
    url = f"http://127.0.0.1:{port}"
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with server(arguments, f"{url}/health", work / "mlflow.log", quiet):
        yield url


def fill(url: str, folder: Path) -> None:
    """Make the bucket at an S3 endpoint, and put the folder's files into it."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"{folder.name}/{path.name}")


@contextmanager
def s3_server(work: Path, models: Path) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(arguments, f"{url}/moto-api/", work / "s3.log", {}):
        fill(url, models / "seven")
        yield url


@contextmanager
def seaweedfs(work: Path, models: Path, weed: str) -> Iterator[str]:
    """A real SeaweedFS with the single file in it, asked over S3 with keys."""
    names = ("master", "volume", "filer", "s3")
    ports = {f"{name}.port{kind}": free_port() for name in names for kind in ("", ".grpc")}
    url = f"http://127.0.0.1:{ports['s3.port']}"
    folder = work / "seaweedfs"
    folder.mkdir()
    arguments = [
        *(weed, "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-filer", "-s3"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=0"),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with server(arguments, f"{url}/healthz", work / "seaweedfs.log", KEYS):
        fill(url, models / "one")
        yield url


# The methods

BARE = """
import http.client, os, sys, threading, urllib.request
from urllib.parse import urlsplit
MIB = 1 << 20
target, *urls = sys.argv[1:]
ranges, lock = [], threading.Lock()
for url in urls:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        size = int(answer.headers["Content-Length"])
    fd = os.open(os.path.join(target, os.path.basename(url)), os.O_WRONLY | os.O_CREAT)
    ranges += [(url, fd, at, min(at + 16 * MIB, size)) for at in range(0, size, 16 * MIB)]
ranges.reverse()

def fetch():
    connection = http.client.HTTPConnection(urlsplit(urls[0]).netloc)
    buffer = memoryview(bytearray(MIB))
    while True:
        with lock:
            if not ranges:
                return
            url, fd, at, end = ranges.pop()
        headers = {"Range": f"bytes={at}-{end - 1}"}
        connection.request("GET", urlsplit(url).path, headers=headers)
        answer = connection.getresponse()
        while count := answer.readinto(buffer):
            os.pwrite(fd, buffer[:count], at)
            at += count

threads = [threading.Thread(target=fetch) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
"""What Python's standard library can do at best: no check, no lock, no resume, no digest."""


@dataclass
class Bench:
    work: Path
    models: Path
    tools: argparse.Namespace

    @property
    def target(self) -> Path:
        return self.work / "target"

    def ours(self, name: str, model: str, uri: str, url: str, *options: str, **env: str) -> Method:
        pin = write_pin(self.work / f"{model}-{abs(hash(uri))}.json", self.models / model, uri, "1")
        command = [
            *(sys.executable, "-m", "model_fetch", "--pin", str(pin)),
            *("--cache", str(self.target / "cache"), "--link", str(self.target / "current")),
            *("--termination-log", "", "--log-format", "json", *options),
        ]
        return Method(
            name, command, {"PYTHONPATH": str(PACKAGE), "MLFLOW_TRACKING_URI": url, **env}
        )

    @property
    def trust(self) -> dict[str, str]:
        """Has every method trust nginx's certificate."""
        pem = str(self.work / "certificate.pem")
        return {
            "MLFLOW_TRACKING_SERVER_CERT_PATH": pem,
            "SSL_CERT_FILE": pem,
            "CURL_CA_BUNDLE": pem,
        }

    def mlflow(self, name: str, command: str, model: str, url: str) -> Method:
        return Method(
            name,
            [
                *(command, "artifacts", "download", "--artifact-uri", f"mlflow-artifacts:/{model}"),
                *("--dst-path", str(self.target)),
            ],
            {"MLFLOW_TRACKING_URI": url},
        )

    def peers(self, model: str, url: str) -> list[Method]:
        files = sorted((self.models / model).iterdir())
        urls = [f"{url}{PREFIX}/{model}/{path.name}" for path in files]
        curl = ["curl", "--silent", "--fail"]
        for path, address in zip(files, urls, strict=True):
            curl += ["-o", str(self.target / path.name), address]
        found = [
            Method("curl, one stream", curl),
            Method(
                BARE_NAME,
                [sys.executable, "-c", BARE, str(self.target), *urls],
            ),
        ]
        if self.tools.skinny:
            found.append(self.mlflow(SKINNY, self.tools.skinny, model, url))
        if self.tools.full:
            found.append(self.mlflow(FULL, self.tools.full, model, url))
        return found

    def fast_store(self, title: str, model: str, url: str) -> Case:
        source = str(self.models / model)
        uri = f"mlflow-artifacts:/{model}"
        copy = ["cp", "-r", source, str(self.target)]
        digest = (
            "import hashlib, pathlib, shutil, sys\n"
            "shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)\n"
            "for path in pathlib.Path(sys.argv[2]).iterdir():\n"
            "    with path.open('rb') as stream:\n"
            "        print(hashlib.file_digest(stream, 'sha256').hexdigest())\n"
        )
        methods = [
            Method("cp", copy),
            Method("cp, then SHA-256", [sys.executable, "-c", digest, source, str(self.target)]),
            *self.peers(model, url),
            self.ours(PLAIN, model, uri, url, "--digests", "pinned", "--no-sync"),
            self.ours(HASHED, model, uri, url, "--no-sync"),
            Method("cp, then sync", ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"', "-", *copy[2:]]),
            self.ours("model-fetch as it is: SHA-256, synced", model, uri, url),
        ]
        return Case(title, size_of(self.models / model), self.target, methods)

    def tls_store(self, title: str, model: str, url: str) -> Case:
        methods = [
            *(method for method in self.peers(model, url) if method.name != BARE_NAME),
            self.ours(
                PLAIN, model, f"mlflow-artifacts:/{model}", url, "--digests", "pinned", "--no-sync"
            ),
            self.ours(HASHED, model, f"mlflow-artifacts:/{model}", url, "--no-sync"),
        ]
        for method in methods:
            method.env = {**method.env, **self.trust}
        return Case(title, size_of(self.models / model), self.target, methods)

    def slow_store(self, title: str, model: str, url: str) -> Case:
        methods = [
            *self.peers(model, url),
            self.ours(HASHED, model, f"mlflow-artifacts:/{model}", url, "--no-sync"),
        ]
        return Case(title, size_of(self.models / model), self.target, methods)

    def s3_store(self, title: str, url: str) -> Case:
        env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": url}
        methods = [self.ours(HASHED, "seven", f"s3://{BUCKET}/seven", "", "--no-sync", **env)]
        if self.tools.kserve:
            code = (
                "import sys; from kserve_storage import Storage; "
                "Storage.download(sys.argv[1], sys.argv[2])"
            )
            kserve = {**KEYS, "AWS_ENDPOINT_URL": url, "S3_USE_HTTPS": "0", "S3_VERIFY_SSL": "0"}
            command = [self.tools.kserve, "-c", code, f"s3://{BUCKET}/seven", str(self.target)]
            methods.insert(0, Method(KSERVE, command, kserve))
        return Case(title, size_of(self.models / "seven"), self.target, methods)

    def real_store(self, title: str, url: str) -> Case:
        """From SeaweedFS, beside what people copy from S3 with; the last row is SHA-256 alone."""
        source, target = f"s3://{BUCKET}/one", str(self.target)
        env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": url}
        keys = (KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"])
        remote = f":s3,provider=Other,endpoint='{url}',access_key_id={keys[0]}"
        remote += f",secret_access_key={keys[1]}:{BUCKET}/one"
        host = url.removeprefix("http://")
        juicefs = f"minio://{':'.join(keys)}@{host}/{BUCKET}/one/"
        digest = "import hashlib, sys; hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256')"
        weights = max((self.models / "one").iterdir(), key=lambda path: path.stat().st_size)
        methods = [
            Method(RCLONE, ["rclone", "copy", remote, target], {"RCLONE_CONFIG": os.devnull}),
            Method(
                "aws s3 cp --recursive",
                ["aws", "s3", "cp", "--quiet", "--recursive", source, target],
                {**KEYS, "AWS_ENDPOINT_URL": url},
            ),
            Method("juicefs sync", [self.tools.juicefs, "--quiet", "sync", juicefs, f"{target}/"]),
            self.ours(PLAIN, "one", source, "", "--digests", "pinned", "--no-sync", **env),
            self.ours(HASHED, "one", source, "", "--no-sync", **env),
            Method(SHA256, [sys.executable, "-c", digest, str(weights)]),
        ]
        found = [method for method in methods if shutil.which(method.command[0])]
        return Case(title, size_of(self.models / "one"), self.target, found)

    def restarts(self, url: str, rounds: int) -> str:
        """The second start, and what a run fetches again after a kill at 90 %."""
        method = self.ours("", "one", "mlflow-artifacts:/one", url, "--no-sync")
        total = size_of(self.models / "one")
        bare = Method("", [sys.executable, "-c", "pass"])
        second, interpreter, again = [], [], []
        for _ in range(rounds):
            shutil.rmtree(self.target, ignore_errors=True)
            self.target.mkdir(parents=True)
            kill_at(method, self.target, int(total * 0.9))
            received = json_run(method)["received"]
            again.append(received)
            second.append(run(method.command, method.env).seconds)
            interpreter.append(run(bare.command, {}).seconds)
        shutil.rmtree(self.target, ignore_errors=True)
        beyond = statistics.median(second) - statistics.median(interpreter)
        share = statistics.median(again) / total
        return (
            "### Starting again, one file of 1.5 GiB\n\n"
            f"- Second start, model complete: {statistics.median(second):.2f} s, of which the bare "
            f"interpreter takes {statistics.median(interpreter):.2f} s: {beyond:.2f} s beyond it.\n"
            f"- After `kill -9` when 90 % had arrived: {statistics.median(again) / MB:,.0f} MB "
            f"({share:.1%}) were fetched in the next run.\n"
        )


BARE_NAME = "four bare ranges, nothing checked"
PLAIN = "model-fetch, no digest"
HASHED = "model-fetch, SHA-256 of every byte"
RCLONE = "rclone copy, four streams"
SHA256 = "SHA-256 of the file alone, nothing fetched"
SKINNY = "mlflow artifacts download (skinny)"
FULL = "mlflow artifacts download (full)"
KSERVE = "kserve-storage"

GOALS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "nginx": (
        ("no digest, times as fast as skinny", "≥ 2.4", SKINNY, PLAIN),
        ("no digest, times as fast as full", "≥ 5", FULL, PLAIN),
        ("no digest, times as long as cp", "≤ 1.7", PLAIN, "cp"),
        ("SHA-256, times as fast as skinny", "≥ 1.5", SKINNY, HASHED),
        ("SHA-256, times as fast as full", "≥ 3", FULL, HASHED),
        ("SHA-256, times as long as cp and a digest", "≤ 0.8", HASHED, "cp, then SHA-256"),
    ),
    "MLflow": (("SHA-256, times as fast as skinny", "≥ 1.4", SKINNY, HASHED),),
    "SeaweedFS": (
        ("no digest, times as long as rclone", "≤ 1.0", PLAIN, RCLONE),
        ("SHA-256, times as long as rclone", "≤ 1.2", HASHED, RCLONE),
    ),
    "S3": (("SHA-256, times as fast as KServe", "> 1", KSERVE, HASHED),),
}
"""(what, the goal, the method whose time is divided, the method that it is divided by)"""


def kill_at(method: Method, target: Path, count: int) -> None:
    """Starts a download and kills it when so many bytes are on the volume."""
    environment = {"PATH": os.environ["PATH"], **method.env}
    process = subprocess.Popen(method.command, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        blocks = sum(p.stat().st_blocks for p in target.rglob("*.safetensors"))
        if blocks * 512 >= count:
            process.kill()
        time.sleep(0.002)


def json_run(method: Method) -> dict[str, Any]:
    """The last line of a run's log."""
    environment = {"PATH": os.environ["PATH"], **method.env}
    done = subprocess.run(
        method.command, env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stderr.strip().splitlines()[-1]))


def ratios(cases: list[Case]) -> str:
    """The goals that the project set itself, and what was measured."""
    rows = ["| case | goal | measured |", "|---|---|--:|"]
    for case in cases:
        goals = next((goals for word, goals in GOALS.items() if word in case.title), ())
        for text, goal, slower, faster in goals:
            try:
                ratio = f"{case.seconds(slower) / case.seconds(faster):.2f}"
            except StopIteration:
                ratio = "not run"
            rows.append(f"| {case.title} | {text}: {goal} | {ratio} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", help="`mlflow` of an environment with the full package")
    parser.add_argument("--skinny", help="`mlflow` of an environment with mlflow-skinny")
    parser.add_argument("--kserve", help="`python` of an environment with kserve-storage")
    parser.add_argument("--weed", help="`weed`: also from a real SeaweedFS; rclone and aws in PATH")
    parser.add_argument("--juicefs", default="juicefs", help="`juicefs`, for its sync")
    parser.add_argument("--weed-only", action="store_true", help="from SeaweedFS, and no other")
    parser.add_argument("--work", type=Path, help="folder for source and target")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=3, help="from MLflow and S3")
    parser.add_argument("--size", type=int, default=BIG, help="bytes of the single file")
    tools = parser.parse_args()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=tools.work)))
        bench = Bench(work, work / "models", tools)
        make_models(bench.models, tools.size)
        if tools.weed:
            url = stack.enter_context(seaweedfs(work, bench.models, tools.weed))
            real = bench.real_store(f"One file of {tools.size / MB:,.0f} MB from SeaweedFS", url)
            for _ in range(tools.rounds):
                real.round()
            print("\n".join([real.table(), ratios([real]), load()]))
            if tools.weed_only:
                return
        fast, tls = stack.enter_context(nginx(work, bench.models))
        cases = [
            bench.fast_store("One file of 1.5 GiB from nginx", "one", fast),
            bench.fast_store("Seven files, 0.5 GB, from nginx", "seven", fast),
            bench.tls_store("One file of 1.5 GiB over TLS", "one", tls),
        ]
        for _ in range(tools.rounds):
            for case in cases:
                case.round()
        again = bench.restarts(fast, tools.slow_rounds)
        slow = []
        if tools.full:
            url = stack.enter_context(mlflow_server(work, bench.models, tools.full))
            slow.append(bench.slow_store("One file of 1.5 GiB from MLflow's proxy", "one", url))
            slow.append(bench.slow_store("Seven files, 0.5 GB, from MLflow's proxy", "seven", url))
        if tools.kserve:
            url = stack.enter_context(s3_server(work, bench.models))
            slow.append(bench.s3_store("Seven files, 0.5 GB, from S3 (moto)", url))
        for _ in range(tools.slow_rounds):
            for case in slow:
                case.round()
    print("\n".join([*(case.table() for case in cases + slow), again, ratios(cases + slow)]))
    print(load())


def load() -> str:
    return f"Load average at the end: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n"


if __name__ == "__main__":
    main()
