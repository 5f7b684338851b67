"""Why a store does not give a file, from its own words, and what to do about it."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime

from .embedding_model import PinnedFile
from .failures import ConfigurationError, DeniedError, NotFoundError, TemplateError

SKEW = 300.0  # seconds that clocks may differ by; S3 takes 900 (RequestTimeTooSkewed)

# S3's, Azure's and Google's answers alike name their reason in <Code>.
_CODE = re.compile(rb"<Code>([A-Za-z0-9._-]{1,60})</Code>")
_EXPIRED = re.compile(rb"expired", re.IGNORECASE)

_BUCKET = "check the bucket of the artifact URI, and MLFLOW_S3_ENDPOINT_URL"
_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_MAY_READ = "check that the credentials may read the model"
# By code: what the run ends with, and what to do. From the lists of error codes of Amazon S3, of
# Azure Blob Storage and of Google Cloud Storage's XML API.
ADVICE: dict[str, tuple[type[TemplateError], str]] = {
    "NoSuchBucket": (ConfigurationError, _BUCKET),
    "InvalidBucketName": (ConfigurationError, _BUCKET),
    "ContainerNotFound": (ConfigurationError, _BUCKET),
    "PermanentRedirect": (ConfigurationError, "check AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": (ConfigurationError, "check AWS_DEFAULT_REGION"),
    "AuthorizationQueryParametersError": (ConfigurationError, "check AWS_DEFAULT_REGION"),
    "NoSuchKey": (NotFoundError, "register the model again"),
    "NoSuchVersion": (NotFoundError, "register the model again"),
    "BlobNotFound": (NotFoundError, "register the model again"),
    "InvalidAccessKeyId": (DeniedError, _KEYS),
    "SignatureDoesNotMatch": (DeniedError, _KEYS),
    "ExpiredToken": (DeniedError, "AWS_SESSION_TOKEN has expired: get another one"),
    "InvalidToken": (DeniedError, "check AWS_SESSION_TOKEN"),
    "AccessDenied": (DeniedError, _MAY_READ),
    "AuthenticationFailed": (DeniedError, _MAY_READ),
    "AuthorizationFailure": (DeniedError, _MAY_READ),
}


def explained(
    status: int,
    headers: Message,
    body: bytes,
    file: PinnedFile,
    where: str,
    object_store: bool,
    advice: str,
) -> TemplateError | None:
    """What a 4xx answer means; None when nothing about it is known.

    headers, body: of the answer; where: the source, as it may be shown; object_store: whether S3
    or its like was asked; advice: for credentials that are refused
    """
    found = _CODE.search(body) if object_store else None
    code = found[1].decode() if found else None
    said = f"{status}, {code}" if code else str(status)
    refused = status in (401, 403)
    clocks = _clocks(headers) if refused else None
    expired = code == "RequestTimeTooSkewed" or (refused and _EXPIRED.search(body))
    if code and clocks and (expired or code in ("AccessDenied", "SignatureDoesNotMatch")):
        return DeniedError(f"{where} refuses {file.source} ({said}): {clocks}; set the clock right")
    if code in ADVICE:
        kind, what = ADVICE[code]
        return kind(f"{where} does not give {file.source} ({said}): {what}")
    if status in (404, 410):
        if object_store and code is None:
            return ConfigurationError(
                f"{where} answers {status}, but not as a store does: check MLFLOW_S3_ENDPOINT_URL "
                "(MLflow's own, where MLflow signs the addresses)"
            )
        return NotFoundError(
            f"{file.source} is gone ({where} answers {said}): register the model again"
        )
    if refused:
        if b"Invalid Host header" in body:
            return DeniedError(
                f"{where} refuses the host name that it was called by: start MLflow with "
                "--allowed-hosts that includes it"
            )
        page = headers.get("Content-Type", "").lower().startswith("text/html")
        means = ", with a web page as a login shows it" if page else ""
        return DeniedError(f"{where} refuses {file.source} ({said}{means}): {advice}")
    return None


def _clocks(headers: Message) -> str | None:
    """What both clocks say, where they differ by more than signatures allow."""
    try:
        theirs = parsedate_to_datetime(headers.get("Date", ""))
        theirs = theirs.replace(tzinfo=theirs.tzinfo or timezone.utc).astimezone(timezone.utc)
        ours = datetime.now(timezone.utc)
        if abs((theirs - ours).total_seconds()) <= SKEW:
            return None
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    shown = "%Y-%m-%d %H:%M"
    return f"this machine's clock says {ours:{shown}} UTC, the store's {theirs:{shown}}"
