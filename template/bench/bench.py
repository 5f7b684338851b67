"""Measure a running endpoint under load: `make bench URL=http://…`, `make bench RATE=200`.

Closed loop: so many clients at a time, each sends its next request when it has its answer. The texts
are words at random, as many as make the wanted number of tokens in this service's own count.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import report

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "smoke"))

from checks import Expected, mapping  # noqa: E402
from endpoint import Endpoint, Failed, base_url, header_key  # noqa: E402

RESULTS = HERE / "results"
CONCURRENCY = (1, 2, 4, 8, 16, 32)
TEXT = (
    "river mountain garden window letter market winter summer paper music bread stone water light "
    "house street doctor teacher engine bridge forest island morning evening number question answer"
)
WORDS = TEXT.split()
LONGEST_ANSWER = 64 << 20
"""Bytes; a batch of 512 vectors of 4,096 numbers in base64 is 11 MB."""
LIMITS = ("max_input_length", "max_batch_tokens", "max_client_batch_size")
SAID = ("version", "sha", "docker_label", "model_dtype", *LIMITS)
PLOTS = {
    "texts_s": "texts a second",
    "tokens_s": "tokens a second",
    "p50_ms": "p50, milliseconds",
    "p99_ms": "p99, milliseconds",
}


class BenchError(Exception):
    """Ends the run with one line."""


class Connection:
    """A kept-alive connection for /v1/embeddings; an endpoint of `smoke` opens one a request."""

    def __init__(self, endpoint: Endpoint) -> None:
        parts = urlsplit(endpoint.url)
        self.path = f"{parts.path}/v1/embeddings"
        self.headers = {"Content-Type": "application/json"}
        if endpoint.key:
            self.headers["Authorization"] = f"Bearer {endpoint.key}"
        host, port, timeout = parts.hostname or "", parts.port, endpoint.timeout
        if parts.scheme == "https":
            context = ssl.create_default_context()
            self.http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout, context=context
            )
        else:
            self.http = http.client.HTTPConnection(host, port, timeout=timeout)

    def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body; after an error the next call connects anew."""
        try:
            self.http.request("POST", self.path, body, self.headers)
            answer = self.http.getresponse()
            return answer.status, answer.read(LONGEST_ANSWER)
        except (OSError, http.client.HTTPException):
            self.http.close()
            raise


def one_line(text: object) -> str:
    """Printable, and short."""
    words = str(getattr(text, "strerror", None) or text or type(text).__name__).split()
    return "".join(c for c in " ".join(words) if c.isprintable())[:200]


def facts(endpoint: Endpoint, expected: Expected) -> dict[str, Any]:
    """What /info says, held against what this repository serves."""
    info = endpoint.request("/info").expect(200).mapping()
    if any(type(info.get(name)) is not int or info[name] < 1 for name in LIMITS):
        raise BenchError("/info is not that of an embeddings service")
    if info.get("served_model_name") != expected.model:
        served = one_line(info.get("served_model_name"))
        raise BenchError(f"{served} is served there, not {expected.model}")
    return info


def tokens_per_word(endpoint: Endpoint) -> float:
    """Of the words that the texts are made of, in this service's count."""
    tokens = endpoint.embed([TEXT]).tokens
    if not tokens:
        raise BenchError("/v1/embeddings does not say how many tokens it read")
    return max(1.0, tokens / len(WORDS))


def text_of(tokens: int, per_word: float, chance: random.Random) -> str:
    """Words at random of about so many tokens."""
    return " ".join(chance.choices(WORDS, k=max(1, round(tokens / per_word))))


def makers(longest: int, per_word: float) -> dict[str, Callable[[random.Random], str]]:
    """Name of a length -> a maker of texts."""
    short = min(32, longest)

    def mixed(chance: random.Random) -> str:
        # Most are short, few are long: lengths spread evenly over their logarithm.
        return text_of(round(short * (longest / short) ** chance.random()), per_word, chance)

    return {
        "short": lambda chance: text_of(short, per_word, chance),
        "mixed": mixed,
        "longest": lambda chance: text_of(longest, per_word, chance),
    }


