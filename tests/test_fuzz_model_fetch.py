"""Every reader of model-fetch, on what was spoilt at random: see test_fuzz.py.

What a store, a login server and whoever writes to the volume can send or leave: it is believed, it
counts as none, or it is one of the documented errors.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.test_fuzz import DOCUMENTS, HEADER, JUNK, seeded, spoilt

sys.path.insert(0, str(ROOT / "template/images/model-fetch"))

from model_fetch import addresses, auth, chunks, lock, prepare, refusals, responses, tensors
from model_fetch.cache import Marker, VersionFolder
from model_fetch.errors import TemplateError
from model_fetch.failures import INTERNAL, exit_code
from model_fetch.pin import Pin
from model_fetch.sources import HttpSource, Presigned, store_headers
from model_fetch.transport import ConnectionFailed, Request, redirected
from model_fetch.trust import Trust

DIGEST = "0" * 64
PATH, SIZE = "model.safetensors", 40
PIN = Pin.from_mapping(
    {
        "model_id": "acme/tiny",
        "registered_model": "acme-tiny",
        "selector": "3",
        "version": "3",
        "artifact_uri": "mlflow-artifacts:/model",
        "files": [
            {"path": PATH, "from": PATH, "size": SIZE, "sha256": DIGEST},
            {"path": "config.json", "from": "config.json", "size": 2},
        ],
        "facts": {"architecture": "bert"},
    }
)
FILE = PIN.files[0]


def ends(work: Any) -> Any:
    """What comes of it; an error must be one that has an exit code or leads to another try."""
    try:
        return work()
    except TemplateError as error:
        code = exit_code(error)
    except (ConnectionFailed, responses.Again, responses.NoRanges, responses.Wrong):
        return None
    assert code != INTERNAL
    return None


def as_bytes(draw: st.DataObject, value: Any) -> bytes:
    """A document as it may be found: spoilt, cut short, or with a byte changed."""
    data = json.dumps(draw.draw(spoilt(value))).encode()
    how = draw.draw(st.sampled_from(["whole", "whole", "cut", "byte"]))
    if how == "cut":
        return data[: draw.draw(st.integers(0, len(data)))]
    if how == "byte" and data:
        at = draw.draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw.draw(st.integers(0, 255))]) + data[at + 1 :]
    return data


MARKER = {
    "format": 1,
    "fingerprint": "f",
    "source": "s",
    "files": [
        {"path": PATH, "size": SIZE, "mtime_ns": 1, "sha256": DIGEST},
        {"path": "config.json", "size": 2, "mtime_ns": 1, "sha256": None},
    ],
    "prepared": [],
    "pin": {},
    "read_back": True,
    "fetched": {PATH: DIGEST},
}


@seeded
@given(st.data())
def test_a_marker(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    marker = Marker.from_json(as_bytes(data, MARKER))
    if marker is None:
        return
    assert Marker.from_json(marker.to_json().encode()) == marker
    folder = VersionFolder(tmp_path_factory.getbasetemp(), PIN)
    if folder._uncovered(marker) is None:  # believed: then it is the pin's own
        files = {file.path: file for file in marker.files}
        assert marker.fetched[PATH] == DIGEST
        assert files[PATH].size == SIZE
        assert set(files) >= {PATH}


JOURNAL = b"\n".join(
    [
        json.dumps({"path": PATH, "size": SIZE, "chunk": 16, "boot": "b"}).encode(),
        *(b'~"\\"5f0c\\""', b"+0", b"+2 1b851995", b"=2", b"!" + DIGEST.encode(), b""),
    ]
)


@seeded
@given(st.data())
def test_a_journal(data: st.DataObject) -> None:
    lines = JOURNAL.split(b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        junk = st.sampled_from(
            [b"+" + b"9" * 5000, b"+-1", b"=1e9", b'~"a\\r\\nX: y"', b"~[]", b"!0"]
        )
        lines[at] = data.draw(junk | st.binary(max_size=20) | st.just(lines[at] * 2))
    boot = data.draw(st.sampled_from(["b", "other", None]))
    progress = chunks.read_journal(b"\n".join(lines), PATH, SIZE, boot)
    if progress is None:
        return
    plan = chunks.Plan(SIZE, progress.chunk_size)
    assert all(0 <= index < len(plan) for index in progress.done)
    if progress.validator is not None:
        progress.validator.encode("latin-1")
        assert progress.validator.isprintable()


@seeded
@given(st.data())
def test_a_holder_s_record(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "beat"
    path.write_bytes(as_bytes(data, {"token": "t", "boot": "b", "beat": 1, "bytes": 2}))
    record = lock.Record.read(path)
    if record is not None:
        assert record.token.isprintable()
        assert record.bytes >= 0


@seeded
@given(st.data())
def test_a_header_of_weights(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "weights.safetensors"
    header = as_bytes(data, HEADER)
    length = data.draw(st.sampled_from([len(header), len(header), 0, 2**63, len(header) + 1]))
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(data.draw(st.integers(0, 8))))
    found = ends(lambda: tensors.read_header(path))
    if found is not None:
        end = max((tensor.end for tensor in found.values()), default=8 + length)
        assert end == path.stat().st_size


@seeded
@given(st.sampled_from(sorted(DOCUMENTS)), st.data())
def test_files_that_are_prepared(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for path, value in DOCUMENTS.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(
            as_bytes(data, value) if path == name else json.dumps(value).encode()
        )
    weights = json.dumps(HEADER).encode()
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        (folder / path).write_bytes(len(weights).to_bytes(8, "little") + weights + bytes(4))
    ends(lambda: prepare.prepare(folder, SimpleNamespace(conversion=None, facts=PIN.facts)))


class Told(HttpSource):
    """A source that is never asked."""

    name, advice = "S3 bucket b", "check the keys"

    def __init__(self, object_store: bool) -> None:
        self.object_store = object_store

    def check(self) -> None: ...

    def request(self, file: Any) -> Request:
        raise NotImplementedError


TEXTS = st.sampled_from(
    [
        *("bytes 0-3/40", "bytes 0-3/*", f"bytes 0-{'9' * 5000}/40", "bytes -1-3/40", "²", "1e9", "-1"),
        *("9" * 400, '"a"', "W/\x22a\x22", "a\tb", "é", "\x80", "", "text/html", "Sat, 99 Foo 2026 99:99"),
        *("http://169.254.169.254/", "//[::1", "http://a:99999/", "https://x\\@y/", "/a", "http://\u2603/"),
    ]
) | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=30)  # fmt: skip


@seeded
@given(st.sampled_from([200, 206, 301, 308, 400, 403, 404, 416, 429, 500, 503]), st.data())
def test_an_answer_of_a_store(status: int, data: st.DataObject) -> None:
    names = ("Content-Range", "Content-Length", "ETag", "Last-Modified", "Retry-After", "Date",
             "Content-Type", "Location", "Transfer-Encoding")  # fmt: skip
    head = {name: data.draw(TEXTS) for name in names if data.draw(st.booleans())}
    body = data.draw(
        st.binary(max_size=80) | st.just(b"<Error><Code>AccessDenied</Code>expired</Error>")
    )
    lines = "".join(f"{name}: {text}\r\n" for name, text in head.items())
    raw = f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + body
    ours, theirs = socket.socketpair()
    with ours, theirs:
        from model_fetch.transport import Answer

        theirs.sendall(raw)
        theirs.close()
        ours.settimeout(5)
        try:
            answer = Answer(ours, method="GET")
            answer.begin()
        except (http.client.HTTPException, OSError, ValueError):
            return  # the transport tells these: test_hostile.py
        source = Told(data.draw(st.booleans()))
        ends(lambda: responses.check_status(answer, FILE, source))
        ends(lambda: responses.check_range(answer, 0, 4, SIZE))
        ends(lambda: responses.check_length(answer, 4))
        name = responses.validator(answer)
        for value in responses.if_range(name).values():
            value.encode("latin-1")
        ends(lambda: redirected(Request("https://store/x"), status, answer.headers.get("Location")))


@seeded
@given(TEXTS, st.binary(max_size=200), st.sampled_from([400, 401, 403, 404, 410]), st.booleans())
def test_a_refusal_of_a_store(date: str, body: bytes, status: int, object_store: bool) -> None:
    headers = Message()
    headers["Date"] = date
    said = refusals.explained(status, headers, body, FILE, "S3", object_store, "check it")
    if said is not None:
        assert len(str(said)) <= 500
        assert str(said).isprintable()


@seeded
@given(spoilt({"url": "http://store/x", "headers": {"x-amz-a": "b", "Host": "c"}, "file_size": 4}))
def test_an_address_that_mlflow_signs(answer: Any) -> None:
    trust = Trust({}, insecure="X")
    signer = Presigned("http://mlflow", PIN, "model", None, auth.Credentials(), trust, 1.0)
    signer._ask = lambda _: answer if isinstance(answer, dict) else None  # type: ignore[method-assign]
    request = ends(lambda: signer.sign(FILE))
    if request is not None:
        assert addresses.checked(request.url) == request.url
        assert set(request.headers) <= {"x-amz-a", ""}
    for value in store_headers(answer).values():
        value.encode("ascii")


@seeded
@given(
    st.sampled_from([200, 400, 401, 403, 404, 500]),
    spoilt({"access_token": "t", "expires_in": 60, "error": "e", "error_description": "d"}),
)
def test_an_answer_of_a_login_server(status: int, answer: Any) -> None:
    trust = Trust({}, insecure="X")
    keycloak = auth.Keycloak("http://login/token", {"client_secret": "s3cret"}, trust, 1.0)
    said = answer if isinstance(answer, dict) else None
    found = ends(lambda: keycloak._read(SimpleNamespace(status=status, json=said)))
    if found is not None:
        token, lifetime = found
        token.encode("ascii")
        assert 0 < lifetime < 1e9


@seeded
@given(TEXTS | st.sampled_from([str(junk) for junk in JUNK]))
def test_an_address(text: str) -> None:
    for work in (lambda: addresses.checked(text), lambda: addresses.joined("http://a/b", text)):
        try:
            url = work()
        except addresses.BadAddress:
            continue
        assert addresses.checked(url) == url
        url.encode("ascii")
        addresses.origin(url)
        addresses.leads_to_metadata(text)


def test_a_pin_file_of_any_bytes(tmp_path: Path) -> None:
    """The program's own reading of --pin, with what no JSON writer makes."""
    from model_fetch.cli import _read_pin

    for data in (b"", b"\xff\xfe{}", b"[" * 100_000, b'{"a":1,"a":2}', b"NaN"):
        (tmp_path / "pin.json").write_bytes(data)
        with pytest.raises(TemplateError):
            _read_pin(tmp_path / "pin.json")
