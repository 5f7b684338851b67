"""The real TEI in tests: its CPU program, where this machine has one, served over loopback.

The program is $TEI_ROUTER (without our edits) or $TEI_ROUTER_EDITED (with them), else the one that an
earlier run left in the tests' cache: tei/<first twelve of the commit>/{plain,edited} in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import tei
from demo.tei import NotServing

from .containers.engine import CACHE

__all__ = ["LEFT_OUT", "NotServing", "Server", "commit", "router", "serving"]

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
    how = tei.Tei(str(program), program=str(program))
    with tei.serving(how, folder, flags, environment=environment, seconds=seconds) as server:
        yield Server(server.url, server.process, server.log)
