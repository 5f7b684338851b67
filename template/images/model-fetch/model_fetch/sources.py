"""Where the bytes come from, tried in the order in which they are listed in `candidates`.

Never used: MLflow's `/get-artifact`. Servers of version 3.4.0 keep a full copy of each file that
it hands out in their temporary folder, for ever.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from . import auth, registry, sigv4
from .addresses import BadAddress, checked, leads_to_metadata, origin, origin_text, place
from .console import Console
from .embedding_model import PinnedFile
from .failures import (
    ConfigurationError,
    DeniedError,
    NotFoundError,
    TemplateError,
    UnreachableError,
    VerificationError,
    from_os_error,
)
from .patience import Patience, Reasons
from .pin import Pin
from .settings import Settings, address
from .stop import Stop
from .transport import RETRYABLE, ConnectionFailed, Request, Wire, ask
from .trust import Trust

API = "/api/2.0"
# MLflow signs for 300 s by default (MLFLOW_PRESIGNED_DOWNLOAD_URL_TTL_SECONDS); renewed in time.
PRESIGNED_FOR = 240.0
SIGNED_FOR = 3600  # seconds, for addresses that this program signs itself
FRESH = 5.0  # seconds in which a refused address was not refused for its age
# An artifact URI whose path is quoted: what stands before that, and the rest. MLflow's client takes
# the keys of a store as they are, so what is quoted must be no part of a store's root.
QUOTED = re.compile(r"([a-z][a-z0-9+.-]*:(?://[^/]*)?[^%]*)/([^/]*%.*)")
BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")  # as botocore has it: a name of any age, of any store
REGION = re.compile(r"[A-Za-z0-9-]{1,63}")  # as botocore has it: a label of a host's name
# What the stores' signatures can cover; any other header would be MLflow's own idea.
STORE_HEADER = re.compile(r"(x-amz|x-ms|x-goog)-[a-z0-9-]+", re.IGNORECASE)


class NotOffered(Exception):
    """This way is not open here; the text says why, without secrets."""

    def __init__(self, reason: str, error: TemplateError | None = None) -> None:
        """error: what the run ends with when no other way is open either."""
        super().__init__(reason)
        self.error = error


class Source(ABC):
    """One way to the files of a pin."""

    name: str
    """For the log and the marker: the kind, and the place without credentials."""

    @abstractmethod
    def check(self) -> None:
        """Raises NotOffered when the next source should be tried instead.

        Raises: ConnectionFailed when this one may be open a little later.
        """


class HttpSource(Source):
    """A store that answers GET, with or without ranges."""

    trust: Trust

    object_store = False
    """Whether the answers are those of S3 or its like, which name their reasons."""

    advice = "check that the credentials may read the model"
    """What to do when it refuses a file without saying why."""

    @abstractmethod
    def request(self, file: PinnedFile) -> Request:
        """The request for a whole file, with credentials that hold now."""

    def refused(self, file: PinnedFile, used: Request, login: bool = True) -> bool:
        """After a 401 or 403: whether another request for the file has a chance.

        login: whether to log in anew, if that is what it takes
        """
        return False


class Mounted(Source):
    """The store's own folder, mounted here: used in place."""

    def __init__(self, root: Path, pin: Pin, top: Path) -> None:
        """root: folder of the artifact; top: no link may lead out of it."""
        self.root, self._pin, self._top = root, pin, top
        self.name = f"mounted store {root}"

    def check(self) -> None:
        try:
            os.stat(self.root)
        except FileNotFoundError:
            raise NotOffered(f"there is no folder {self.root}") from None
        except OSError as error:
            raise _unreadable(self.root, error) from None
        for file in self._pin.files:
            self.path(file)

    def path(self, file: PinnedFile) -> Path:
        """Where a pinned file is, which can be read.

        Raises: NotFoundError, VerificationError when its size is another, ConfigurationError when
        a symbolic link leads out of the store, NotOffered when it cannot be read.
        """
        path = self.root / file.source
        try:
            real = path.resolve(strict=True)
            if not real.is_relative_to(self._top.resolve()) or not real.is_file():
                raise ConfigurationError(
                    f"{path} is no file of the mounted store: it leads out of it"
                )
            fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            size = os.fstat(fd).st_size
            os.close(fd)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"{path} is gone from the mounted store: register the model again"
            ) from None
        except RuntimeError:  # a link that leads to itself (Python before 3.13)
            raise ConfigurationError(f"{path} is a link that leads nowhere") from None
        except OSError as error:
            raise _unreadable(path, error) from None
        if size != file.size:
            raise VerificationError(f"{path} has {size:,} bytes, the pin says {file.size:,}")
        return path


