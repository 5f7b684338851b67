"""Checks a running endpoint against what this repository deploys: `python smoke.py --url http://…`.

Prints one line per check and ends with 0 when none failed, 1 when one did, 2 when it could not begin.
A key for the endpoint is taken from the environment variable API_KEY, never from the command line.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import re
import struct
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

METRICS = (
    "te_batch_next_size",
    "te_batch_next_tokens",
    "te_embed_count",
    "te_queue_size",
    "te_request_count",
    "te_request_duration",
    "te_request_failure",
    "te_request_inference_duration",
    "te_request_input_length",
    "te_request_queue_duration",
    "te_request_success",
    "te_request_tokenization_duration",
)
"""What the dashboard and the alerts read; TEI shows each after its first use."""

TEXTS = (
    "The harbour was empty before the storm.",
    "Quarterly revenue grew by four percent.",
    "def add(a, b): return a + b",
    "Photosynthesis turns light into sugar.",
    "Der Zug nach Berlin hat zwanzig Minuten Verspätung.",
)
TOLERANCE = 1e-3
"""Of vector lengths and of numbers of the same vector computed twice, in float16."""


class Failed(Exception):
    """A check did not find what it expected."""


class Skipped(Exception):
    """A check has nothing to look at."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What the endpoint must be; as in expected.json."""

    model: str
    dimensions: int | None
    max_input_tokens: int
    max_client_batch_size: int
    dtype: str
    pooling: str
    api_key: bool
    request_seconds: int

    @classmethod
    def read(cls, path: Path) -> Expected:
        """Raises OSError, ValueError or TypeError when the file is not what it must be."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The body parsed; raises Failed when it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Failed(f"the body is no JSON: {self.body[:80]!r}") from None


class Endpoint:
    """The service under test."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self.url, self.key, self.timeout = url.rstrip("/"), key, timeout
        self._client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key or "none", timeout=timeout, max_retries=0
        )

    def request(self, path: str, body: object = None, key: str | None = None) -> Answer:
        """One request; `key`: another than the right one."""
        headers = {"Content-Type": "application/json"}
        if key or self.key:
            headers["Authorization"] = f"Bearer {key or self.key}"
        request = urllib.request.Request(  # noqa: S310 (main takes http and https alone)
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:  # noqa: S310
                return Answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read())
        except (OSError, ValueError) as error:
            raise Failed(f"{self.url}{path}: {getattr(error, 'reason', error)}") from None

    def embed(self, texts: Sequence[str], model: str, encoding: str = "float") -> Any:
        """Embeddings through OpenAI's own client."""
        try:
            return self._client.embeddings.create(
                input=list(texts),
                model=model,
                encoding_format=encoding,  # type: ignore[arg-type]
            )
        except openai.APIStatusError as error:
            raise Failed(f"/v1/embeddings answers {error.status_code}: {error.message}") from None
        except openai.OpenAIError as error:
            raise Failed(f"/v1/embeddings: {error}") from None


Check = Callable[[Endpoint, Expected], str]


def health(endpoint: Endpoint, expected: Expected) -> str:
    """/health answers 200."""
    answer = endpoint.request("/health")
    _equal("status", answer.status, 200)
    return "200"


def info(endpoint: Endpoint, expected: Expected) -> str:
    """/info is of the pinned model, with the flags of this repository."""
    answer = endpoint.request("/info")
    _equal("status of /info", answer.status, 200)
    said = answer.json()
    model_type = said.get("model_type")
    embedding = model_type.get("embedding") if isinstance(model_type, dict) else None
    if not isinstance(embedding, dict):
        raise Failed(f"it serves no embedding model: model_type is {model_type}")
    _equal("served_model_name", said.get("served_model_name"), expected.model)
    _equal("max_input_length", said.get("max_input_length"), expected.max_input_tokens)
    _equal(
        "max_client_batch_size", said.get("max_client_batch_size"), expected.max_client_batch_size
    )
    _equal("model_dtype", said.get("model_dtype"), expected.dtype)
    pooling = str(embedding.get("pooling")).replace("_", "-")
    _equal("pooling", pooling, expected.pooling)
    return f"{expected.model}, {expected.dtype}, {pooling} pooling, TEI {said.get('version')}"


def embedding(endpoint: Endpoint, expected: Expected) -> str:
    """One text gives one vector of the model's dimensions and of length 1."""
    answer = endpoint.embed(TEXTS[:1], expected.model)
    _equal("number of vectors", len(answer.data), 1)
    _equal("model", answer.model, expected.model)
    vector = _vector(answer.data[0].embedding)
    if expected.dimensions is not None:
        _equal("dimensions", len(vector), expected.dimensions)
    length = math.hypot(*vector)
    if abs(length - 1) > TOLERANCE:
        raise Failed(f"the vector has length {length:.4f} instead of 1")
    return f"{len(vector)} dimensions, length {length:.4f}"


def encodings(endpoint: Endpoint, expected: Expected) -> str:
    """base64 says the same as float."""
    numbers = _vector(endpoint.embed(TEXTS[:1], expected.model).data[0].embedding)
    text = endpoint.embed(TEXTS[:1], expected.model, "base64").data[0].embedding
    if not isinstance(text, str):
        raise Failed("base64 was asked for, and numbers came")
    try:
        raw = base64.b64decode(text, validate=True)
        decoded = struct.unpack(f"<{len(raw) // 4}f", raw)
    except (ValueError, struct.error):
        raise Failed("what came is no base64 of 32-bit numbers") from None
    _equal("numbers in base64", len(decoded), len(numbers))
    worst = max(abs(a - b) for a, b in zip(numbers, decoded, strict=True))
    if not worst <= TOLERANCE:
        raise Failed(f"the two differ by {worst:.2g}")
    return f"the same {len(decoded)} numbers"


