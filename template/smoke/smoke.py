"""Checks a running endpoint against what this repository deploys: `python3 smoke.py --url http://…`.

Prints one line per check and ends with 0 when none failed, 1 when one did, 2 when it could not begin.
A key for the endpoint is taken from the environment variable API_KEY, never from the command line.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import batches
from batches import Company, words
from checks import Expected, Skipped, begin, program, run
from endpoint import Endpoint, Failed, Stopped

METRICS = (
    "te_batch_next_tokens",
    "te_embed_count",
    "te_embed_success",
    "te_queue_size",
    "te_request_count",
    "te_request_duration",
    "te_request_failure",
    "te_request_inference_duration",
    "te_request_input_length",
    "te_request_queue_duration",
    "te_request_tokenization_duration",
)
"""What the dashboard and the alerts read; TEI shows each after its first use."""

INSIDE = ("/health", "/ping", "/", "/info", "/metrics")
"""Paths that a route from outside leaves out."""

TEXTS = (
    "The harbour was empty before the storm.",
    "Quarterly revenue grew by four percent.",
    "def add(a, b): return a + b",
    "Photosynthesis turns light into sugar.",
    "Der Zug nach Berlin hat zwanzig Minuten Verspätung.",
)
TOLERANCE = 1e-3
"""Of vector lengths and of numbers of the same vector computed twice, in float16."""


@dataclass
class Service:
    """What the checks look at."""

    endpoint: Endpoint
    expected: Expected
    company: Company
    max_batch_tokens: int | None = None
    """As /info says."""

    @classmethod
    def of(cls, endpoint: Endpoint, expected: Expected) -> Service:
        """With what a text may differ by in company."""
        least = batches.GPU if expected.gpu else batches.CPU
        return cls(endpoint, expected, Company(endpoint, expected.max_client_batch_size, least))

    def long(self) -> list[str]:
        """Two texts of equal length: the longest inputs that fit into one batch together."""
        limit = self.expected.max_input_tokens
        if (self.max_batch_tokens or 2 * limit) >= 2 * limit:
            return self.cut()
        return self.company.sized((self.max_batch_tokens or 0) // 2)

    def cut(self) -> list[str]:
        """Two texts that are longer than the longest input."""
        return batches.twins(words(self.expected.max_input_tokens + 64))


def health(it: Service) -> str:
    """/health answers 200; else there is nothing to check."""
    try:
        return str(it.endpoint.request("/health").expect(200).status)
    except Failed as failure:
        raise Stopped(str(failure)) from None


def info(it: Service) -> str:
    """/info is of the pinned model, with the flags of this repository."""
    said, expected = it.endpoint.request("/info").expect(200).mapping(), it.expected
    model_type = said.get("model_type")
    embedding = model_type.get("embedding") if isinstance(model_type, dict) else None
    if not isinstance(embedding, dict):
        raise Failed(f"it serves no embedding model: model_type is {model_type}")
    pooling = str(embedding.get("pooling")).replace("_", "-")
    version = re.search(r"/(\d+)/?$", str(said.get("model_id")))
    told = version[1] if version else None
    for name, found, wanted in (
        ("served_model_name", said.get("served_model_name"), expected.model),
        ("max_input_length", said.get("max_input_length"), expected.max_input_tokens),
        (
            "max_client_batch_size",
            said.get("max_client_batch_size"),
            expected.max_client_batch_size,
        ),
        ("model_dtype", said.get("model_dtype"), expected.dtype),
        ("pooling", pooling, expected.pooling),
        ("version", told, str(expected.version) if told and expected.version else told),
    ):
        _equal(name, found, wanted)
    tokens = said.get("max_batch_tokens")
    it.max_batch_tokens = tokens if type(tokens) is int and tokens > 0 else None
    _, _, edits = str(said.get("docker_label")).partition("edits=")
    edited = f"with edits: {edits.replace(',', ', ')}" if edits else "without edits"
    which = f"{expected.model}{f' version {told}' if told else ''}"
    return f"{which}, {expected.dtype}, {pooling} pooling; TEI {said.get('version')} {edited}"


def edge(it: Service) -> str:
    """From outside only the API is there, not what tells about the service or waits in its queue."""
    for path in INSIDE:
        try:
            answer = it.endpoint.request(path, key="not-the-key")
        except Failed as failure:
            raise Stopped(str(failure)) from None
        # The page to try the service may be at /, where TEI itself would answer with nothing.
        if answer.status == 200 and not (path == "/" and answer.body.startswith(b"<!doctype html")):
            raise Failed(f"{path} is answered from outside")
    return f"{', '.join(INSIDE)}: not from outside"


def embedding(it: Service) -> str:
    """One text gives one vector of the model's dimensions and of length 1."""
    answer = it.endpoint.embed(TEXTS[:1], "float")
    _equal("model", answer.model, it.expected.model)
    [vector] = answer.vectors
    if it.expected.dimensions is not None:
        _equal("dimensions", len(vector), it.expected.dimensions)
    length = math.hypot(*vector)
    if not abs(length - 1) <= TOLERANCE:
        raise Failed(f"the vector has length {length:.4f} instead of 1")
    return f"{len(vector)} dimensions, length {length:.4f}"