def _unreadable(path: Path, error: OSError) -> NotOffered:
    """What it means that a mounted store cannot be read, though it may be there."""
    if isinstance(error, PermissionError):
        reason = (
            f"{path} cannot be read by uid {os.geteuid()}: mount the store with a umask or a map of "
            "users that lets it, or make the files readable"
        )
        return NotOffered(reason, ConfigurationError(reason))
    told = from_os_error(error, path)
    return NotOffered(str(told), told)


class Proxied(HttpSource):
    """MLflow's own artifact proxy, or any web server that holds the artifact's folder."""

    def __init__(
        self, base: str, credentials: auth.Credentials, trust: Trust, own: bool = True
    ) -> None:
        """base: address of the artifact's folder; own: whether the settings name the server."""
        self._base, self._credentials, self.trust = base.rstrip("/"), credentials, trust
        self._own, self.advice = own, credentials.advice
        self.name = f"proxied by {origin_text(base)}"

    def check(self) -> None:
        return

    def request(self, file: PinnedFile) -> Request:
        url = f"{self._base}/{quote(file.source)}"
        return Request(url, self._credentials.headers(), own=self._own)

    def refused(self, file: PinnedFile, used: Request, login: bool = True) -> bool:
        return self._credentials.renew(used.headers, login)


class Signed(HttpSource):
    """Addresses that are valid for a while, one per file; a subclass says who signs."""

    lifetime: float
    object_store = True

    def __init__(self, trust: Trust) -> None:
        self.trust = trust
        self._lock = threading.Lock()
        self._signed: dict[str, tuple[Request, float]] = {}

    @abstractmethod
    def sign(self, file: PinnedFile) -> Request:
        """A fresh address for a file. Called by one thread at a time."""

    def request(self, file: PinnedFile) -> Request:
        with self._lock:
            request, at = self._signed.get(file.path, (None, 0.0))
            if request is None or time.monotonic() - at > self.lifetime:
                request = self.sign(file)
                self._signed[file.path] = request, time.monotonic()
            return request

    def refused(self, file: PinnedFile, used: Request, login: bool = True) -> bool:
        with self._lock:
            request, at = self._signed.get(file.path, (None, 0.0))
            if request is used:
                if time.monotonic() - at < FRESH:
                    return False
                del self._signed[file.path]
            return True


class Presigned(Signed):
    """Addresses that MLflow signs for its S3 store: the pod needs no key of the store."""

    lifetime = PRESIGNED_FOR
    advice = "check that MLflow's own keys may read the model, and that its clock is right"

    def __init__(
        self,
        tracking_uri: str,
        pin: Pin,
        folder: str,
        run_id: str | None,
        credentials: auth.Credentials,
        trust: Trust,
        timeout: float,
        own: bool = True,
    ) -> None:
        """folder: of the artifact, below the run's root where run_id is given, else below the proxy's.

        own: whether the settings name the server
        """
        super().__init__(trust)
        self._uri, self._pin, self._folder, self._run_id = tracking_uri, pin, folder, run_id
        self._credentials, self._timeout, self._own = credentials, timeout, own
        self.name = f"presigned by {origin_text(tracking_uri)}"

    def check(self) -> None:
        try:
            if self._run_id is None:
                # A 404 or a false: a store on the server's own disk signs nothing.
                answer = self._ask(Request(f"{self._uri}/api/3.0/mlflow/server-info"))
                if (answer or {}).get("multipart_downloads_enabled") is not True:
                    raise NotOffered("this MLflow server signs no addresses for its store")
            # Where one is refused for its missing digest, it is this one.
            request = self.request(min(self._pin.files, key=lambda f: (_has_digest(f), f.size)))
        except NotFoundError:
            raise NotOffered("this MLflow server signs no addresses for this artifact") from None
        except (DeniedError, UnreachableError) as error:
            raise NotOffered(str(error), error) from None
        except ConnectionFailed as error:
            if self._run_id is None:
                raise  # the next way leads by the same server
            raise _out_of_reach(error) from None
        wire = Wire(self.trust, self._timeout)
        try:
            wire.send(request.with_headers(Range="bytes=0-0"))
        except (ConnectionFailed, UnreachableError) as error:
            raise _out_of_reach(error) from None
        finally:
            wire.close()

    def sign(self, file: PinnedFile) -> Request:
        path = f"{self._folder}/{file.source}".strip("/")
        if self._run_id is None:
            request = Request(f"{self._uri}{API}/mlflow-artifacts/presigned/{quote(path)}")
        else:
            body = json.dumps({"run_id": self._run_id, "path": path}).encode()
            request = Request(
                f"{self._uri}{API}/mlflow/artifacts/presigned-download-url",
                {"Content-Type": "application/json"},
                "POST",
                body,
            )
        answer = self._ask(request) or {}
        named = answer.get("url") or answer.get("presigned_url")
        if not isinstance(named, str):
            raise NotFoundError(f"MLflow signs no address for {file.source}")
        try:
            url = checked(named)
        except BadAddress as error:
            raise UnreachableError(
                f"MLflow signs something for {file.source} that is no address ({error}): look at "
                "its own MLFLOW_S3_ENDPOINT_URL"
            ) from None
        secure = urlsplit(self._uri).scheme == "http" or urlsplit(url).scheme == "https"
        if not secure and not _has_digest(file):
            raise UnreachableError(
                f"MLflow signs an address without TLS for {file.source}, whose digest is not pinned"
            )
        own = self._own and origin(url) == origin(self._uri)
        return Request(url, store_headers(answer.get("headers")), own=own)

    def _ask(self, request: Request) -> dict[str, Any] | None:
        """The JSON answer; None when the server has none to this question.

        Raises: ConnectionFailed when trying again may help, TemplateErrors.
        """
        for _ in range(2):
            headers = self._credentials.headers()
            asked = replace(request.with_headers(**headers), own=self._own)
            reply = ask(asked, self.trust, self._timeout)
            if reply.status not in (401, 403) or not self._credentials.renew(headers):
                break
        # Not 500: MLflow answers so where it lacks what is asked for.
        if reply.status in RETRYABLE - {500}:
            raise ConnectionFailed(place(request.url), f"answers {reply.status}")
        if reply.status in (401, 403):
            page = ", with a web page as a login shows it" if reply.is_page else ""
            raise DeniedError(
                f"MLflow signs no address ({reply.status}{page}): {self._credentials.advice}"
            )
        return reply.json if reply.status == 200 else None


