"""What smoke.py and parity.py share: what is expected, how checks run, what is printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

from endpoint import Endpoint, Failed, Stopped, base_url, header_key

LARGEST = 1_000_000
"""Of what counts tokens, texts or seconds."""


class Skipped(Exception):
    """A check has nothing to look at."""


@dataclass(frozen=True)
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
    gpu: bool = False
    version: str | None = None
    weights: dict[str, str] | None = None
    """SHA-256 of each weight file that TEI reads as it was registered."""

    @classmethod
    def read(cls, path: Path) -> Expected:
        """Leaves out what it does not know; raises ValueError when the file cannot be used."""
        said = mapping(path)
        known = {f.name: said[f.name] for f in fields(cls) if f.name in said}
        counts = ("max_input_tokens", "max_client_batch_size", "request_seconds")
        try:
            expected = cls(**known)
        except TypeError as error:
            raise ValueError(str(error).partition(" ")[2]) from None
        if any(type(known[n]) is not int or not 0 < known[n] <= LARGEST for n in counts):
            raise ValueError(f"{', '.join(counts)} must be whole numbers from 1 to {LARGEST}")
        if not isinstance(expected.model, str):
            raise ValueError("model must be a text")
        return expected


Check = Callable[[], str]
"""Returns what it found, for people; raises Failed, Stopped or Skipped."""


def mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror or "it cannot be read") from None
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(said, dict):
        raise ValueError("it is no JSON object")
    return said


class CannotBegin(Exception):
    """There is nothing to check, or no way to."""


def begin(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Expected, Endpoint]:
    """Read the arguments and the key, wait for the service; raises CannotBegin."""
    url = os.environ.get("SMOKE_URL", "http://127.0.0.1:8355")
    parser.add_argument(
        "--url", default=url, help="of the service [SMOKE_URL, else port 8355 here]"
    )
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
    except ValueError as error:
        raise CannotBegin(f"{given.expected} cannot be used: {error}") from None
    try:
        url = base_url(given.url)
        key = header_key(os.environ.get("API_KEY", "")) if expected.api_key else None
    except ValueError as error:
        raise CannotBegin(str(error)) from None
    endpoint = Endpoint(url, key, expected.model, expected.request_seconds)
    _wait(endpoint, given.wait)
    say(endpoint, f"{url} as {expected.model}")
    return given, expected, endpoint


def program(main: Callable[..., int]) -> Callable[..., int]:
    """Its exit code, also where it cannot begin, is interrupted, or nobody reads what it prints."""

    @wraps(main)
    def run(arguments: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know a letter
        try:
            return main(arguments)
        except CannotBegin as reason:
            name = Path(main.__globals__["__file__"]).stem
            print(f"{name}: {_shown(str(reason))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return run


def run(endpoint: Endpoint, checks: Iterable[tuple[str, Check]]) -> int:
    """Runs them, a line each; after one that says Stopped the others are not tried.

    Returns: the exit code.
    """
    failed, stopped = 0, ""
    for name, check in checks:
        if stopped:
            verdict, detail = "skip", stopped
        else:
            verdict, detail, stopped = _tried(name, check)
        failed += verdict == "FAIL"
        say(endpoint, f"  {verdict:4}  {name:9}  {detail}")
    say(endpoint, f"{failed} failed" if failed else "all is as it should be")
    return 1 if failed else 0


def say(endpoint: Endpoint, text: str) -> None:
    """Print one line, in which the key is never, whoever put it there."""
    print(_shown(text.replace(endpoint.key, "<the key>") if endpoint.key else text), flush=True)


def _tried(name: str, check: Check) -> tuple[str, str, str]:
    """(verdict, detail, why the others are not tried)."""
    try:
        return "ok", check(), ""
    except Stopped as failure:
        return "FAIL", str(failure), f"after `{name}` failed"
    except Failed as failure:
        return "FAIL", str(failure), ""
    except Skipped as reason:
        return "skip", str(reason), ""
    except Exception as error:  # an answer that nobody thought of is the answer's fault
        return "FAIL", f"the answer is not as TEI's ({type(error).__name__})", ""


def _shown(text: str) -> str:
    """One line that a terminal only shows."""
    line = text if len(text) <= 400 else text[:400] + "…"
    return "".join(c if c.isprintable() else " " for c in line).rstrip()


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