@dataclass
class Point:
    """What the clients of one point of the sweep have seen."""

    answers: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, texts and tokens of each answered request."""

    refused: int = 0
    failed: int = 0
    wrong: str = ""
    """The first thing that went wrong."""

    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, took: float, batch: int, status: int, said: bytes) -> bool:
        """Count an answer; returns whether it was a right one."""
        found = re.search(rb'"prompt_tokens":\s*(\d{1,9})\b', said) if status == 200 else None
        with self.lock:
            if found:
                self.answers.append((took, batch, int(found[1])))
            elif status == 429:
                self.refused += 1
        if not found and status != 429:
            self.fail(f"status {status}: {one_line(said[:200].decode(errors='replace'))}")
        return found is not None

    def fail(self, why: str) -> None:
        """Count a request without an answer."""
        with self.lock:
            self.failed += 1
            self.wrong = self.wrong or why


def measure(
    endpoint: Endpoint,
    make: Callable[[random.Random], str],
    concurrency: int,
    batch: int,
    seconds: float,
) -> tuple[Point, float]:
    """Send from `concurrency` clients for `seconds`; returns what they saw and how long it took."""
    point = Point()
    started = time.monotonic()

    def client(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        connection = Connection(endpoint)
        while time.monotonic() - started < seconds:
            texts = [make(chance) for _ in range(batch)]
            body = {"model": endpoint.model, "input": texts, "encoding_format": "base64"}
            data = json.dumps(body).encode()
            begun = time.monotonic()
            try:
                status, said = connection.post(data)
                right = point.add(time.monotonic() - begun, batch, status, said)
            except (OSError, http.client.HTTPException) as error:
                point.fail(one_line(error))
                right = False
            if not right:
                time.sleep(0.1)
        connection.http.close()

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return point, time.monotonic() - started


def sweep(endpoint: Endpoint, info: Mapping[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Every length at every concurrency, after a warm-up."""
    per_word = tokens_per_word(endpoint)
    batch = min(given.batch, info["max_client_batch_size"])
    rows = []
    cpu, clock = time.process_time(), time.monotonic()
    for name, make in makers(info["max_input_length"], per_word).items():
        measure(endpoint, make, 1, batch, min(2.0, given.seconds))
        best = 0.0
        for concurrency in (n for n in CONCURRENCY if n <= given.most):
            point, took = measure(endpoint, make, concurrency, batch, given.seconds)
            if not point.answers:
                why = point.wrong or "every request was refused"
                raise BenchError(f"nothing was answered ({name}, {concurrency} at a time): {why}")
            row = report.summary(name, concurrency, point.answers, took)
            rows.append(row | {"refused": point.refused, "failed": point.failed})
            rate = f"{row['texts_s']:.1f} texts/s, p99 {row['p99_ms']:.0f} ms"
            print(f"  {name}, {concurrency} at a time: {rate}", file=sys.stderr, flush=True)
            # Twice as many clients that bring nothing more only make a queue.
            if concurrency >= 8 and row["texts_s"] < 1.05 * best:
                break
            best = max(best, row["texts_s"])
    share = (time.process_time() - cpu) / (time.monotonic() - clock)
    return {"rows": rows, "batch": batch, "seconds": given.seconds, "client_cpu_share": share}


def earlier(model: str, named: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The newest result of this model, or the one that is named."""
    for path in [named] if named else sorted(RESULTS.glob("*.json"), reverse=True):
        try:
            result = mapping(path)
            if result["model_id"] == model and report.comparison(result, result) is not None:
                return path, result
        except (ValueError, KeyError, TypeError):
            pass
    if named:
        raise BenchError(f"{named} is no result of {model}")
    return None


def run(given: argparse.Namespace) -> None:
    """Measure, write, and say."""
    expected = Expected.read(HERE.parent / "smoke" / "expected.json")
    key = header_key(os.environ["API_KEY"]) if os.environ.get("API_KEY") else None
    url = base_url(given.url).removesuffix("/v1")
    endpoint = Endpoint(url, key, expected.model, given.timeout)
    info = facts(endpoint, expected)
    before = earlier(expected.model, given.against)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model_id": expected.model,
        "version": expected.version,
        "accelerator": given.accelerator,
        "info": {name: info.get(name) for name in SAID},
        **sweep(endpoint, info, given),
    }
    parts = (expected.model.split("/")[-1], f"v{expected.version}", given.accelerator)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join((result["date"].replace(":", ""), *parts)))
    RESULTS.mkdir(exist_ok=True)
    for value, title in PLOTS.items():
        plot = report.plot(result["rows"], value, f"{expected.model}: {title}")
        (RESULTS / f"{stem}-{value}.svg").write_text(plot)
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report.table(result["rows"]), *report.advice(result, given.rate), sep="\n")
    if before:
        print(f"\nAgainst {before[0].name}:", *report.comparison(before[1], result), sep="\n")
    print(f"\nbench/results/{stem}.json and the plots beside it hold all of it.")


def positive(text: str) -> float:
    """A number above zero; ValueError makes argparse say what was wrong."""
    number = float(text)
    if not 0 < number < 1e9:
        raise ValueError
    return number


def main() -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8355")
    parser.add_argument("--accelerator", default="unknown", help="for the result's name")
    parser.add_argument("--rate", type=positive, help="texts a second that are wanted")
    parser.add_argument("--seconds", type=positive, default=10.0, help="of each point")
    parser.add_argument("--most", type=int, choices=range(1, 513), metavar="N", default=32)
    parser.add_argument(
        "--batch", type=int, choices=range(1, 513), metavar="N", default=8, help="texts per request"
    )
    parser.add_argument("--timeout", type=positive, default=300.0, help="seconds for one answer")
    parser.add_argument("--against", type=Path, help="a result to compare with; else the last")
    try:
        run(parser.parse_args())
    except (BenchError, Failed, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