def store_headers(value: object) -> dict[str, str]:
    """Of the headers that come with a presigned address, those that a store may want to be sent."""
    return {
        name: text
        for name, text in (value.items() if isinstance(value, dict) else ())
        if isinstance(text, str) and text.isascii() and text.isprintable()
        if isinstance(name, str) and STORE_HEADER.fullmatch(name)
    }


def _has_digest(file: PinnedFile) -> bool:
    return bool(file.sha256 or file.blob_sha1)


def _out_of_reach(error: Exception) -> NotOffered:
    reason = f"MLflow, or the store that it signs for, does not answer here ({error})"
    return NotOffered(reason, UnreachableError(reason))


class S3(Signed):
    """S3-compatible storage with keys, with which this program signs its requests."""

    lifetime = SIGNED_FOR * 0.9
    advice = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may read"

    def __init__(self, bucket: str, prefix: str, pin: Pin, environ: Mapping[str, str]) -> None:
        super().__init__(Trust(environ, "AWS_CA_BUNDLE", insecure="MLFLOW_S3_IGNORE_TLS"))
        self._bucket, self._prefix, self._environ = bucket, prefix.strip("/"), environ
        self._pin = pin
        self._endpoint = address(
            environ, "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
        )
        self._sign: Callable[[str, str], str]
        self.name = f"S3 bucket {bucket}" + (
            f" at {origin_text(self._endpoint)}" if self._endpoint else ""
        )

    def check(self) -> None:
        environ = self._environ
        region = environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        style = environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE") or (
            "path" if self._endpoint else "auto"
        )
        keys = sigv4.Keys.from_environment(environ)
        # A profile, and a region that is none, are boto3's to judge.
        plain = REGION.fullmatch(region) and not environ.get("AWS_PROFILE")
        if keys and plain and self._endpoint and style == "path":
            self._sign = partial(_sign, self._endpoint, keys, region)
        else:
            self._sign = _boto3(self._endpoint, region, style)
        self.sign(self._pin.files[0])

    def sign(self, file: PinnedFile) -> Request:
        key = f"{self._prefix}/{file.source}".strip("/")
        try:
            return Request(checked(self._sign(self._bucket, key)))
        except ValueError as error:
            raise ConfigurationError(
                f"nothing in the bucket of {self.name} can be asked for ({type(error).__name__}): "
                "check the artifact URI, MLFLOW_S3_ENDPOINT_URL and the AWS_ variables"
            ) from None


