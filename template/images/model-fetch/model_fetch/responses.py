"""What a store's answer to a request means: go on, ask again, or give up."""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING

from . import limits
from .embedding_model import PinnedFile
from .failures import UnreachableError
from .refusals import explained
from .transport import RETRYABLE, Answer, is_page

if TYPE_CHECKING:
    from .sources import HttpSource

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,16})-([0-9]{1,16})/([0-9]{1,16}|\*)")
LONGEST_NAME = 1024  # characters of an ETag that are kept
_SECONDS = re.compile(r"[0-9]{1,9}")


class Again(Exception):
    """The same bytes should be asked for once more."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        """after: seconds that the server wants to be left alone, None when it did not say."""
        super().__init__(reason)
        self.reason, self.after = reason, after


class NoRanges(Exception):
    """The server answers a range with something else."""


class Wrong(Exception):
    """The store's file is not the pinned one, or is being changed."""


def check_status(response: Answer, file: PinnedFile, source: HttpSource) -> None:
    """Returns when the body is (a part of) the file.

    Raises: Again, Wrong, ConfigurationError, NotFoundError, DeniedError, UnreachableError.
    """
    status, where = response.status, source.name
    if status in (200, 206):
        if is_page(response) and not file.path.endswith((".html", ".htm")):
            raise UnreachableError(
                f"{where} answers with a web page instead of {file.path}: a login or an ingress "
                "stands in between; check MLFLOW_TRACKING_URI and the credentials"
            )
        return
    if status == 416:
        raise Wrong("the store's file is shorter than pinned")
    if status in RETRYABLE:
        raise Again(f"{where} answers {status}", _retry_after(response))
    try:
        body = response.small(limits.ERROR_BYTES, limits.DRAIN_SECONDS)
    except (OSError, http.client.HTTPException, ValueError):
        body = b""
    raise explained(
        status, response.headers, body, file, where, source.object_store, source.advice
    ) or UnreachableError(f"{where} answers {status} for {file.source}")


def check_range(response: http.client.HTTPResponse, start: int, end: int, size: int) -> None:
    """Returns when a body is exactly the bytes from start to end (exclusive) of `size`.

    Raises: NoRanges, also for a 206 of other bytes (s3rver answers bytes=0-0 with everything);
    Wrong when the store's file has another length.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if response.status != 206 or not match:
        raise NoRanges
    if match[3] != "*" and int(match[3]) != size:
        raise Wrong(f"the store's file has {int(match[3]):,} bytes, the pin says {size:,}")
    if (int(match[1]), int(match[2])) != (start, end - 1):
        raise NoRanges


def check_length(response: http.client.HTTPResponse, expected: int) -> None:
    """Raises Wrong when the body's announced length, if any, is not `expected` bytes."""
    if response.length is not None and response.length != expected:
        raise Wrong(f"the store sends {response.length:,} bytes where {expected:,} are due")


def validator(response: http.client.HTTPResponse) -> str | None:
    """What the store calls this version of the file: its ETag, else its date, else None."""
    name = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return " ".join(name.split())[:LONGEST_NAME] or None


def if_range(validator: str | None) -> dict[str, str]:
    """Lets the server send the whole file when it is another one; strong ETags only (RFC 9110)."""
    fit = validator is not None and validator.isascii() and validator.isprintable()
    return {"If-Range": validator} if fit and validator and validator.startswith('"') else {}


def _retry_after(response: http.client.HTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if _SECONDS.fullmatch(value) else None
