"""Measure a running endpoint under load: `make bench URL=http://…`, `make bench RATE=200`.

Closed loop: so many clients at a time, each sends its next request when it has its answer. The texts
are words at random, as many as make the wanted number of tokens in this service's own count. What the
field's load tools lack for embeddings stands in README.md.
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
from urllib.parse import SplitResult, urlsplit

import report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CONCURRENCY = (1, 2, 4, 8, 16, 32)
WORDS = (
    "river mountain garden window letter market winter summer paper music bread stone water light "
    "house street doctor teacher engine bridge forest island morning evening number question answer"
).split()
LONGEST_ANSWER = 64_000_000
"""Bytes; a vector of 4,096 numbers is about 50,000 as JSON."""


class BenchError(Exception):
    """Ends the run with one line."""


@dataclass(frozen=True, slots=True)
class Service:
    """Where requests go."""

    address: SplitResult
    key: str | None
    seconds: float

    def connect(self) -> http.client.HTTPConnection:
        host, port = self.address.hostname or "", self.address.port
        if self.address.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self.seconds, context=context)
        return http.client.HTTPConnection(host, port, timeout=self.seconds)

    def send(
        self, connection: http.client.HTTPConnection, path: str, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        whole = self.address.path.rstrip("/") + path
        connection.request("GET" if body is None else "POST", whole, body, headers)
        answer = connection.getresponse()
        said = answer.read(LONGEST_ANSWER + 1)
        if len(said) > LONGEST_ANSWER:
            raise BenchError(f"{path} answers more than {LONGEST_ANSWER:,} bytes")
        return answer.status, said

    def ask(self, path: str, body: object = None) -> Any:
        """The JSON of an answer that must be a 200."""
        data = None if body is None else json.dumps(body).encode()
        connection = self.connect()
        try:
            status, said = self.send(connection, path, data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BenchError(f"{self.address.netloc} does not answer: {one_line(error)}") from None
        finally:
            connection.close()
        if status == 401:
            raise BenchError("API_KEY is not the key of the service" if self.key else "set API_KEY")
        if status != 200:
            raise BenchError(f"{path} answers {status}: {one_line(said.decode(errors='replace'))}")
        try:
            return json.loads(said)
        except (ValueError, RecursionError):
            raise BenchError(
                f"{self.address.netloc} is no embeddings service: {path} is no JSON"
            ) from None


def one_line(text: object) -> str:
    """Printable, and short."""
    words = str(getattr(text, "strerror", None) or text or type(text).__name__).split()
    return "".join(c for c in " ".join(words) if c.isprintable())[:200]


def facts(service: Service, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What /info says, held against what this repository serves."""
    info = service.ask("/info")
    numbers = ("max_input_length", "max_batch_tokens", "max_client_batch_size")
    if not isinstance(info, dict) or any(type(info.get(n)) is not int for n in numbers):
        raise BenchError(
            f"{service.address.netloc} is no embeddings service: /info says something else"
        )
    served = info.get("served_model_name")
    if served != expected["model_id"]:
        raise BenchError(
            f"{service.address.netloc} serves {one_line(served)}, not {expected['model_id']}"
        )
    return info


def tokens_per_word(service: Service, model: str) -> float:
    """Of the words that the texts are made of, in this service's count."""
    said = service.ask("/v1/embeddings", {"model": model, "input": " ".join(WORDS)})
    try:
        return max(1.0, int(said["usage"]["prompt_tokens"]) / len(WORDS))
    except (KeyError, TypeError, ValueError):
        raise BenchError("/v1/embeddings does not say how many tokens it read") from None


def text_of(tokens: int, per_word: float, chance: random.Random) -> str:
    """Words at random of about so many tokens."""
    return " ".join(chance.choices(WORDS, k=max(1, round(tokens / per_word))))


def plans(longest: int, per_word: float) -> dict[str, Callable[[random.Random], str]]:
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
    """What the clients of one point have seen."""

    answers: list[tuple[float, int, int]] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    wrong: str = ""
    last: float = 0.0


