"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import __version__
from .console import Console, termination_message
from .failures import (
    INTERNAL,
    ConfigurationError,
    Interrupted,
    TemplateError,
    exit_code,
    from_os_error,
)
from .lock import LockLost
from .pin import Pin
from .run import Outcome, make_ready
from .settings import MIB, Settings
from .stop import Stop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    arguments = _parser(os.environ).parse_args(argv)
    console = Console(arguments.log_format)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set(Interrupted("stopped by a signal")))
    termination = Path(arguments.termination_log) if arguments.termination_log else None
    try:
        pin = _read_pin(Path(arguments.pin))
        outcome = _until_ready(pin, _settings(arguments), console, stop)
    except Exception as error:
        return _fail(error, console, termination, debug=arguments.debug)
    text = outcome.summary(pin)
    console.info(text, bytes=outcome.bytes, received=outcome.received, folder=str(outcome.folder))
    termination_message(termination, text)
    return 0


def _until_ready(pin: Pin, settings: Settings, console: Console, stop: Stop) -> Outcome:
    return make_ready(pin, settings, console, stop)


def _fail(
    error: Exception, console: Console, termination: Path | None, debug: bool
) -> int:
    if isinstance(error, OSError):
        error = from_os_error(error)
    if isinstance(error, TemplateError):
        text = str(error)
    else:
        text = f"internal error ({type(error).__name__}): run again with --debug and report it"
        if debug:
            raise error
    console.error(text, exit_code=exit_code(error))
    termination_message(termination, text)
    return exit_code(error)


def _read_pin(path: Path) -> Pin:
    try:
        mapping = json.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}): mount the pin there") from None
    except ValueError:
        raise ConfigurationError(f"{path} is no JSON: it must hold the pin") from None
    return Pin.from_mapping(mapping)


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        cache=Path(arguments.cache) if arguments.cache else None,
        link=Path(arguments.link),
        mount=Path(arguments.mount) if arguments.mount else None,
        environ=os.environ,
        connections=arguments.connections,
        chunk_size=int(arguments.chunk_size * MIB),
    )


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="model-fetch")

    def option(name: str, default: object = None, **more: object) -> None:
        variable = "MODEL_FETCH_" + name.upper().replace("-", "_")
        parser.add_argument(f"--{name}", default=environ.get(variable, default), **more)

    option("pin", "/etc/model/pin.json")
    option("cache", "/cache")
    option("link", "/model/current")
    option("mount")
    option("connections", 8, type=int)
    option("chunk-size", 16, type=float)
    option("log-format", "text")
    option("termination-log", "/dev/termination-log")
    parser.add_argument("--debug", action="store_true")
    return parser
