"""How a run can end, and the exit code that says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import (
    ConfigurationError,
    DeniedError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    UnsuitableModelError,
)

__all__ = [
    "ConfigurationError",
    "DeniedError",
    "Interrupted",
    "LockTimeout",
    "NoSpaceError",
    "NotFoundError",
    "TemplateError",
    "UnreachableError",
    "UnsuitableModelError",
    "VerificationError",
    "exit_code",
    "from_memory_error",
    "from_os_error",
]


class NoSpaceError(TemplateError):
    """The volume has no room for the model."""


class VerificationError(TemplateError):
    """What the store sends is not what was pinned, also after another try."""


class LockTimeout(TemplateError):
    """Another process kept the version locked for longer than was to be waited."""


class Interrupted(TemplateError):
    """A signal asked the run to stop."""


INTERNAL = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 143  # 128 + SIGTERM, as a shell reports it

# First match wins, so a subclass stands before its base.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ConfigurationError, 2),
    (NotFoundError, 3),
    (DeniedError, 4),
    (UnreachableError, 5),
    (NoSpaceError, 6),
    (VerificationError, 7),
    (LockTimeout, 8),
    (UnsuitableModelError, 9),
    (Interrupted, INTERRUPTED),
)


def exit_code(error: BaseException) -> int:
    """The process exit code that stands for an error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), INTERNAL)


# What a mount answers whose program or server is not there any more.
DEAD = frozenset({errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN})


def from_os_error(error: OSError, path: Path | None = None) -> TemplateError:
    """Says what a failed file operation means to the user.

    path: what it was about, where the error itself does not say
    """
    where = error.filename or path or "the target"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"no space left at {where}: make the volume larger or prune old versions"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ConfigurationError(
            f"{where} cannot be written ({error.strerror}): mount it read-write for uid "
            f"{os.geteuid()}"
        )
    if error.errno in DEAD:
        return UnreachableError(
            f"{where} does not answer ({error.strerror}): look after the volume; where a program is "
            "behind its mount, restart that, then this pod"
        )
    return ConfigurationError(f"{where}: {error.strerror or type(error).__name__}")


def from_memory_error() -> TemplateError:
    """Says what to do when an allocation failed."""
    return ConfigurationError(
        "the memory of this container is not enough: raise the memory limit of model-fetch, "
        "unless the model is one that nobody meant"
    )
