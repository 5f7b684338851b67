"""Where the bytes come from, tried in the order in which they are listed in `candidates`.

Never used: MLflow's `/get-artifact`. Servers of version 3.4.0 keep a full copy of each file that
it hands out in their temporary folder, for ever.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from . import auth
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
from .pin import Pin
from .settings import Settings
from .transport import (
    RETRYABLE,
    ConnectionFailed,
    Request,
    Trust,
    Wire,
    origin,
    place,
    read_json,
)

API = "/api/2.0"
# MLflow signs for 300 s by default (MLFLOW_PRESIGNED_DOWNLOAD_URL_TTL_SECONDS); renewed in time.
PRESIGNED_FOR = 240.0
SIGNED_FOR = 3600  # seconds, for addresses that this program signs itself
FRESH = 5.0  # seconds in which a refused address was not refused for its age


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
        """Raises NotOffered when the next source should be tried instead."""


class HttpSource(Source):
    """A store that answers GET, with or without ranges."""

    trust: Trust

    @abstractmethod
    def request(self, file: PinnedFile) -> Request:
        """The request for a whole file, with credentials that hold now."""

    def refused(self, file: PinnedFile, used: Request) -> bool:
        """After a 401 or 403: whether another request for the file has a chance."""
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

    def __init__(self, base: str, credentials: auth.Credentials, trust: Trust) -> None:
        """base: address of the artifact's folder."""
        self._base, self._credentials, self.trust = base.rstrip("/"), credentials, trust
        self.name = f"proxied by {origin_text(base)}"

    def check(self) -> None:
        return

    def request(self, file: PinnedFile) -> Request:
        return Request(f"{self._base}/{quote(file.source)}", self._credentials.headers())

    def refused(self, file: PinnedFile, used: Request) -> bool:
        return self._credentials.renew(used.headers)


class Signed(HttpSource):
    """Addresses that are valid for a while, one per file; a subclass says who signs."""

    lifetime: float

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

    def refused(self, file: PinnedFile, used: Request) -> bool:
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

    def __init__(
        self,
        tracking_uri: str,
        pin: Pin,
        folder: str,
        run_id: str | None,
        credentials: auth.Credentials,
        trust: Trust,
    ) -> None:
        """folder: of the artifact, below the run's root where run_id is given, else below the proxy's."""
        super().__init__(trust)
        self._uri, self._pin, self._folder, self._run_id = tracking_uri, pin, folder, run_id
        self._credentials = credentials
        self.name = f"presigned by {origin_text(tracking_uri)}"

    def check(self) -> None:
        wire = Wire(self.trust, timeout=30)
        try:
            if self._run_id is None:
                # A 404 or a false: a store on the server's own disk signs nothing.
                answer = self._ask(wire, Request(f"{self._uri}/api/3.0/mlflow/server-info"))
                if not (answer or {}).get("multipart_downloads_enabled"):
                    raise NotOffered("this MLflow server signs no addresses for its store")
            smallest = min(self._pin.files, key=lambda file: file.size)
            request = self.request(smallest)
            wire.send(request.with_headers(Range="bytes=0-0"))
        except NotFoundError:
            raise NotOffered("this MLflow server signs no addresses for this artifact") from None
        except ConnectionFailed as error:
            reason = f"MLflow, or the store that it signs for, does not answer here ({error})"
            raise NotOffered(reason, UnreachableError(reason)) from None
        except DeniedError as error:
            raise NotOffered(str(error), error) from None
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
        wire = Wire(self.trust, timeout=30)
        try:
            answer = self._ask(wire, request)
        finally:
            wire.close()
        url = (answer or {}).get("url") or (answer or {}).get("presigned_url")
        if not isinstance(url, str) or urlsplit(url).scheme not in ("http", "https"):
            raise NotFoundError(f"MLflow signs no address for {file.source}")
        headers = {str(k): str(v) for k, v in (answer or {}).get("headers", {}).items()}
        return Request(url, headers)

    def _ask(self, wire: Wire, request: Request) -> dict[str, Any] | None:
        """The JSON answer; None when the server has none to this question.

        Raises: ConnectionFailed when trying again may help, DeniedError.
        """
        for _ in range(2):
            headers = self._credentials.headers()
            response = wire.send(request.with_headers(**headers))
            answer = read_json(response)
            if response.status != 401 or not self._credentials.renew(headers):
                break
        # Not 500: MLflow answers so where it lacks what is asked for.
        if response.status in RETRYABLE - {500}:
            raise ConnectionFailed(f"{place(request.url)} answers {response.status}")
        if response.status in (401, 403):
            raise DeniedError(
                f"MLflow signs no address ({response.status}): check the credentials and that they "
                "may read the model"
            )
        return answer if response.status == 200 else None


