"""Runs of the program, as a pod makes them, and what they must leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .models import PinnedModel, contents

PACKAGE = Path(__file__).resolve().parents[2]
SMALL = ("--chunk-size", "0.125", "--connections", "4", "--lease", "2", "--no-sync")
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 9, 143}


@dataclass(frozen=True)
class Run:
    code: int
    log: str

    @property
    def last(self) -> str:
        """The last line of the log."""
        return self.log.rstrip("\n").rpartition("\n")[2]


class Pod:
    """A cache volume, a link and a pin: what one init container sees."""

    def __init__(self, folder: Path, cache: Path | None = None, user: int | None = None) -> None:
        """user: whose processes they are; None for the tests' own"""
        self.folder, self.user = folder, user
        self.cache = cache or folder / "cache"
        self.link = folder / "model" / "current"
        self.pin_file = folder / "pin.json"
        self.termination = folder / "termination-log"
        folder.mkdir(parents=True, exist_ok=True)

    def command(self, pin: PinnedModel | Mapping[str, Any], *options: str) -> list[str]:
        mapping = pin.pin() if isinstance(pin, PinnedModel) else pin
        self.pin_file.write_text(json.dumps(mapping))
        return [
            *(sys.executable if self.user is None else python_for(self.user), "-m", "model_fetch"),
            *("--pin", str(self.pin_file), "--cache", str(self.cache), "--link", str(self.link)),
            *("--termination-log", str(self.termination), *SMALL, *options),
        ]

    def environment(self, url: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """A clean environment: nothing of the developer's own credentials or proxies."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        tracking = {"MLFLOW_TRACKING_URI": url} if url else {}
        return {**kept, "PYTHONPATH": str(PACKAGE), **tracking, **(more or {})}

    def start(
        self,
        pin: PinnedModel | Mapping[str, Any],
        url: str | None,
        *options: str,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(pin, *options),
            env=self.environment(url, env),
            cwd=self.folder,
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else [],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        pin: PinnedModel | Mapping[str, Any],
        url: str | None,
        *options: str,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Run:
        process = self.start(pin, url, *options, env=env)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return Run(process.returncode, output)

    def version_folder(self, version: str = "3") -> Path:
        return self.cache / "acme-tiny" / version

    def holds(self, model: PinnedModel) -> bool:
        """Whether the link leads to a folder with exactly the pinned bytes."""
        return self.link.is_dir() and contents(self.link.resolve()) == dict(model.files)

    def looks_complete(self, version: str = "3") -> bool:
        return self.version_folder(version).exists() or self.link.exists()


@cache
def python_for(user: int) -> str:
    """An interpreter that another user may run; skips the test where there is none."""
    if os.geteuid() != 0:
        pytest.skip("only root can run the program as another user")
    check = f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); import model_fetch.run"
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run(
                [python, "-c", check], check=True, capture_output=True, user=user, group=user
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip(f"there is no Python here that uid {user} may run")


def assert_ready(run: Run, pod: Pod, model: PinnedModel) -> None:
    """The run succeeded and what it left is byte for byte what was pinned."""
    assert run.code == 0, run.log
    assert pod.holds(model), run.log


def assert_failed(run: Run, pod: Pod, code: int) -> None:
    """The run ended with a documented code and one line, and left nothing that looks complete."""
    assert run.code == code, run.log
    assert code in DOCUMENTED
    assert run.last.startswith("error: "), run.log
    assert "Traceback" not in run.log
    assert not pod.looks_complete()
    assert pod.termination.read_text() == run.last.removeprefix("error: ")