def encodings(it: Service) -> str:
    """base64, which OpenAI's clients ask for, says the same as float."""
    [numbers] = it.endpoint.embed(TEXTS[:1], "float").vectors
    [decoded] = it.company.alone(TEXTS[0]).vectors
    _equal("numbers in base64", len(decoded), len(numbers))
    worst = max(abs(a - b) for a, b in zip(numbers, decoded, strict=True))
    if not worst <= TOLERANCE:
        raise Failed(f"the two differ by {worst:.2g}")
    return f"the same {len(decoded)} numbers"


def order(it: Service) -> str:
    """The vectors of a batch come in the order of its texts, each as it is alone."""
    return f"{len(TEXTS)} texts, {it.company.together(TEXTS)}"


def equal(it: Service) -> str:
    """Texts of equal length: nothing is padded there, and a server may forget its mask."""
    texts = batches.equal(8)
    said = it.company.together(texts)
    return f"{len(texts)} texts of {it.company.tokens(texts)} tokens, {said}"


def too_long(it: Service) -> str:
    """A too long input is cut to the longest that is served; with truncate=false it is refused."""
    text = it.cut()[0]
    _equal("tokens taken of it", it.company.alone(text).tokens, it.expected.max_input_tokens)
    refused = it.endpoint.request("/embed", {"inputs": text, "truncate": False})
    _equal("status with truncate=false", refused.status, 422)
    return f"cut at {it.expected.max_input_tokens:,} tokens; 422 with truncate=false"


def at_limit(it: Service) -> str:
    """Texts that are cut, which all are of equal length, alone and together."""
    texts = it.cut()
    said = it.company.together([*texts, *texts])
    return f"{2 * len(texts)} texts of {it.company.tokens(texts)} tokens, {said}"


def at_half(it: Service) -> str:
    """The same for the longest texts of which two fit into a batch."""
    texts = it.long()
    if texts == it.cut():
        raise Skipped("two of the longest inputs fit into a batch")
    said = it.company.together([*texts, *texts])
    return f"{2 * len(texts)} texts of {it.company.tokens(texts)} tokens, {said}"


def beside(it: Service) -> str:
    """Short texts in a batch with a long one: padding must not be seen."""
    long = it.long()[0]
    said = it.company.together([TEXTS[0], long, *TEXTS[1:3]])
    return f"3 texts beside one of {it.company.tokens([long])} tokens, {said}"


def at_once(it: Service) -> str:
    """Sixteen one-text requests at a time, while long texts are computed."""
    long, other = it.long()
    short = [*batches.equal(8), *TEXTS, *map(words, (2, 20, 40))]
    return f"{len(short)} requests at a time, {it.company.at_once(short, [long, other, long])}"


def too_many(it: Service) -> str:
    """A batch above --max-client-batch-size is refused with 422."""
    batch = ["a"] * (it.expected.max_client_batch_size + 1)
    answer = it.endpoint.request("/v1/embeddings", {"input": batch, "model": it.expected.model})
    _equal(f"status for {len(batch)} texts", answer.status, 422)
    return f"422 for {len(batch)} texts"


def key(it: Service) -> str:
    """A wrong key is refused with 401, where one is asked for."""
    body = {"input": "a", "model": it.expected.model}
    answer = it.endpoint.request("/v1/embeddings", body, key="not-the-key")
    if not it.expected.api_key:
        _equal("status with any key", answer.status, 200)
        raise Skipped("no key is asked for")
    _equal("status with a wrong key", answer.status, 401)
    return "401 for a wrong key"


def metrics(it: Service) -> str:
    """/metrics has what the dashboard and the alerts read."""
    text = it.endpoint.request("/metrics").expect(200).body.decode("utf-8", "replace")
    found = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    missing = [name for name in METRICS if name not in found]
    if missing:
        raise Failed(f"there is no {', '.join(missing)}")
    return f"{len(METRICS)} names"


CHECKS: tuple[tuple[str, Callable[[Service], str]], ...] = (
    ("health", health),
    ("model", info),
    ("embedding", embedding),
    ("base64", encodings),
    ("order", order),
    ("equal", equal),
    ("too long", too_long),
    ("at limit", at_limit),
    ("at half", at_half),
    ("beside", beside),
    ("at once", at_once),
    ("too many", too_many),
    ("key", key),
    ("metrics", metrics),  # last: the others are the first use of what it looks for
)


def _equal(name: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{name} is {found}, not {wanted}")


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--public", action="store_true", help="URL is routed for the API alone")
    given, expected, endpoint = begin(parser, arguments)
    service = Service.of(endpoint, expected)
    inside = ("health", "model", "metrics")
    checks = [row for row in CHECKS if not (given.public and row[0] in inside)]
    if given.public:
        checks.insert(0, ("edge", edge))
    return run(endpoint, [(name, partial(check, service)) for name, check in checks])


if __name__ == "__main__":
    sys.exit(main())
