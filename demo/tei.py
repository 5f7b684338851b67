"""TEI on loopback, over a model folder: for the demonstration, and for the tests.

It is a program ($TEI_ROUTER), an image ($TEI_IMAGE), or Hugging Face's own image for this CPU where a
container engine is there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .registry import free_port

PROGRAM = "text-embeddings-router"


class NotServing(RuntimeError):
    """TEI ended, or did not answer in time; the message ends with its last lines."""


@dataclass(frozen=True, slots=True)
class Tei:
    """How TEI is started here."""

    shown: str
    """What it is, for a person."""

    program: str | None = None
    """A binary for this machine."""

    engine: str | None = None
    image: str | None = None
    """Otherwise an image, and the engine that runs it."""

    def command(self, name: str, folder: Path, port: int, flags: Sequence[str]) -> list[str]:
        """The command that serves `folder` at `port`; `name` is that of a container."""
        own = ["--hostname", "127.0.0.1" if self.program else "::", "--port", str(port)]
        if self.program:
            return [self.program, "--model-id", str(folder), *own, *flags]
        assert self.engine
        assert self.image
        return [
            *(self.engine, "run", "--rm", "--name", name, "--read-only", "--cap-drop=ALL"),
            *("--tmpfs=/tmp", "-p", f"127.0.0.1:{port}:{port}"),
            *("-v", f"{folder.resolve()}:/model:ro", self.image, "--model-id", "/model"),
            *own,
            *flags,
        ]


def find(official: Mapping[str, str]) -> Tei | str:
    """What can serve here, or what is missing, in two lines.

    Args: official: Hugging Face's image per platform (`linux/amd64`), as accelerators.yaml has it.
    """
    if program := os.environ.get("TEI_ROUTER"):
        if not os.access(program, os.X_OK):
            raise RuntimeError(f"TEI_ROUTER names {program}, which is no program")
        return Tei(program, program=program)
    engine = next((e for e in ("docker", "podman") if works(e)), None)
    image = os.environ.get("TEI_IMAGE")
    if image and not engine:
        raise RuntimeError("TEI_IMAGE is set, but no docker or podman answers here")
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    image = image or official.get(f"linux/{machine}")
    if engine and image:
        return Tei(f"{image} ({engine})", engine=engine, image=image)
    return (
        f"Nothing here runs TEI: no container engine answers, and TEI_ROUTER names no {PROGRAM}.\n"
        "With Docker or Podman running, `make demo` goes on to vectors."
    )


def works(engine: str) -> bool:
    """Whether an engine is installed and answers."""
    if shutil.which(engine) is None:
        return False
    try:
        done = subprocess.run([engine, "version"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class Server:
    """A TEI that serves."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def serving(
    tei: Tei,
    folder: Path,
    flags: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float = 120,
) -> Iterator[Server]:
    """Run TEI on a model folder until the block ends.

    Args:
        flags: beside --model-id, --hostname and --port.
        environment: more variables for a program.
        seconds: to its first answer; an image is brought before.
    Raises: NotServing.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    name = f"demo-tei-{os.getpid()}"
    # TEI reads a variable for each of its flags, and looks for what is no folder on the Hub.
    clean = {"PATH": os.environ.get("PATH", ""), "HF_HUB_OFFLINE": "1"}
    own = dict(os.environ) if tei.engine else clean | dict(environment or {})
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "tei.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                tei.command(name, folder, port, flags),
                env=own,
                cwd=temporary,
                stdout=output,
                stderr=output,
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
            if tei.engine:
                subprocess.run([tei.engine, "rm", "-f", name], capture_output=True, check=False)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise NotServing(f"TEI ended with {process.returncode}:\n{_last(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.05)
    raise NotServing(f"TEI does not answer after {seconds:.0f} s:\n{_last(log)}")


def _last(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-2000:]