def order(endpoint: Endpoint, expected: Expected) -> str:
    """The vectors of a batch come in the order of its texts."""
    answer = endpoint.embed(TEXTS, expected.model)
    _equal("number of vectors", len(answer.data), len(TEXTS))
    _equal("indices", [item.index for item in answer.data], list(range(len(TEXTS))))
    batch = [_vector(item.embedding) for item in answer.data]
    for number, text in enumerate(TEXTS):
        alone = _vector(endpoint.embed([text], expected.model).data[0].embedding)
        nearest = max(range(len(batch)), key=lambda i: _dot(batch[i], alone))
        if nearest != number:
            raise Failed(f"text {number} came back as vector {nearest}")
        if _dot(batch[number], alone) < 0.99:
            raise Failed(f"text {number} has another vector alone than in a batch")
    return f"{len(TEXTS)} texts, each its own vector"


def too_long(endpoint: Endpoint, expected: Expected) -> str:
    """A too long input is cut to the longest that is served; with truncate=false it is refused."""
    text = "word " * (expected.max_input_tokens + 64)
    used = endpoint.embed([text], expected.model).usage.prompt_tokens
    _equal("tokens taken of it", used, expected.max_input_tokens)
    refused = endpoint.request("/embed", {"inputs": text, "truncate": False})
    _equal("status with truncate=false", refused.status, 422)
    return f"cut at {used:,} tokens; 422 with truncate=false"


def too_many(endpoint: Endpoint, expected: Expected) -> str:
    """A batch above --max-client-batch-size is refused with 422."""
    batch = ["a"] * (expected.max_client_batch_size + 1)
    answer = endpoint.request("/v1/embeddings", {"input": batch, "model": expected.model})
    _equal(f"status for {len(batch)} texts", answer.status, 422)
    return f"422 for {len(batch)} texts"


def key(endpoint: Endpoint, expected: Expected) -> str:
    """A wrong key is refused with 401, where one is asked for."""
    body = {"input": "a", "model": expected.model}
    answer = endpoint.request("/v1/embeddings", body, key="not-the-key")
    if not expected.api_key:
        _equal("status with any key", answer.status, 200)
        raise Skipped("no key is asked for")
    _equal("status with a wrong key", answer.status, 401)
    return "401 for a wrong key"


def metrics(endpoint: Endpoint, expected: Expected) -> str:
    """/metrics has what the dashboard and the alerts read."""
    answer = endpoint.request("/metrics")
    _equal("status of /metrics", answer.status, 200)
    found = set(re.findall(r"^# TYPE (\w+)", answer.body.decode("utf-8", "replace"), re.MULTILINE))
    missing = [name for name in METRICS if name not in found]
    if missing:
        raise Failed(f"there is no {', '.join(missing)}")
    return f"{len(METRICS)} names"


CHECKS: tuple[tuple[str, Check], ...] = (
    ("health", health),
    ("model", info),
    ("embedding", embedding),
    ("base64", encodings),
    ("order", order),
    ("too long", too_long),
    ("too many", too_many),
    ("key", key),
    ("metrics", metrics),  # last: the others are the first use of what it looks for
)


def _equal(name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{name} is {found}, not {wanted}")


def _vector(values: object) -> list[float]:
    if not isinstance(values, list) or not values:
        raise Failed("what came is no vector")
    if any(not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        raise Failed("a number of the vector is missing: the model overflows in float16")
    return values


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def run(endpoint: Endpoint, expected: Expected) -> Iterator[tuple[str, str, str]]:
    """(verdict, name, detail) of each check; after a failed `health` the others are not tried."""
    down = False
    for name, check in CHECKS:
        if down:
            yield "skip", name, "the endpoint does not answer"
            continue
        try:
            yield "ok", name, check(endpoint, expected)
        except Failed as failure:
            down = name == "health"
            yield "FAIL", name, " ".join(str(failure).split())[:300]
        except Skipped as reason:
            yield "skip", name, str(reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    default_url = os.environ.get("SMOKE_URL", "http://127.0.0.1:8355")
    parser.add_argument("--url", default=default_url, help=f"of the service [{default_url}]")
    parser.add_argument(
        "--expected",
        type=Path,
        default=Path(__file__).with_name("expected.json"),
        help="what it must be [expected.json beside this program]",
    )
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for /health [0]")
    given = parser.parse_args(arguments)
    try:
        expected = Expected.read(given.expected)
    except (OSError, ValueError, TypeError) as error:
        print(f"smoke: {given.expected} cannot be used: {error}", file=sys.stderr)
        return 2
    if expected.api_key and not os.environ.get("API_KEY"):
        print("smoke: set API_KEY to the key of the service", file=sys.stderr)
        return 2
    if not given.url.startswith(("http://", "https://")):
        print(f"smoke: {given.url} is no http:// or https:// URL", file=sys.stderr)
        return 2
    key_given = os.environ["API_KEY"] if expected.api_key else None
    endpoint = Endpoint(given.url, key_given, expected.request_seconds)
    _wait(endpoint, given.wait)
    failed = 0
    print(f"{endpoint.url} as {expected.model}")
    for verdict, name, detail in run(endpoint, expected):
        failed += verdict == "FAIL"
        print(f"  {verdict:4}  {name:9}  {detail}", flush=True)
    print(f"{failed} failed" if failed else "all is as it should be")
    return 1 if failed else 0


def _wait(endpoint: Endpoint, seconds: float) -> None:
    """Until /health answers 200, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if endpoint.request("/health").status == 200:
                return
        except Failed:
            pass
        time.sleep(min(2.0, max(0.0, end - time.monotonic())))


if __name__ == "__main__":
    sys.exit(main())
