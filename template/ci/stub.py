"""TEI's HTTP API without a model: vectors are made from a hash of the text.

Each fault is what a broken, misconfigured or different endpoint would answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import struct
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

FAULTS = {
    "health": "/health answers 503",
    "other model": "it serves another model",
    "other context": "--max-batch-tokens is smaller than planned",
    "other batch size": "--max-client-batch-size is another",
    "other dtype": "--dtype is another",
    "other pooling": "--pooling is another",
    "reranker": "it serves a reranker",
    "other dimensions": "vectors have another length",
    "not normalised": "vectors have not length 1",
    "null": "a number overflowed and became null",
    "base64 of other numbers": "base64 says something else than float",
    "base64 ignored": "base64 is answered with numbers",
    "shuffled": "the vectors of a batch are in another order",
    "indices": "the indices of a batch are not in order",
    "no truncation": "--auto-truncate is false",
    "truncation elsewhere": "inputs are cut at another length",
    "truncate=false ignored": "what the client asks not to be cut is cut",
    "any batch size": "a batch of any size is taken",
    "other status": "a too large batch is answered with 413, as before TEI 1.9",
    "any key": "any key will do",
    "error": "/v1/embeddings fails with 424",
    "other version": "the link still names the version before",
    "other metrics": "a metric has another name",
    "equal lengths": "the mask is lost in a batch where nothing is padded",
    "equal long ones": "the same, where it shows in the longest texts alone",
    "padding": "padding is not masked",
    "at once": "texts of requests that come at the same time spoil each other",
}


@dataclass
class Stub:
    """What the server says of itself."""

    model: str = "nomic-ai/nomic-embed-text-v1.5"
    dimensions: int = 768
    max_input_length: int = 8192
    max_client_batch_size: int = 512
    dtype: str = "float16"
    pooling: str = "mean"
    key: str | None = None
    fault: str = ""
    max_batch_tokens: int = 16384
    spoilt_by: float = 0.01
    """What a fault of batches adds to every second number."""

    busy: int = 0
    """Requests that are under way."""

    used: set[str] = field(default_factory=set)
    """Metrics that have been used: TEI shows no others."""

    def info(self) -> dict[str, Any]:
        pooling = "cls" if self.fault == "other pooling" else self.pooling.replace("-", "_")
        score = {"id2label": {"0": "a"}, "label2id": {"a": 0}}
        return {
            "model_id": "/model/2" if self.fault == "other version" else "/model/current",
            "model_sha": None,
            "model_dtype": "float32" if self.fault == "other dtype" else self.dtype,
            "served_model_name": "other/model" if self.fault == "other model" else self.model,
            "model_type": {"reranker": score}
            if self.fault == "reranker"
            else {"embedding": {"pooling": pooling}},
            "max_concurrent_requests": 4096,
            "max_input_length": 512 if self.fault == "other context" else self.max_input_length,
            "max_batch_tokens": self.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": 32
            if self.fault == "other batch size"
            else self.max_client_batch_size,
            "auto_truncate": self.fault != "no truncation",
            "tokenization_workers": 4,
            "version": "1.9.3",
            "sha": "0d124dc9773be6ac5a9a57d8439aba9bbbf33273",
            "docker_label": "stub",
        }

    def vector(self, text: str) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        generator = random.Random(seed)
        size = 384 if self.fault == "other dimensions" else self.dimensions
        values = [generator.gauss(0, 1) for _ in range(size)]
        length = 0.5 if self.fault == "not normalised" else 1.0
        return _unit(values, length)

    def batch(self, texts: list[str]) -> list[list[float]]:
        """Vectors of texts that are computed together."""
        lengths = [min(self.tokens(text), self.max_input_length) for text in texts]
        company = len(texts) > 1
        equal = company and len(set(lengths)) == 1
        spoilt = [
            {
                "equal lengths": equal,
                "equal long ones": equal and length >= min(self.max_input_length, 4096),
                "padding": company and length < max(lengths),
                "at once": not company and self.busy > 1,
            }.get(self.fault, False)
            for length in lengths
        ]
        vectors = [self.vector(text) for text in texts]
        return [
            _unit([v + self.spoilt_by * (i % 2) for i, v in enumerate(vector)]) if bad else vector
            for vector, bad in zip(vectors, spoilt, strict=True)
        ]

    def tokens(self, text: str) -> int:
        """Words, and the two special tokens."""
        return len(text.split()) + 2

    def metrics(self) -> str:
        lines = []
        for name in sorted(self.used):
            if self.fault == "other metrics" and name == "te_queue_size":
                name = "tei_queue_size"
            kind = "gauge" if name.endswith("_size") and "batch" not in name else "counter"
            lines.append(f"# TYPE {name} {kind}\n{name} 1\n")
        return "\n".join(lines)


def _unit(values: list[float], length: float = 1.0) -> list[float]:
    """Of this length, in the 32-bit numbers that JSON and base64 carry alike."""
    norm, size = math.hypot(*values) / length, len(values)
    return list(struct.unpack(f"<{size}f", struct.pack(f"<{size}f", *(v / norm for v in values))))


class Handling(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else each answer waits 40 ms for an ACK
    stub: Stub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        stub = self.stub
        if self.path == "/health":
            if stub.fault == "health":
                self.answer(503, {"error": "unhealthy", "error_type": "Unhealthy"})
            else:
                self.answer(200, b"")
        elif self.path == "/metrics":
            self.answer(200, stub.metrics().encode())
        elif self.path == "/info":
            if self.authorised():
                self.answer(200, stub.info())
        else:
            self.answer(404, b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.authorised():
            return
        self.stub.used.update({"te_request_count", "te_queue_size"})
        if self.path == "/v1/embeddings":
            self.stub.busy += 1
            try:
                self.openai(body)
            finally:
                self.stub.busy -= 1
        elif self.path == "/embed":
            self.embed(body)
        elif self.path == "/tokenize" and self.stub.fault != "no /tokenize":
            token = {"id": 1, "text": "a", "special": False, "start": 0, "stop": 1}
            self.answer(200, [[token] * self.stub.tokens(body["inputs"])])
        else:
            self.answer(404, b"")

    def authorised(self) -> bool:
        stub = self.stub
        given = self.headers.get("Authorization")
        good = stub.key is None or stub.fault == "any key" or given == f"Bearer {stub.key}"
        if not good:
            self.answer(401, b"")
        return good

    def refusal(self, texts: list[str], truncate: bool) -> tuple[int, str, str] | None:
        """(status, message, type) as TEI's."""
        stub = self.stub
        if stub.fault == "error":
            return 424, "Inference failed", "Backend"
        if len(texts) > stub.max_client_batch_size and stub.fault != "any batch size":
            self.stub.used.add("te_request_failure")
            status = 413 if stub.fault == "other status" else 422
            limit = stub.max_client_batch_size
            return (
                status,
                f"batch size {len(texts)} > maximum allowed batch size {limit}",
                "Validation",
            )
        if not truncate and any(stub.tokens(t) > stub.max_input_length for t in texts):
            self.stub.used.add("te_request_failure")
            return 422, f"`inputs` must have less than {stub.max_input_length} tokens", "Validation"
        return None

    def succeed(self) -> None:
        self.stub.used.update(
            {
                *("te_request_success", "te_embed_count", "te_embed_success"),
                *("te_batch_next_size", "te_batch_next_tokens", "te_request_input_length"),
                *("te_request_duration", "te_request_queue_duration"),
                *("te_request_inference_duration", "te_request_tokenization_duration"),
            }
        )

    def openai(self, body: dict[str, Any]) -> None:
        stub = self.stub
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        refused = self.refusal(texts, truncate=stub.fault != "no truncation")
        if refused:
            status, message, kind = refused
            self.answer(status, {"message": message, "code": status, "error_type": kind})
            return
        self.succeed()
        longest = 512 if stub.fault == "truncation elsewhere" else stub.max_input_length
        tokens = sum(min(stub.tokens(t), longest) for t in texts)
        if stub.fault == "at once":
            time.sleep(0.02)  # so that others are there
        vectors: list[Any] = stub.batch(texts)
        if stub.fault == "shuffled":
            vectors.reverse()
        if body.get("encoding_format") == "base64" and stub.fault != "base64 ignored":
            sign = -1 if stub.fault == "base64 of other numbers" else 1
            vectors = [
                base64.b64encode(struct.pack(f"<{len(v)}f", *(sign * x for x in v))).decode()
                for v in vectors
            ]
        elif stub.fault == "null":
            vectors = [[None, *v[1:]] for v in vectors]
        indices = list(range(len(texts)))
        if stub.fault == "indices":
            indices.reverse()
        self.answer(
            200,
            {
                "object": "list",
                "data": [
                    {"object": "embedding", "embedding": v, "index": i}
                    for i, v in zip(indices, vectors, strict=True)
                ],
                "model": "other/model" if stub.fault == "other model" else stub.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
        )

    def embed(self, body: dict[str, Any]) -> None:
        texts = body["inputs"] if isinstance(body["inputs"], list) else [body["inputs"]]
        truncate = body.get("truncate", True) or self.stub.fault == "truncate=false ignored"
        refused = self.refusal(texts, truncate=truncate)
        if refused:
            self.answer(refused[0], {"error": refused[1], "error_type": refused[2]})
            return
        self.succeed()
        self.answer(200, [self.stub.vector(t) for t in texts])

    def answer(self, status: int, body: object) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # sixteen clients come at once


@contextmanager
def serve_with(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on a free port of the loopback interface."""
    server = _Server(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(stub: Stub) -> AbstractContextManager[str]:
    """The URL of a server of this stub."""
    return serve_with(type("Handler", (Handling,), {"stub": stub}))
