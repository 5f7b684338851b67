"""The command line: arguments, environment, signals, exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, memory, reading
from .console import Console, one_line, termination_message
from .failures import (
    INTERRUPTED,
    ConfigurationError,
    Interrupted,
    TemplateError,
    exit_code,
    from_memory_error,
    from_os_error,
)
from .pin import Pin
from .run import check, make_ready, resolve
from .settings import MIB, Settings, switched_on
from .stop import Stop

GRACE = 1.5  # seconds from a signal until the process ends, whatever it was doing

DESCRIPTION = """\
Brings the model version that a pin names to a folder that TEI can load, and points a link there.
Nothing is fetched when the version is already whole, or when its store is mounted.
"""

EPILOG = """\
Every option can also be given as an environment variable: --chunk-size as MODEL_FETCH_CHUNK_SIZE.
Addresses and credentials come from the environment alone: MLFLOW_TRACKING_URI with
MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_KEYCLOAK_TOKEN_URL and
_CLIENT_ID with MLFLOW_CLIENT_SECRET, MLFLOW_AUTH_USERNAME and _PASSWORD; MLFLOW_S3_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; MLFLOW_TRACKING_SERVER_CERT_PATH.

exit codes:
  0  the model is ready               6  no space left on the volume
  2  configuration, or no right pin   7  verification failed
  3  not found                        8  waited too long for another process
  4  denied                           9  TEI cannot serve the model
  5  network; trying again may help   70 internal error      143 stopped by a signal
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    arguments = _parser(os.environ).parse_args(argv)
    memory.confine(memory.container_limit())
    console = Console(arguments.log_format)
    termination = Path(arguments.termination_log) if arguments.termination_log else None
    stop = Stop()
    _watch_signals(stop, console, termination)
    try:
        settings = _settings(arguments)
        pin = resolve(_read_pin(Path(arguments.pin)), settings, console)
        if arguments.verify:
            text, fields = check(pin, settings), {}
        else:
            outcome = make_ready(pin, settings, console, stop)
            text = outcome.summary(pin)
            fields = {
                "folder": str(outcome.folder),
                "how": outcome.how,
                "received": outcome.received,
                "seconds": round(outcome.seconds, 3),
            }
    except Exception as error:
        if arguments.debug:
            raise
        return _failed(error, console, termination)
    console.info(text, **fields)
    termination_message(termination, text)
    return 0


def _failed(error: Exception, console: Console, termination: Path | None) -> int:
    """Tells an error in one line; returns its exit code."""
    if isinstance(error, OSError):
        error = from_os_error(error)
    elif isinstance(error, MemoryError):
        error = from_memory_error()
    text = str(error)
    if not isinstance(error, TemplateError):
        text = (
            f"internal error ({type(error).__name__}): run it with --debug and report what it says"
        )
    code = exit_code(error)
    console.error(text, exit_code=code)
    termination_message(termination, text)
    return code


def _watch_signals(stop: Stop, console: Console, termination: Path | None) -> None:
    """Has SIGTERM and SIGINT end the run within two seconds, even out of a call that blocks.

    A thread waits for them, since a handler could interrupt the very lock that it needs. Ending
    hard is harmless: a journal is right at any moment.
    """
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        name = signal.Signals(signal.sigwait(signals)).name
        error = Interrupted(f"stopped by {name}; what has arrived is kept")
        stop.set(error)
        time.sleep(GRACE)
        _failed(error, console, termination)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _read_pin(path: Path) -> Pin:
    try:
        with path.open("rb") as file:
            mapping = reading.document(file.read(reading.LONGEST + 1), "the pin")
    except OSError as error:
        raise ConfigurationError(
            f"the pin {path} cannot be read ({error.strerror}): mount it there or name it with --pin"
        ) from None
    except reading.UnreadableError as error:
        raise ConfigurationError(f"{path}: {error}: render the repository again") from None
    return Pin.from_mapping(mapping)


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        cache=Path(arguments.cache) if arguments.cache else None,
        link=Path(arguments.link),
        mount=Path(arguments.mount) if arguments.mount else None,
        environ=os.environ,
        connections=arguments.connections,
        chunk_size=int(arguments.chunk_size * MIB),
        retries=arguments.retries,
        attempts=arguments.attempts,
        timeout=arguments.timeout,
        lock_timeout=arguments.lock_timeout,
        lease=arguments.lease,
        keep=arguments.keep,
        keep_hours=arguments.keep_hours,
        digests=arguments.digests,
        sync=not arguments.no_sync,
        interval=arguments.interval,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}: see {self.prog} --help\n")