class S3(Signed):
    """S3-compatible storage with keys; boto3 signs, this program downloads."""

    lifetime = SIGNED_FOR * 0.9

    def __init__(self, bucket: str, prefix: str, environ: Mapping[str, str]) -> None:
        super().__init__(Trust(environ, "AWS_CA_BUNDLE", insecure="MLFLOW_S3_IGNORE_TLS"))
        self._bucket, self._prefix, self._environ = bucket, prefix.strip("/"), environ
        self._endpoint = next(
            (
                environ[name]
                for name in ("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
                if environ.get(name)
            ),
            None,
        )
        self._client: Any = None
        self.name = f"S3 bucket {bucket}" + (
            f" at {origin_text(self._endpoint)}" if self._endpoint else ""
        )

    def check(self) -> None:
        import boto3  # 0.3 s and 30 MB, so only where it is needed
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        try:
            session = boto3.session.Session(
                region_name=self._environ.get("AWS_DEFAULT_REGION") or "us-east-1"
            )
            if session.get_credentials() is None:
                raise NotOffered(
                    "there are no keys for S3 (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
                )
            style = self._environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE") or (
                "path" if self._endpoint else "auto"
            )
            self._client = session.client(
                "s3",
                endpoint_url=self._endpoint,
                config=Config(signature_version="s3v4", s3={"addressing_style": style}),
            )
        except (BotoCoreError, ValueError) as error:
            raise ConfigurationError(
                f"the S3 settings cannot be used ({type(error).__name__}): check "
                "MLFLOW_S3_ENDPOINT_URL and the AWS_ variables"
            ) from None

    def sign(self, file: PinnedFile) -> Request:
        key = f"{self._prefix}/{file.source}".strip("/")
        return Request(
            self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=SIGNED_FOR
            )
        )


class ClientStore(Source):
    """Any other store that MLflow's client knows, through the client: one file after another."""

    def __init__(self, artifact_uri: str) -> None:
        self._uri = artifact_uri.rstrip("/")
        self.name = f"MLflow's client from {place(artifact_uri)}"

    def check(self) -> None:
        try:
            import mlflow.artifacts  # noqa: F401 - 1 s and 80 MB, so only for these stores
        except ImportError:
            raise ConfigurationError(
                f"{place(self._uri)} needs MLflow's client: build the image with it"
            ) from None

    def download(self, file: PinnedFile, target: Path) -> None:
        """Puts one file at `target`, by way of a private folder beside it."""
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException

        private = target.with_name(target.name + ".client")
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        try:
            got = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{self._uri}/{file.source}", dst_path=str(private)
            )
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
    environ = settings.environ
    uri = pin.artifact_uri or ""
    parts = urlsplit(uri)
    folder = unquote(parts.path).strip("/")
    yield from _mounted(pin, settings.mount, parts.scheme, folder)
    if parts.scheme in ("mlflow-artifacts", "http", "https", "s3"):
        trust = Trust(environ, insecure="MLFLOW_TRACKING_INSECURE_TLS")
        credentials = auth.from_environment(environ, trust)
        tracking = environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
        if tracking and urlsplit(tracking).scheme not in ("http", "https"):
            raise ConfigurationError("MLFLOW_TRACKING_URI must be an http or https address")
    if parts.scheme == "mlflow-artifacts":
        if parts.netloc:
            host = f"{urlsplit(tracking).scheme or 'http'}://{parts.netloc}"
            if origin(host) != origin(tracking or host):
                credentials = auth.Credentials()  # they belong to the tracking server alone
            tracking = host
        if not tracking:
            raise ConfigurationError("MLFLOW_TRACKING_URI is missing: the address of MLflow")
        yield Presigned(tracking, pin, folder, None, credentials, trust)
        yield Proxied(
            f"{tracking}{API}/mlflow-artifacts/artifacts/{quote(folder)}", credentials, trust
        )
    elif parts.scheme in ("http", "https"):
        known = tracking and origin(tracking) == origin(uri)
        yield Proxied(uri, credentials if known else auth.Credentials(), trust)
    elif parts.scheme == "s3":
        _, found, below = folder.partition(f"{pin.run_id}/artifacts/")
        if tracking and pin.run_id and found:
            yield Presigned(tracking, pin, below, pin.run_id, credentials, trust)
        yield S3(parts.netloc, folder, environ)
    elif parts.scheme not in ("", "file"):
        yield ClientStore(uri)


def choose(pin: Pin, settings: Settings, console: Console) -> Source:
    """The first source that is open here.

    Raises: ConfigurationError when none is, and what a source raises itself.
    """
    reasons: list[str] = []
    try:
        return _choose(pin, settings, console, reasons)
    except ConfigurationError as error:
        # The way that was meant may be a nearer one.
        others = [reason for reason in reasons if reason not in str(error)]
        raise ConfigurationError("; ".join([str(error), *others])) from None


def _choose(pin: Pin, settings: Settings, console: Console, reasons: list[str]) -> Source:
    unlike: TemplateError | None = None
    for source in candidates(pin, settings):
        try:
            source.check()
        except NotOffered as reason:
            unlike = unlike or reason.error
            reasons.append(str(reason))
            continue
        except TemplateError as error:
            # A store that is mounted but lacks the files does not speak for the others.
            if not isinstance(source, Mounted) or isinstance(error, ConfigurationError):
                raise
            unlike = unlike or error
            reasons.append(str(error))
            continue
        for reason_text in reasons:
            console.info(f"a nearer source is not used: {reason_text}")
        return source
    if unlike is not None:
        raise unlike
    shown = place(pin.artifact_uri or "")
    raise ConfigurationError(
        f"no way to {shown}: {'; '.join(reasons) or 'nothing is mounted there'}"
    )


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


def origin_text(url: str) -> str:
    """`http://host:port`, without user, path or query."""
    scheme, host, port = origin(url)
    return f"{scheme}://{host}:{port}"