def _sign(endpoint: str, keys: sigv4.Keys, region: str, bucket: str, key: str) -> str:
    if not BUCKET.fullmatch(bucket):
        raise ValueError(bucket)
    return sigv4.signed(endpoint, f"{bucket}/{key}", keys, region, SIGNED_FOR)


def _boto3(endpoint: str | None, region: str, style: str) -> Callable[[str, str], str]:
    """What signs with the keys that boto3 finds: of a profile, of the machine, of the cluster.

    Raises: NotOffered when it finds none, ConfigurationError.
    """
    import boto3  # 0.5 s and 30 MB, so only where it is needed
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = boto3.session.Session(region_name=region)
        if session.get_credentials() is None:
            raise NotOffered(
                "there are no keys for S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            )
        config = Config(signature_version="s3v4", s3={"addressing_style": style})
        client = session.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            f"the S3 settings cannot be used ({type(error).__name__}): check "
            "MLFLOW_S3_ENDPOINT_URL and the AWS_ variables"
        ) from None

    def sign(bucket: str, key: str) -> str:
        try:
            asked = {"Bucket": bucket, "Key": key}
            return str(client.generate_presigned_url("get_object", asked, SIGNED_FOR))
        except BotoCoreError as error:
            raise ValueError(type(error).__name__) from None

    return sign