@dataclass(frozen=True, slots=True)
class _Option:
    """An option that can also be given as an environment variable."""

    name: str
    metavar: str
    default: str | None
    help: str
    kind: type = str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] | None = None

    def parse(self, text: str) -> Any:
        """The value of `text`; raises what argparse expects."""
        if self.choices and text not in self.choices:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(self.choices)}")
        if self.kind is str:
            return text
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {_KINDS[self.kind]}") from None
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text} is not from {self.low:g} to {self.high:g}")
        return value


_KINDS: dict[type, str] = {int: "whole number", float: "number"}
_DAY = 86_400.0

OPTIONS: dict[str, tuple[_Option, ...]] = {
    "places": (
        _Option("pin", "FILE", "/etc/model/pin.json", "the pin, a JSON file"),
        _Option("cache", "FOLDER", "/cache", "volume to fetch to; '' when all is mounted"),
        _Option("link", "PATH", "/model/current", "link to the ready model, for TEI"),
        _Option("mount", "FOLDER", None, "where MLflow's artifact store is mounted, if it is"),
    ),
    "transfer": (
        _Option("connections", "N", "8", "connections at a time, at most", int, 1, 64),
        _Option(
            *("chunk-size", "MIB", "16", "size of a request; what a kill can cost per connection"),
            *(float, 1 / 64, 1024),
        ),
        _Option("retries", "N", "8", "failures in a row until a chunk is given up", int, 0, 1000),
        _Option(
            *("attempts", "N", "3", "times to fetch a file whose verification fails"),
            *(int, 1, 100),
        ),
        _Option(
            *("timeout", "S", "60", "seconds without an answer until a connection counts as dead"),
            *(float, 0.1, _DAY),
        ),
        _Option(
            *("digests", "WHEN", "always", "SHA-256 of every file, or where it is pinned alone"),
            choices=("always", "pinned"),
        ),
    ),
    "sharing and pruning": (
        _Option(
            *("lock-timeout", "S", "3600", "seconds to wait for another process that fetches"),
            *(float, 0, 10 * _DAY),
        ),
        _Option(
            *(
                "lease",
                "S",
                "20",
                "seconds without a sign of life until a holder elsewhere is dead",
            ),
            *(float, 0.5, 3600),
        ),
        _Option("keep", "N", None, "other versions to keep; all when not given", int, 0, 1000),
        _Option(
            *("keep-hours", "H", "24", "never prune a version that was started within this time"),
            *(float, 0, 87_600),
        ),
    ),
    "telling": (
        _Option(
            *("log-format", "FORMAT", "text", "lines of text, or of JSON"),
            choices=("text", "json"),
        ),
        _Option("interval", "S", "5", "seconds between two lines of progress", float, 0.1, 3600),
        _Option(
            *("termination-log", "FILE", "/dev/termination-log"),
            "file for the last line, which Kubernetes shows",
        ),
    ),
}
FLAGS = {
    "no-sync": "do not wait for the disk: faster, and not safe against power cuts",
    "debug": "show where an error came from",
}


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="model-fetch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            default = environ.get(_variable(option.name)) or option.default
            try:
                if default:
                    option.parse(default)
            except argparse.ArgumentTypeError as error:
                parser.error(f"{_variable(option.name)}: {error}")
            group.add_argument(
                f"--{option.name}",
                metavar=option.metavar,
                default=default,
                type=option.parse,
                help=option.help + (f" [{option.default}]" if option.default else ""),
            )
    for name, text in FLAGS.items():
        try:
            on = switched_on(environ, _variable(name))
        except ConfigurationError as error:
            parser.error(str(error))
        group.add_argument(f"--{name}", action="store_true", default=on, help=text)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="only read a complete version again and compare its digests",
    )
    parser.add_argument("--version", action="version", version=f"model-fetch {__version__}")
    return parser


def _variable(option: str) -> str:
    return "MODEL_FETCH_" + option.upper().replace("-", "_")


if __name__ == "__main__":
    sys.exit(main())