def measure(
    service: Service,
    model: str,
    make: Callable[[random.Random], str],
    concurrency: int,
    batch: int,
    seconds: float,
) -> tuple[Point, float]:
    """Send from `concurrency` clients for `seconds`; returns what they saw and how long it took."""
    point, lock = Point(), threading.Lock()
    started = time.monotonic()
    end = started + seconds

    def client(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        connection = service.connect()
        while time.monotonic() < end:
            texts = [make(chance) for _ in range(batch)]
            body = {"model": model, "input": texts, "encoding_format": "base64"}
            data = json.dumps(body).encode()
            begun = time.monotonic()
            try:
                status, said = service.send(connection, "/v1/embeddings", data)
            except (OSError, http.client.HTTPException, BenchError) as error:
                connection.close()
                connection = service.connect()
                with lock:
                    point.failed += 1
                    point.wrong = point.wrong or one_line(error)
                time.sleep(0.1)
                continue
            done = time.monotonic()
            found = re.search(rb'"prompt_tokens":\s*(\d+)', said) if status == 200 else None
            with lock:
                if found:
                    point.answers.append((done - begun, batch, int(found[1])))
                    point.last = max(point.last, done)
                elif status == 429:
                    point.refused += 1
                else:
                    point.failed += 1
                    point.wrong = (
                        point.wrong
                        or f"status {status}: {one_line(said[:200].decode(errors='replace'))}"
                    )
            if not found:
                time.sleep(0.1)
        connection.close()

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return point, max(point.last, end if not point.answers else point.last) - started


def sweep(
    service: Service, model: str, info: Mapping[str, Any], given: argparse.Namespace
) -> dict[str, Any]:
    """Every length at every concurrency, after a warm-up."""
    per_word = tokens_per_word(service, model)
    batch = min(given.batch, int(info["max_client_batch_size"]))
    rows = []
    cpu, clock = time.process_time(), time.monotonic()
    for name, make in plans(int(info["max_input_length"]), per_word).items():
        measure(service, model, make, 1, batch, min(2.0, given.seconds))
        best = 0.0
        for concurrency in CONCURRENCY:
            point, took = measure(service, model, make, concurrency, batch, given.seconds)
            row = report.summary(name, concurrency, point.answers, took)
            rows.append(row | {"refused": point.refused, "failed": point.failed})
            if not point.answers:
                raise BenchError(
                    f"nothing was answered ({name}, {concurrency} at a time): {point.wrong or 'too slow, try SECONDS=60'}"
                )
            print(
                f"  {name}, {concurrency} at a time: {row['texts_s']:.1f} texts/s, p99 {row['p99_ms']:.0f} ms",
                file=sys.stderr,
                flush=True,
            )
            # Twice as many clients that bring nothing more only make a queue.
            if concurrency >= 8 and row["texts_s"] < 1.05 * best:
                break
            best = max(best, row["texts_s"])
    share = (time.process_time() - cpu) / (time.monotonic() - clock)
    return {
        "rows": rows,
        "batch": batch,
        "seconds": given.seconds,
        "client_cpu_share": round(share, 3),
    }


def earlier(model: str, path: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The newest result of this model, or the one that is named."""
    paths = [path] if path else sorted(RESULTS.glob("*.json"), reverse=True)
    for one in paths:
        try:
            result = json.loads(one.read_text())
            same = result["model_id"] == model and isinstance(result["rows"], list)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            same = False
        if same:
            return one, result
        if path:
            raise BenchError(f"{path} is no result of {model}")
    return None


def file_name(result: Mapping[str, Any]) -> str:
    """DATE-model-version-accelerator."""
    parts = (
        result["date"].replace(":", ""),
        result["model_id"].split("/")[-1],
        f"v{result['version']}",
        result["accelerator"],
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))


def address(url: str) -> SplitResult:
    """A service's address; argparse tells what is wrong with another."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or "@" in parts.netloc:
        raise argparse.ArgumentTypeError(
            "give an address such as http://127.0.0.1:8355, without a login"
        )
    return parts._replace(path=parts.path.rstrip("/").removesuffix("/v1"), query="", fragment="")


def positive(text: str) -> float:
    """A number above zero."""
    number = float(text)
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError("a number above 0")
    return number


def run(given: argparse.Namespace) -> None:
    """Measure, write, and say."""
    expected = json.loads((HERE / "expected.json").read_text())
    key = os.environ.get("API_KEY", "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise BenchError("API_KEY holds characters that no header can carry")
    service = Service(given.url, key, seconds=given.timeout)
    info = facts(service, expected)
    before = earlier(expected["model_id"], given.against)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **{name: expected[name] for name in ("model_id", "version", "accelerator")},
        "info": {
            n: info.get(n)
            for n in (
                "version",
                "sha",
                "docker_label",
                "model_dtype",
                "max_input_length",
                "max_batch_tokens",
                "max_client_batch_size",
            )
        },
        **sweep(service, expected["model_id"], info, given),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{file_name(result)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for value, title in (
        ("texts_s", "texts a second"),
        ("tokens_s", "tokens a second"),
        ("p50_ms", "p50, milliseconds"),
        ("p99_ms", "p99, milliseconds"),
    ):
        path.with_name(f"{path.stem}-{value}.svg").write_text(
            report.plot(result["rows"], value, f"{result['model_id']}: {title}")
        )
    print(report.table(result["rows"]))
    print()
    print("\n".join(report.advice(result, given.rate)))
    if before:
        print(f"\nAgainst {before[0].name}:")
        print("\n".join(report.comparison(before[1], result)) or "no point in common")
    print(f"\n{path.relative_to(HERE.parent)} and its plots hold all of it.")


def main() -> int:
    """Returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", type=address, default=address("http://127.0.0.1:8355"))
    parser.add_argument("--rate", type=positive, help="texts a second that are wanted")
    parser.add_argument("--seconds", type=positive, default=10.0, help="of each point")
    parser.add_argument(
        "--batch", type=int, choices=range(1, 513), metavar="N", default=8, help="texts per request"
    )
    parser.add_argument("--timeout", type=positive, default=300.0, help="seconds for one answer")
    parser.add_argument(
        "--against", type=Path, help="a result to compare with; by default the last"
    )
    try:
        run(parser.parse_args())
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