class ClientStore(Source):
    """Any other store that MLflow's client knows, through the client: one file after another."""

    def __init__(self, artifact_uri: str) -> None:
        self._root, self._folder = artifact_uri.rstrip("/"), ""
        if quoted := QUOTED.fullmatch(self._root):
            self._root, self._folder = quoted[1], f"{unquote(quoted[2])}/"
        self.name = f"MLflow's client from {place(artifact_uri)}"

    def check(self) -> None:
        if leads_to_metadata(urlsplit(self._root).hostname or ""):
            raise _no_artifact_uri("it is one that no store is at")
        try:
            from mlflow.store.artifact import (  # noqa: F401 - 1 s and 80 MB, so only for these
                artifact_repository_registry,
            )
        except ImportError:
            raise ConfigurationError(
                f"{place(self._root)} needs MLflow's client: build the image with it"
            ) from None

    def download(self, file: PinnedFile, target: Path) -> None:
        """Puts one file at `target`, by way of a private folder beside it."""
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        private = target.with_name(target.name + ".client")
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        try:
            store = get_artifact_repository(self._root)
            got = store.download_artifacts(self._folder + file.source, str(private))
            shutil.move(got, target)
        except (MlflowException, ImportError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UnreachableError(
                f"{self.name} gives no {file.source} ({type(error).__name__}): check the store's "
                "own variables, and that its Python package is in the image"
            ) from None
        finally:
            shutil.rmtree(private, ignore_errors=True)


def candidates(pin: Pin, settings: Settings) -> Iterator[Source]:
    """The ways to a pin's files, the best one first."""
    environ, timeout = settings.environ, settings.timeout
    uri = pin.artifact_uri or ""
    try:
        parts = urlsplit(uri)
        folder = unquote(parts.path).strip("/")
    except ValueError:
        raise _no_artifact_uri("its host or its port is none") from None
    yield from _mounted(pin, settings.mount, parts.scheme, folder)
    if parts.scheme in ("mlflow-artifacts", "http", "https", "s3"):
        trust = Trust(environ, insecure="MLFLOW_TRACKING_INSECURE_TLS")
        credentials = auth.from_environment(environ, trust, timeout)
        if workspace := _workspace(pin, parts.scheme, folder, environ):
            credentials = auth.InWorkspace(credentials, workspace)
        tracking = address(environ, "MLFLOW_TRACKING_URI")
    if parts.scheme == "mlflow-artifacts":
        own = True
        if parts.netloc:
            host = _checked(f"{urlsplit(tracking or 'http:').scheme}://{parts.netloc}")
            own = tracking is not None and origin(host) == origin(tracking)
            if not own:
                credentials = auth.Credentials()  # they belong to the tracking server alone
            tracking = host
        if not tracking:
            raise ConfigurationError("MLFLOW_TRACKING_URI is missing: the address of MLflow")
        base = f"{tracking}{API}/mlflow-artifacts/artifacts/{quote(folder)}"
        yield Presigned(tracking, pin, folder, None, credentials, trust, timeout, own)
        yield Proxied(base, credentials, trust, own)
    elif parts.scheme in ("http", "https"):
        base = _checked(uri)
        known = tracking is not None and origin(tracking) == origin(base)
        yield Proxied(base, credentials if known else auth.Credentials(), trust, own=known)
    elif parts.scheme == "s3":
        if not parts.netloc:
            raise _no_artifact_uri("it has no bucket")
        _, found, below = f"{folder}/".partition(f"{pin.run_id}/artifacts/")
        if tracking and pin.run_id and found:
            yield Presigned(
                tracking, pin, below.strip("/"), pin.run_id, credentials, trust, timeout
            )
        yield S3(parts.netloc, folder, pin, environ)
    elif parts.scheme not in ("", "file"):
        yield ClientStore(uri)


def _checked(uri: str) -> str:
    try:
        return checked(uri)
    except BadAddress as error:
        raise _no_artifact_uri(str(error)) from None


def _no_artifact_uri(reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"the pin's artifact_uri is no address ({reason}): register the model again, or pin it again"
    )


def _workspace(pin: Pin, scheme: str, folder: str, environ: Mapping[str, str]) -> str | None:
    """The workspace that the pin or MLFLOW_WORKSPACE names, or the path of a proxied artifact."""
    said = re.match(r"workspaces/([^/]+)/", folder) if scheme == "mlflow-artifacts" else None
    return pin.workspace or registry.workspace(environ) or (said[1] if said else None)


def choose(pin: Pin, settings: Settings, console: Console, stop: Stop) -> Source:
    """The first source that is open here.

    Raises: ConfigurationError when none is, and what a source raises itself.
    """
    passed: list[NotOffered] = []
    try:
        return _choose(pin, settings, console, stop, passed)
    except ConfigurationError as error:
        # The way that was meant may be a nearer one, and so is its exit code.
        others = [str(other) for other in passed if str(other) not in str(error)]
        kind = next((type(other.error) for other in passed if other.error), ConfigurationError)
        raise kind("; ".join([*others, str(error)])) from None


def _choose(
    pin: Pin, settings: Settings, console: Console, stop: Stop, passed: list[NotOffered]
) -> Source:
    """passed: becomes the ways that are not open."""
    for source in candidates(pin, settings):
        patience = Patience(pin.registered_model, settings, stop, Reasons(console))
        try:
            _check(source, patience)
        except NotOffered as reason:
            passed.append(reason)
            continue
        except TemplateError as error:
            # A store that is mounted but lacks the files does not speak for the others.
            if not isinstance(source, Mounted) or isinstance(error, ConfigurationError):
                raise
            passed.append(NotOffered(str(error), error))
            continue
        for other in passed:
            console.info(f"a nearer source is not used: {other}")
        if isinstance(source, HttpSource) and source.trust.insecure:
            console.warning(
                f"{source.trust.insecure} is set: anybody could pose as the server; name its "
                "authority's file in MLFLOW_TRACKING_SERVER_CERT_PATH instead"
            )
        return source
    for other in passed:
        if other.error is not None:
            raise other.error
    shown = place(pin.artifact_uri or "")
    reasons = "; ".join(map(str, passed)) or "nothing is mounted there"
    raise ConfigurationError(f"no way to {shown}: {reasons}")


def mounted(pin: Pin, settings: Settings) -> Mounted | None:
    """The mounted store with the pinned files; None where nothing is mounted.

    Raises: what is wrong with the files that are there.
    """
    failed: TemplateError | None = None
    reason = None
    try:
        for source in candidates(pin, settings):
            if not isinstance(source, Mounted):
                break
            try:
                source.check()
                return source
            except NotOffered as error:
                reason = reason or str(error)
                failed = failed or error.error
            except TemplateError as error:
                failed = failed or error
    except ConfigurationError:  # of a way that is not asked for
        pass
    if failed is not None:
        raise failed
    if reason is not None:
        raise ConfigurationError(f"{reason}: mount the store there")
    return None


def _check(source: Source, patience: Patience) -> None:
    """Checks a source, and waits for its server to come up."""
    while True:
        try:
            return source.check()
        except ConnectionFailed as error:
            patience.wait(error)


def _mounted(pin: Pin, mount: Path | None, scheme: str, folder: str) -> Iterator[Source]:
    if scheme in ("", "file"):
        yield Mounted(Path("/") / folder, pin, Path("/") / folder)
    if mount is None:
        return
    # The bucket is the volume's root; MLflow's proxy often serves its folder `artifacts`.
    roots = {
        "s3": [mount / folder],
        "mlflow-artifacts": [mount / folder, mount / "artifacts" / folder],
    }
    for root in roots.get(scheme, []):
        yield Mounted(root, pin, mount)
