"""The real TEI in tests: its CPU program, where this machine has one, served over loopback.

The program is $TEI_ROUTER (without our edits) or $TEI_ROUTER_EDITED (with them), else the one that an
earlier run left in the tests' cache: tei/<first twelve of the commit>/{plain,edited} in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo.registry import free_port

from .containers.engine import CACHE

ROOT = Path(__file__).parent.parent
LEFT_OUT = "TEI for this CPU is not there: TEI_ROUTER names its program, TEI_ROUTER_EDITED one with our edits"


def commit() -> str:
    """The default `tei_ref`, as copier.yml has it."""
    found = re.search(r"^  default: ([0-9a-f]{40})$", (ROOT / "copier.yml").read_text(), re.M)
    assert found
    return found[1]


def router(edited: bool = False) -> Path | None:
    """TEI's program of the default commit, with or without our edits; None where there is none."""
    named = os.environ.get("TEI_ROUTER_EDITED" if edited else "TEI_ROUTER")
    kept = CACHE / "tei" / commit()[:12] / ("edited" if edited else "plain")
    program = Path(named) if named else kept / "text-embeddings-router"
    return program if os.access(program, os.X_OK) else None


@dataclass(frozen=True, slots=True)
class Server:
    """A TEI that serves."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def request(
        self,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> tuple[int, bytes]:
        """Status and body of a GET, or of a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(  # the address is this process's own
            self.url + path, data, {"Content-Type": "application/json"} | dict(headers or {})
        )
        try:
            with urllib.request.urlopen(asked, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str, body: object = None) -> Any:
        """The answer, which must be a 200."""
        status, answer = self.request(path, body)
        assert status == 200, f"{path} answers {status}: {answer[:300]!r}"
        return json.loads(answer)

    def embed(self, *texts: str) -> list[list[float]]:
        """One vector per text, in one request to /v1/embeddings."""
        rows = self.json("/v1/embeddings", {"input": list(texts), "model": "any"})["data"]
        return [row["embedding"] for row in rows]


class NotServing(AssertionError):
    """TEI ended, or did not answer in time; the message ends with its last lines."""


@contextmanager
def serving(
    folder: Path,
    *flags: str,
    program: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
) -> Iterator[Server]:
    """Run TEI on a model folder until the block ends.

    Args:
        flags: beside --model-id, --hostname and --port.
        program: `router()` where none is given.
        seconds: to its first answer.
    Raises: NotServing.
    """
    program = program or router()
    assert program, LEFT_OUT
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program, "--model-id", folder, "--hostname", "127.0.0.1", "--port", str(port)]
    # A model that TEI does not find as a folder, it would look for on the Hub.
    own = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"} | dict(environment or {})
    with TemporaryDirectory() as temporary:
        log = Path(temporary) / "tei.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*map(str, command), *flags], env=own, cwd=temporary, stdout=output, stderr=output
            )
        try:
            _wait(process, url, log, seconds)
            yield Server(url, process, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotServing(f"TEI ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.05)
    raise NotServing(f"TEI does not answer after {seconds} s:\n{log.read_text()[-2000:]}")
