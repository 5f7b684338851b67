"""The command line: arguments, environment, signals, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .console import Console, one_line, termination_message
from .failures import (
    INTERRUPTED,
    ConfigurationError,
    Interrupted,
    TemplateError,
    exit_code,
    from_os_error,
)
from .pin import Pin
from .run import check, make_ready, resolve
from .settings import MIB, Settings
from .stop import Stop

PREFIX = "MODEL_FETCH_"
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
        mapping = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"the pin {path} cannot be read ({error.strerror}): mount it there or name it with --pin"
        ) from None
    except (ValueError, RecursionError):
        raise ConfigurationError(
            f"the pin {path} is not JSON: render the repository again"
        ) from None
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


def _number(low: float, high: float, kind: type = float) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"
    return convert


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="model-fetch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(
        group: argparse._ArgumentGroup, name: str, default: Any, help: str, **more: Any
    ) -> None:
        variable = PREFIX + name.upper().replace("-", "_")
        shown = "" if default in (None, "") else f" [{default}]"
        if more.get("action") == "store_true":
            default = environ.get(variable, "").lower() in ("1", "true", "yes")
            group.add_argument(f"--{name}", default=default, help=help, **more)
            return
        value = environ.get(variable) or default
        more.setdefault("metavar", "X")
        group.add_argument(
            f"--{name}", default=None if value is None else str(value), help=help + shown, **more
        )

    places = parser.add_argument_group("places")
    add(places, "pin", "/etc/model/pin.json", "the pin, a JSON file", metavar="FILE")
    add(places, "cache", "/cache", "volume to fetch to; '' when all is mounted", metavar="FOLDER")
    add(places, "link", "/model/current", "link to the ready model, for TEI", metavar="PATH")
    add(
        places,
        "mount",
        None,
        "where MLflow's artifact store is mounted, if it is",
        metavar="FOLDER",
    )

    transfer = parser.add_argument_group("transfer")
    add(transfer, "connections", 8, "connections at a time", type=_number(1, 64, int), metavar="N")
    add(
        transfer,
        "chunk-size",
        8,
        "MiB per request; what a kill can cost per connection",
        type=_number(1 / 64, 1024),
        metavar="MIB",
    )
    add(
        transfer,
        "retries",
        8,
        "failures in a row until a chunk is given up",
        type=_number(0, 1000, int),
        metavar="N",
    )
    add(
        transfer,
        "attempts",
        3,
        "times to fetch a file whose verification fails",
        type=_number(1, 100, int),
        metavar="N",
    )
    add(
        transfer,
        "timeout",
        60,
        "seconds without a byte until a connection is dead",
        type=_number(0.1, 86400),
        metavar="S",
    )
    add(
        transfer,
        "digests",
        "always",
        "compute SHA-256 of all files, or only of those pinned with one",
        choices=("always", "pinned"),
        metavar="WHEN",
    )
    add(
        transfer,
        "no-sync",
        False,
        "do not wait for the disk: faster, not safe against power cuts",
        action="store_true",
    )

    sharing = parser.add_argument_group("sharing and pruning")
    add(
        sharing,
        "lock-timeout",
        3600,
        "seconds to wait for another process that fetches",
        type=_number(0, 864000),
        metavar="S",
    )
    add(
        sharing,
        "lease",
        20,
        "seconds without a sign of life until a holder on another machine is dead",
        type=_number(0.5, 3600),
        metavar="S",
    )
    add(
        sharing,
        "keep",
        None,
        "other versions to keep; all when not given",
        type=_number(0, 1000, int),
        metavar="N",
    )
    add(
        sharing,
        "keep-hours",
        24,
        "never prune a version started within this time",
        type=_number(0, 87600),
        metavar="H",
    )

    telling = parser.add_argument_group("telling")
    add(
        telling,
        "log-format",
        "text",
        "lines of text, or of JSON",
        choices=("text", "json"),
        metavar="FORMAT",
    )
    add(
        telling,
        "interval",
        5,
        "seconds between two lines of progress",
        type=_number(0.1, 3600),
        metavar="S",
    )
    add(
        telling,
        "termination-log",
        "/dev/termination-log",
        "file for the last line, shown by Kubernetes",
        metavar="FILE",
    )
    add(telling, "debug", False, "show where an error came from", action="store_true")

    parser.add_argument(
        "--verify",
        action="store_true",
        help="only read a complete version again and compare its digests",
    )
    parser.add_argument("--version", action="version", version=f"model-fetch {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
