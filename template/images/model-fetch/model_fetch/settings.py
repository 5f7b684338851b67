"""The values that a run works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .addresses import BadAddress, checked
from .failures import ConfigurationError

MIB = 1 << 20
SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def switched_on(environ: Mapping[str, str], name: str) -> bool:
    """What a variable that can be true or false says; false when it is not set.

    Raises: ConfigurationError.
    """
    text = environ.get(name, "").strip().lower()
    if text and text not in SWITCHES:
        raise ConfigurationError(f"{name} is neither true nor false")
    return SWITCHES.get(text, False)


def address(environ: Mapping[str, str], *names: str) -> str | None:
    """The server's address in the first of these variables that is set.

    Raises: ConfigurationError.
    """
    for name in names:
        text = environ.get(name, "").strip()
        if text:
            try:
                return checked(text).rstrip("/")
            except BadAddress as error:
                raise ConfigurationError(
                    f"{name} is not the address of a server ({error}): use http(s)://host[:port]"
                ) from None
    return None


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line and the environment ask for."""

    cache: Path | None
    """Volume with one folder per registered model and version; None when all is mounted."""

    link: Path
    """What TEI gets as `--model-id`; becomes a symbolic link to the model's folder."""

    mount: Path | None
    """Where MLflow's artifact store is mounted, if it is."""

    environ: Mapping[str, str] = field(repr=False)
    """Addresses and credentials: MLFLOW_*, AWS_*, and the CA variables."""

    connections: int = 8
    """The most connections to the store at a time; see ramp.py."""

    chunk_size: int = 16 * MIB
    """Bytes of one range request, and of what a kill can cost per connection."""

    retries: int = 8
    """Failures in a row, without a byte in between, until a chunk is given up."""

    attempts: int = 3
    """Times that a file is fetched whole when its verification fails."""

    timeout: float = 60.0
    """Seconds for an answer's head, and without a part of its body, until a connection is dead."""

    lock_timeout: float = 3600.0
    """Seconds to wait for another process that fetches the same version."""

    lease: float = 20.0
    """Seconds without a sign of life after which a holder on another machine counts as dead."""

    keep: int | None = None
    """Versions of this model to keep beside the present one; None keeps all."""

    keep_hours: float = 24.0
    """Versions that a pod started with within this time are never pruned."""

    digests: str = "always"
    """`always`, or `pinned`: compute digests only to compare them with the pin's."""

    sync: bool = True
    """Whether the bytes must be on the disk before the version counts as complete."""

    interval: float = 5.0
    """Seconds between two lines of progress in a log."""
