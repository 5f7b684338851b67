"""The service under test, as smoke.py and parity.py ask it; nothing but the standard library.

The key goes to the service's own origin alone: redirects are answers here, and are not followed.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import math
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

LONGEST_ANSWER = 16 << 20
"""Bytes; the longest right one is /tokenize's for the longest input, half of it at most."""


FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds between two tries while others fill the service; TEI names no time (no Retry-After)."""


class Failed(Exception):
    """A check did not find what it expected."""


class Stopped(Failed):
    """A check failed, and no other would say anything else."""


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    path: str
    status: int
    body: bytes
    key: str | None = field(default=None, repr=False)
    """That it was asked with, which is never shown."""

    def mapping(self) -> dict[str, Any]:
        """The JSON object that the body holds; raises Failed when it holds none."""
        try:
            said = json.loads(self.body)
        except (ValueError, RecursionError):
            raise Failed(f"{self.path} answers {self.status} with no JSON{self._start()}") from None
        if not isinstance(said, dict):
            raise Failed(f"{self.path} answers JSON that is no object{self._start()}")
        return said

    def expect(self, status: int, what: str = "") -> Answer:
        """Itself, when it has this status; raises Failed with TEI's own message otherwise."""
        if self.status != status:
            found = f"{self.path}{what} answers {self.status}, not {status}"
            raise Failed(found + (self._start() if self.status != 404 else ": nothing is there"))
        return self

    def _start(self) -> str:
        text = self.body[:4096].decode("utf-8", "replace").strip()
        if self.key:
            text = text.replace(self.key, "<the key>")  # before a cut through it hides it
        return f": {text[:120]}" if text else ""


@dataclass(frozen=True)
class Embeddings:
    """What /v1/embeddings answers."""

    vectors: list[list[float]]
    model: object
    tokens: int | None
    """Of all texts, as the server counts them."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


class Endpoint:
    """The service at `url`; a request is over after `timeout` seconds, however slowly it drips."""

    def __init__(self, url: str, key: str | None, model: str, timeout: float) -> None:
        self.url, self.key, self.model, self.timeout = url, key, model, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def request(self, path: str, body: object = None, key: str | None = None) -> Answer:
        """One request; `key`: another than the right one, to see what comes of it.

        Raises: Failed when no answer comes; Stopped when it takes too long, the service is full all
        the time, or the key is refused.
        """
        headers = {"Content-Type": "application/json"}
        if key or self.key:
            headers["Authorization"] = f"Bearer {key or self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 (base_url)
        answer = self._patiently(request, path)
        if answer.status == 401 and key is None:
            raise Stopped(
                "API_KEY is not the key of the service"
                if self.key
                else "the endpoint asks for a key, and this repository has none"
            )
        return answer

    def _patiently(self, request: urllib.request.Request, path: str) -> Answer:
        """The answer of a service that has room for it."""
        until, pause = time.monotonic() + self.timeout, FIRST_PAUSE
        while (answer := self._within(request, path)).status == 429:
            if time.monotonic() + pause > until:
                raise Stopped(f"{path} answers 429 for {self.timeout:g} s: others fill the service")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return answer

    def embed(self, texts: Sequence[str], encoding: str = "base64") -> Embeddings:
        """Embeddings as OpenAI's clients ask for them: in base64, unless told otherwise."""
        body = {"input": list(texts), "model": self.model, "encoding_format": encoding}
        said = self.request("/v1/embeddings", body).expect(200).mapping()
        data, usage = said.get("data"), said.get("usage")
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise Failed("/v1/embeddings answers without a list of embeddings")
        if len(data) != len(texts):
            raise Failed(f"{len(data)} vectors came for {len(texts)} texts")
        if [item.get("index") for item in data] != list(range(len(texts))):
            raise Failed("the indices of the vectors do not count up from 0")
        decode = _decoded if encoding == "base64" else _numbers
        vectors = [decode(item.get("embedding")) for item in data]
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return Embeddings(vectors, said.get("model"), tokens if type(tokens) is int else None)

    def _within(self, request: urllib.request.Request, path: str) -> Answer:
        """The answer, or Stopped when it is not whole in time.

        In a thread that is left behind then: a socket's own timeout starts anew with each byte.
        """
        came: list[Answer | Exception] = []

        def exchange() -> None:
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    came.append(Answer(path, response.status, response.read(LONGEST_ANSWER + 1)))
            except urllib.error.HTTPError as error:
                came.append(_refusal(error, path))
            except Exception as error:
                came.append(error)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(self.timeout)
        [answer] = came or [TimeoutError()]
        reason = getattr(answer, "reason", answer)
        if isinstance(reason, TimeoutError):
            raise Stopped(f"{path}: no whole answer within {self.timeout:g} s")
        if isinstance(answer, http.client.HTTPException | ValueError):
            raise Failed(f"{path}: what answers is no HTTP server, or is cut ({_kind(answer)})")
        if isinstance(answer, Exception):
            raise Failed(f"{path}: {reason if isinstance(answer, OSError) else _kind(answer)}")
        if len(answer.body) > LONGEST_ANSWER:
            raise Failed(f"{path} answers more than {LONGEST_ANSWER >> 20} MiB")
        return replace(answer, key=self.key)


def base_url(text: str) -> str:
    """The URL without a slash at its end; raises ValueError with a reason that shows no login."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("--url is no http:// or https:// URL") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError("--url is no http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("--url holds a login: leave it out, and set API_KEY")
    if parts.query or parts.fragment or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("--url holds what is no part of an address: scheme, host, port, path")
    return text.rstrip("/")


def header_key(text: str) -> str:
    """A key without the line feed that a file ends with; raises ValueError, never showing it."""
    key = text.strip()
    if not key:
        raise ValueError("set API_KEY to the key of the service")
    if not key.isascii() or not key.isprintable():
        raise ValueError("API_KEY holds a character that no HTTP header can carry")
    return key


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two vectors of any length; 0 when one of them is nothing."""
    if len(a) != len(b):
        raise Failed(f"a vector has {len(a)} numbers, and another {len(b)}")
    lengths = math.hypot(*a) * math.hypot(*b)
    found = sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
    return found if math.isfinite(found) else 0.0


def _refusal(error: urllib.error.HTTPError, path: str) -> Answer | Exception:
    """Also a redirect, which says where to in the place of its body."""
    try:
        with error:
            if 300 <= error.code < 400:
                return Answer(path, error.code, b"a redirect, which is not followed")
            return Answer(path, error.code, error.read(LONGEST_ANSWER + 1))
    except Exception as broken:
        return broken


def _kind(error: object) -> str:
    return type(error).__name__


def _numbers(values: object) -> list[float]:
    if not isinstance(values, list) or not values:
        raise Failed("what came is no vector")
    try:
        numbers = [float(v) if type(v) in (int, float) else math.nan for v in values]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise Failed("a number of the vector is missing: the model computes none, or overflows")
    return numbers


def _decoded(text: object) -> list[float]:
    if not isinstance(text, str):
        raise Failed("base64 was asked for, and something else came")
    try:
        raw = base64.b64decode(text, validate=True)
        return _numbers(list(struct.unpack(f"<{len(raw) // 4}f", raw)))
    except (ValueError, binascii.Error, struct.error):
        raise Failed("what came is no base64 of 32-bit numbers") from None
