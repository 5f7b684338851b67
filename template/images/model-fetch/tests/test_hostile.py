"""A server that means no good, or is broken beyond what a network does, by kind.

Whatever it sends: model-fetch ends in time, in one line, with a documented code, and tells nobody else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from fetchkit.hostile import (
    Answer,
    Asked,
    Handler,
    Hostile,
    answering,
    dripping,
    encoded,
    flooding,
    honest,
    instead,
    signing,
)
from fetchkit.models import PinnedModel, embedding_model
from fetchkit.program import DOCUMENTED, Pod, Run, assert_failed, assert_ready
from model_fetch.embedding_model import PinnedFile
from model_fetch.failures import exit_code
from model_fetch.refusals import explained

TINY = PinnedModel(embedding_model(weights=4096), "mlflow-artifacts:/model")
DIGESTED = PinnedModel(TINY.files, TINY.artifact_uri, sha256=True)
WEIGHTS = "model.safetensors"
IN_TIME = ("--retries", "0", "--timeout", "1", "--connections", "1", "--attempts", "1")
TOKEN = "t0ken-of-the-pod"
LOGIN = {
    "MLFLOW_KEYCLOAK_CLIENT_ID": "fetch",
    "MLFLOW_CLIENT_SECRET": "client-5ecret",
    "MLFLOW_AUTH_USERNAME": "ada",
    "MLFLOW_AUTH_PASSWORD": "pa55word",
}


def fetch(pod: Pod, handler: Handler, *options: str, env: dict[str, str] | None = None) -> Run:
    """A run against a server; the options make it impatient."""
    with answering(handler) as server:
        return pod.run(TINY, server.url, *(options or IN_TIME), env=env, timeout=25)


def assert_told(run: Run, pod: Pod) -> None:
    """Ready, or a documented code with one short line."""
    if run.code == 0:
        assert pod.holds(TINY)
        return
    assert run.code in DOCUMENTED, run.log
    assert_failed(run, pod, run.code)
    assert len(run.last) < 520
    assert "Traceback" not in run.log


@pytest.fixture
def thief() -> Iterator[Hostile]:
    """Another server, which would like to be told things. Called by another name: another origin."""
    with answering(lambda asked: (200, {}, {"access_token": "t", "expires_in": 300})) as server:
        yield server


def elsewhere(server: Hostile) -> str:
    return server.url.replace("127.0.0.1", "localhost")


# A login form is sent once


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["another host", "the same host", "no address"])
def test_a_login_form_goes_along_no_redirect(
    pod: Pod, thief: Hostile, status: int, where: str
) -> None:
    to = {"another host": elsewhere(thief), "the same host": "", "no address": "http://[::1"}[where]
    moved = {"Location": f"{to}/other"}
    with answering(lambda asked: (status, moved, b"")) as login:
        env = {**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": f"{login.url}/token"}
        run = fetch(pod, honest(TINY), env=env)
    assert_failed(run, pod, 5)
    assert "MLFLOW_KEYCLOAK_TOKEN_URL" in run.last
    assert len(login.asked) == 1
    assert thief.asked == []


# Nothing that could be a credential crosses to another origin


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_credential_follows_a_redirect(pod: Pod, thief: Hostile, status: int) -> None:
    def move(asked: Asked) -> Answer:
        return status, {"Location": elsewhere(thief) + asked.path}, b""

    fetch(pod, move, env={"MLFLOW_TRACKING_TOKEN": TOKEN})
    assert thief.asked
    for asked in thief.asked:
        assert asked.headers.keys() <= {
            *("host", "accept-encoding", "user-agent", "range", "if-range", "accept")
        }
        assert asked.body == b""


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_question_and_no_header_of_a_store_follows_one(
    pod: Pod, thief: Hostile, status: int
) -> None:
    """A signed address's question has a body; its answer brings headers."""
    direct = PinnedModel(TINY.files, "s3://b/1/run1/artifacts/model", more={"run_id": "run1"})
    moved = (status, {"Location": elsewhere(thief) + "/x"}, b"")
    with answering(lambda asked: moved) as server:
        run = pod.run(direct, server.url, *IN_TIME, env={"HOME": str(pod.folder)})
    assert run.code in (2, 3, 4, 5), run.log
    headers = {"x-amz-server-side-encryption-customer-key": "5ecret"}
    with answering(lambda asked: moved) as store:
        signed = signing(TINY, lambda file: {"url": f"{store.url}/{file}", "headers": headers})
        fetch(pod, signed)
        assert "5ecret" in store.asked[0].headers.values()
    for asked in thief.asked:
        assert asked.body == b""
        assert "5ecret" not in asked.headers.values()
        assert "run1" not in str(asked)


def test_a_login_that_a_redirect_cost_is_told(pod: Pod) -> None:
    with answering(lambda asked: (401, {}, b"")) as strict:
        to = elsewhere(strict)
        moved = fetch(
            pod,
            lambda asked: (308, {"Location": to + asked.path}, b""),
            env={"MLFLOW_TRACKING_TOKEN": TOKEN},
        )
    assert_failed(moved, pod, 4)
    assert f"leads to {to}, which gets no credentials" in moved.last


# No step from https to http


@pytest.mark.parametrize("of", ["", "server-info", "config.json"])
def test_no_redirect_leads_from_https_to_http(pod: Pod, certificate: Path, of: str) -> None:
    env = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificate / "cert.pem")}
    with answering(honest(TINY)) as plain:

        def move(asked: Asked) -> Answer:
            if asked.path.endswith(of):
                return 307, {"Location": plain.url + asked.path}, b""
            return honest(TINY)(asked)

        with answering(move, certificate) as secure:
            run = pod.run(TINY, secure.url, *IN_TIME, env=env)
    assert plain.asked == []
    assert run.code == (0 if of == "server-info" else 5), run.log
    assert "without TLS" in run.log


@pytest.mark.parametrize("model", [TINY, DIGESTED], ids=["no digest", "digests"])
def test_signed_addresses_without_tls_are_for_pinned_digests(
    pod: Pod, certificate: Path, model: PinnedModel
) -> None:
    env = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificate / "cert.pem")}
    with answering(lambda asked: (200, {}, model.files[asked.path.strip("/")])) as store:
        signed = signing(model, lambda file: {"url": f"{store.url}/{file}"})
        with answering(signed, certificate) as secure:
            run = pod.run(model, secure.url, *IN_TIME, env=env)
    assert_ready(run, pod, model)
    if model.sha256:
        assert len(store.asked) > len(model.files)
    else:
        assert store.asked == []
        assert "without TLS" in run.log


# What comes with a signed address


@pytest.mark.parametrize(
    "headers",
    [
        *(
            None,
            ["a"],
            "x",
            5,
            {"": "a"},
            {"x-amz-a": "b\r\nC: d"},
            {"x-amz-a": "漢"},
            {"x-amz-a": 5},
        ),
        *(
            {"X-Amz A": "b"},
            {"x-amz-a:b": "c"},
            {"Content-Length": "100000"},
            {"Range": "bytes=9-"},
        ),
        *({"Transfer-Encoding": "chunked"}, {"Expect": "100-continue"}, {"Cookie": "a=b"}),
        *(
            {"Host": "metadata.google.internal", "Metadata-Flavor": "Google"},
            {"Connection": "close"},
        ),
        *({"X-aws-ec2-metadata-token": "a"}, {"X-Google-Metadata-Request": "True"}),
        {"Authorization": "Bearer x"},
    ],
    ids=str,
)
def test_only_the_stores_own_headers_are_sent(pod: Pod, headers: Any) -> None:
    given = (
        {**headers, "x-amz-meta": "m", "X-MS-Version": "v"}
        if isinstance(headers, dict)
        else headers
    )
    with answering(lambda asked: (200, {}, TINY.files[asked.path.strip("/")])) as store:
        run = fetch(
            pod, signing(TINY, lambda file: {"url": f"{store.url}/{file}", "headers": given})
        )
    assert_ready(run, pod, TINY)
    sent = {"host", "accept-encoding", "user-agent", "range"}
    sent |= {"x-amz-meta", "x-ms-version"} if isinstance(headers, dict) else set()
    for asked in store.asked:
        assert asked.headers.keys() <= sent
        assert asked.headers["host"] == f"127.0.0.1:{store.port}"


METADATA = [
    *("169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518"),
    *("[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[fe80::1]", "[fd00:ec2::254]"),
    *("100.100.100.200", "168.63.129.16"),
]


@pytest.mark.parametrize("host", METADATA)
def test_no_server_sends_the_program_to_a_metadata_service(pod: Pod, host: str) -> None:
    url = f"http://{host}/latest/meta-data/"
    started = time.monotonic()
    signed = fetch(pod, signing(TINY, lambda file: {"url": url}))
    assert_ready(signed, pod, TINY)
    assert "link-local or metadata address" in signed.log
    other = Pod(pod.folder / "other")
    moved = fetch(other, instead(honest(TINY), WEIGHTS, (302, {"Location": url}, b"")))
    assert_failed(moved, other, 5)
    assert "link-local or metadata address" in moved.last
    assert time.monotonic() - started < 20


# What comes too slowly, or without end


@pytest.mark.parametrize(
    ("status", "size"),
    [(200, 1), (200, 4_000), (200, 70_000), (302, 60_000), (403, 60_000), (416, 9), (503, 60_000)],
)
def test_a_body_that_drips(pod: Pod, size: int, status: int) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {size}\r\nLocation: /x\r\n\r\n".encode()
    slow = dripping(b"x" * size, head)
    run = fetch(pod, instead(honest(TINY), WEIGHTS, slow))
    assert_told(run, pod)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SLOW: dict[str, Answer] = {
    "a status line drips": dripping(b"HTTP/1.1 200 " + b"O" * 60_000),
    "headers drip": dripping(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60_000),
    "a header a second, each whole": dripping(
        b"X: a\r\n" * 600, b"HTTP/1.1 200 OK\r\n", every=0.3, step=6
    ),
    "100 Continue without end": flooding(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103 Early Hints without end": flooding(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
    "100 Continue now and then": dripping(
        b"HTTP/1.1 100 Continue\r\n\r\n" * 600, every=0.3, step=25
    ),
    "a chunk's size drips": dripping(b"0" * 60_000, CHUNKED),
    "a chunk's extension drips": dripping(b"1;" + b"a" * 60_000, CHUNKED),
    "a chunk's body drips": dripping(b"x" * 60_000, CHUNKED + b"FFFF\r\n"),
    "trailers drip": dripping(b"X: " + b"a" * 60_000, CHUNKED + b"1\r\nx\r\n0\r\n"),
    "trailers without end": flooding(b"X: a\r\n", CHUNKED + b"1\r\nx\r\n0\r\n"),
    "chunks of one byte": dripping(b"1\r\nx\r\n" * 600, CHUNKED, every=0.1, step=6),
    "headers without end": flooding(b"X: a\r\n", b"HTTP/1.1 200 OK\r\n"),
    "a line without end": flooding(b"a", b"HTTP/1.1 200 OK\r\nX: "),
    "an error without end": flooding(b"a", b"HTTP/1.1 403 No\r\n\r\n"),
    "a redirect whose text has no end": flooding(b"a", b"HTTP/1.1 302 X\r\nLocation: /x\r\n\r\n"),
    "a body that only does not end": dripping(b"", CHUNKED, every=0),
}


SOME = [*SLOW][::4]


@pytest.mark.parametrize("what", SLOW)
def test_no_file_is_waited_for_without_end(pod: Pod, what: str) -> None:
    assert_told(fetch(pod, instead(honest(TINY), WEIGHTS, SLOW[what])), pod)


@pytest.mark.parametrize("of", ["server-info", "presigned/model/modules.json"])
@pytest.mark.parametrize("what", SOME)
def test_no_small_answer_is_waited_for_without_end(pod: Pod, what: str, of: str) -> None:
    assert_told(fetch(pod, instead(signing(TINY, lambda file: {}), of, SLOW[what])), pod)


@pytest.mark.parametrize("what", SOME)
def test_a_login_server_is_not_waited_for_without_end(pod: Pod, what: str) -> None:
    with answering(lambda asked: SLOW[what]) as login:
        env = {**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url}
        run = fetch(pod, honest(TINY), env=env)
    assert_told(run, pod)
    assert run.code == 5 or what.startswith("an error"), run.log


def test_a_whole_that_stands_still_though_each_connection_brings_a_byte(pod: Pod) -> None:
    """Each answer brings something, so no chunk ever fails often enough in a row."""
    model = PinnedModel(embedding_model(weights=400_000), TINY.artifact_uri)

    def one_byte(asked: Asked) -> Answer:
        if asked.file != WEIGHTS:
            return honest(model)(asked)
        status, headers, part = honest(model)(asked)  # type: ignore[misc]
        whole = encoded(status, headers, part)
        head, _, body = whole.partition(b"\r\n\r\n")
        return lambda out: out(head + b"\r\n\r\n" + body[:1])

    with answering(one_byte) as server:
        started = time.monotonic()
        run = pod.run(model, server.url, "--timeout", "0.2", timeout=50)
    assert_failed(run, pod, 5)
    assert "next to nothing has arrived" in run.last
    assert time.monotonic() - started > 3


def test_a_body_without_a_length_that_never_ends_is_whole_when_all_is_there(pod: Pod) -> None:
    def endless(asked: Asked) -> Answer:
        content = TINY.files.get(asked.file)
        if content is None:
            return None

        def send(out: Callable[[bytes], None]) -> None:
            out(b"HTTP/1.1 200 OK\r\n\r\n" + content)
            time.sleep(15)

        return send

    assert_ready(fetch(pod, endless), pod, TINY)


# Answers that are none


ODD_ANSWERS: dict[str, bytes] = {
    "Retry-After: ²": b"HTTP/1.1 503 X\r\nRetry-After: \xb2\r\nContent-Length: 0\r\n\r\n",
    "Retry-After of 400 digits": b"HTTP/1.1 429 X\r\nRetry-After: "
    + b"9" * 400
    + b"\r\nContent-Length: 0\r\n\r\n",
    "Retry-After: -1": b"HTTP/1.1 503 X\r\nRetry-After: -1\r\nContent-Length: 0\r\n\r\n",
    "Retry-After: nan": b"HTTP/1.1 503 X\r\nRetry-After: nan\r\nContent-Length: 0\r\n\r\n",
    "Content-Range of 5,000 digits": b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-4/"
    + b"9" * 5000
    + b"\r\nContent-Length: 5\r\n\r\nxxxxx",
    "Content-Range in Arabic digits": "HTTP/1.1 206 X\r\nContent-Range: bytes ٠-4/5\r\n"
    "Content-Length: 5\r\n\r\nxxxxx".encode(),
    "Content-Length of 5,000 digits": b"HTTP/1.1 200 X\r\nContent-Length: "
    + b"9" * 5000
    + b"\r\n\r\nx",
    "Content-Length: -1": b"HTTP/1.1 200 X\r\nContent-Length: -1\r\n\r\nx",
    "two lengths": b"HTTP/1.1 200 X\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "a chunk of -1": CHUNKED + b"-1\r\nx\r\n",
    "a chunk of a size that is none": CHUNKED + b"zz\r\nx\r\n",
    "a chunk of 10^4000": CHUNKED + b"F" * 4000 + b"\r\nx\r\n",
    "status ²": b"HTTP/1.1 \xb2 X\r\n\r\n",
    "status 99999": b"HTTP/1.1 99999 X\r\n\r\n",
    "HTTP/9": b"HTTP/9 200 X\r\n\r\n",
    "HTTP/0.9": b"<html>hello</html>",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "nothing": b"",
    "200 headers": b"HTTP/1.1 200 X\r\n" + b"X: a\r\n" * 200 + b"\r\n",
    "an ETag with a fold": b'HTTP/1.1 206 X\r\nETag: "a\r\n b"\r\nContent-Range: bytes 0-4/5\r\n'
    b"Content-Length: 5\r\n\r\nxxxxx",
    "headers that are not Latin-1": 'HTTP/1.1 200 X\r\nETag: "漢\x1b[31m"\r\n\r\n'.encode(),
    "a Date that is none, with a refusal": b"HTTP/1.1 403 X\r\nDate: 99 99 9999 99:99\r\n"
    b"Content-Length: 0\r\n\r\n",
}
NO_ADDRESSES = [
    *("http://[::1/x", "http://127.0.0.1:99999/x", "http://127.0.0.1:abc/x", "http://a..b/"),
    *(f"http://{'a' * 70}.x/", "http://", "//", "http://[fe80::1%25x", "ftp://h/x", "file:///etc"),
    *("javascript:x", "http://h\\@x/", "http://\xe4\xf6.x:0/", "\x00", "http://h:1_0/"),
]


@pytest.mark.parametrize("what", ODD_ANSWERS)
def test_an_answer_that_is_none(pod: Pod, what: str) -> None:
    answer = ODD_ANSWERS[what]
    assert_told(fetch(pod, instead(honest(TINY), WEIGHTS, lambda out: out(answer))), pod)


@pytest.mark.parametrize("to", NO_ADDRESSES)
def test_a_redirect_to_no_address(pod: Pod, to: str) -> None:
    head = f"HTTP/1.1 302 X\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    assert_told(fetch(pod, instead(honest(TINY), WEIGHTS, lambda out: out(head))), pod)


ODD_JSON: list[Any] = [
    *(b"", b"null", b"[]", b'"x"', b"5", b"NaN", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff"),
    *(b'{"url": null}', b'{"url": 5}', b'{"url": ["http://h/"]}', b'{"url": {}, "url": {}}'),
    b'{"url": "http://h/", "headers": ' + b"[" * 5_000 + b"}",
    b'{"n": ' + b"9" * 10_000 + b"}",
    *({"url": url} for url in NO_ADDRESSES),
]


@pytest.mark.parametrize("body", ODD_JSON, ids=lambda body: str(body)[:30])
def test_a_signed_address_that_is_none(pod: Pod, body: Any) -> None:
    def answer(asked: Asked) -> Answer:
        odd = "/presigned/" in asked.path
        return (200, {}, body) if odd else signing(TINY, lambda file: {})(asked)

    assert_ready(fetch(pod, answer), pod, TINY)


@pytest.mark.parametrize("body", ODD_JSON[:10], ids=lambda body: str(body)[:30])
def test_a_server_info_that_is_none(pod: Pod, body: Any) -> None:
    run = fetch(pod, instead(honest(TINY), "server-info", (200, {}, body)))
    assert_ready(run, pod, TINY)


@pytest.mark.parametrize(
    "body",
    [
        *ODD_JSON[:10],
        *(
            {"access_token": token}
            for token in ("", 5, None, ["a"], "漢", "a b", "a\nb", "\x1b[31m")
        ),
        b'{"access_token": "t", "expires_in": 1' + b"0" * 400 + b"}",
        b'{"access_token": "t", "expires_in": NaN}',
    ],
    ids=lambda body: str(body)[:30],
)
def test_a_token_that_is_none(pod: Pod, body: Any) -> None:
    with answering(lambda asked: (200, {}, body)) as login:
        run = fetch(pod, honest(TINY), env={**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url})
    assert_failed(run, pod, 5)
    assert "without a token" in run.last


@pytest.mark.parametrize("lifetime", [0, -1, 0.5, 1e300, "300", None, True, [], {}, 10**17])
def test_any_lifetime_of_a_token_will_do(pod: Pod, lifetime: Any) -> None:
    body = {"access_token": "t", "expires_in": lifetime}
    with answering(lambda asked: (200, {}, body)) as login:
        run = fetch(pod, honest(TINY), env={**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url})
    assert_ready(run, pod, TINY)
    assert len(login.asked) <= 2


# What the store itself says


FILE = PinnedFile(WEIGHTS, WEIGHTS, 1)
OTHER_CLOCK = "Sun, 01 Jan 2040 00:00:00 GMT"


def refusal(code: str, message: str = "") -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.mark.parametrize(
    ("status", "date", "body", "code", "text"),
    [
        (404, None, refusal("NoSuchBucket"), 2, "bucket"),
        (404, None, refusal("ContainerNotFound"), 2, "bucket"),
        (404, None, refusal("NoSuchKey"), 3, "register the model again"),
        (404, None, refusal("BlobNotFound"), 3, "register the model again"),
        (403, None, refusal("InvalidAccessKeyId"), 4, "AWS_ACCESS_KEY_ID"),
        (403, None, refusal("SignatureDoesNotMatch"), 4, "AWS_SECRET_ACCESS_KEY"),
        (403, OTHER_CLOCK, refusal("SignatureDoesNotMatch"), 4, "clock says"),
        (403, None, refusal("AccessDenied"), 4, "may read"),
        (403, OTHER_CLOCK, refusal("AccessDenied", "Request has expired"), 4, "clock says"),
        (403, OTHER_CLOCK, refusal("RequestTimeTooSkewed"), 4, "clock says"),
        (403, "99 99 9999", refusal("RequestTimeTooSkewed"), 4, "RequestTimeTooSkewed"),
        (403, "Sun, 01 Jan 99999999999 00:00:00 GMT", refusal("AccessDenied"), 4, "may read"),
        (400, None, refusal("ExpiredToken"), 4, "AWS_SESSION_TOKEN"),
        (400, None, refusal("AuthorizationHeaderMalformed"), 2, "AWS_DEFAULT_REGION"),
        (301, None, refusal("PermanentRedirect"), 2, "AWS_DEFAULT_REGION"),
        (403, None, refusal("Other.Code-1"), 4, "403, Other.Code-1"),
        (403, None, refusal("\x1b[31m" + "a" * 900), 4, "(403)"),
        (404, None, b"<html>not found</html>", 2, "MLFLOW_S3_ENDPOINT_URL"),
        (410, None, b"", 2, "MLFLOW_S3_ENDPOINT_URL"),
    ],
    ids=str,
)
def test_a_store_says_why(status: int, date: str | None, body: bytes, code: int, text: str) -> None:
    headers = Message()
    if date:
        headers["Date"] = date
    error = explained(status, headers, body, FILE, "S3 bucket b", True, "advice")
    assert error is not None
    assert exit_code(error) == code
    assert text in str(error)
    assert str(error).isprintable()


def test_what_a_store_says_is_what_the_run_ends_with(pod: Pod) -> None:
    pytest.importorskip("boto3", reason="no S3 client here: install boto3")
    direct = PinnedModel(TINY.files, "s3://bucket/model")
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "5ecret", "HOME": str(pod.folder)}
    with answering(lambda asked: (404, {}, refusal("NoSuchBucket"))) as store:
        run = pod.run(direct, None, *IN_TIME, env={**keys, "MLFLOW_S3_ENDPOINT_URL": store.url})
    assert_failed(run, pod, 2)
    assert "404, NoSuchBucket" in run.last


# Logins


def test_a_refused_login_is_final_and_its_reason_told(pod: Pod) -> None:
    said = {"error": "invalid_grant", "error_description": "Account is not fully set up\x1b[31m"}
    with answering(lambda asked: (401, {}, said)) as login:
        env = {**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url}
        run = fetch(pod, honest(TINY), "--connections", "8", env=env)
    assert_failed(run, pod, 4)
    assert "(invalid_grant: Account is not fully set up" in run.last
    assert "MLFLOW_KEYCLOAK_SCOPE" in run.last
    assert len(login.asked) == 1


@pytest.mark.parametrize(
    ("password", "echo"),
    [
        ("pa55word", "wrong: pa55word"),
        ("pa55/w@rd", "in grant_type=password&password=pa55%2Fw%40rd"),
        ("pa55/w@rd", "in password=pa55%2fw%40rd&"),
        ("pa55 word", "in password=pa55+word&"),
    ],
)
def test_a_reason_that_repeats_the_password_is_not_told(pod: Pod, password: str, echo: str) -> None:
    said = {"error": "no", "error_description": echo}
    env = LOGIN | {"MLFLOW_AUTH_PASSWORD": password}
    with answering(lambda asked: (400, {}, said)) as login:
        run = fetch(pod, honest(TINY), env={**env, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url})
    assert_failed(run, pod, 4)
    assert "pa55" not in run.log


@pytest.mark.parametrize("status", [404, 405])
def test_a_realm_that_is_not_there_is_a_setting(pod: Pod, status: int) -> None:
    with answering(lambda asked: (status, {}, {"error": "Realm does not exist"})) as login:
        run = fetch(pod, honest(TINY), env={**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": login.url})
    assert_failed(run, pod, 2)
    assert "MLFLOW_KEYCLOAK_TOKEN_URL" in run.last


def test_a_login_page_is_answered_by_one_new_login(pod: Pod) -> None:
    """As oauth2-proxy does: 403 with a page to a token that it does not take, also of files."""
    tokens = iter(f"t{number}" for number in range(100))

    def login(asked: Asked) -> Answer:
        return 200, {}, {"access_token": next(tokens), "expires_in": 300}

    def guarded(asked: Asked) -> Answer:
        if asked.headers.get("authorization") not in ("Bearer t1", "Bearer t2"):
            return 403, {"Content-Type": "text/html"}, b"<html>Log in</html>"
        return signing(TINY, lambda file: {"url": f"{store.url}/{file}"})(asked)

    with (
        answering(login) as provider,
        answering(lambda asked: (200, {}, TINY.files[asked.path.strip("/")])) as store,
    ):
        env = {**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": provider.url}
        run = fetch(pod, guarded, env=env)
        assert_ready(run, pod, TINY)
        assert len(provider.asked) == 2
        assert "presigned by" in run.log
        other = Pod(pod.folder / "other")
        page = (403, {"Content-Type": "text/html"}, b"<html>Log in</html>")
        refused = fetch(other, lambda asked: page, env=env)
    assert_failed(refused, other, 4)
    assert "web page" in refused.last
    assert len(provider.asked) <= 2 + 4


def test_json_is_asked_for_where_json_is_wanted(pod: Pod) -> None:
    signed = signing(TINY, lambda file: {})
    with answering(signed) as server:
        assert_ready(pod.run(TINY, server.url, *IN_TIME), pod, TINY)
    for asked in server.asked:
        if not asked.file:
            assert asked.headers["accept"] == "application/json"


def test_a_login_server_that_comes_up_late_does_not_lead_to_the_slow_way(pod: Pod) -> None:
    away = iter([503] * 3)

    def login(asked: Asked) -> Answer:
        return next(away, 200), {}, {"access_token": "t", "expires_in": 300}

    with (
        answering(login) as provider,
        answering(lambda asked: (200, {}, TINY.files[asked.path.strip("/")])) as store,
    ):
        signed = signing(TINY, lambda file: {"url": f"{store.url}/{file}"})
        env = {**LOGIN, "MLFLOW_KEYCLOAK_TOKEN_URL": provider.url}
        run = fetch(pod, signed, "--retries", "5", env=env)
    assert_ready(run, pod, TINY)
    assert "presigned by" in run.log
    assert "try 1 of 6 failed" in run.log


# What is told


def test_why_it_tries_again_is_said_soon_and_once(pod: Pod) -> None:
    answers = iter([503] * 3 + [429] * 2)

    def busy(asked: Asked) -> Answer:
        status = next(answers, 200) if asked.file == WEIGHTS else 200
        return honest(TINY)(asked) if status == 200 else (status, {"Retry-After": "0"}, b"")

    run = fetch(pod, busy, "--connections", "1")
    assert_ready(run, pod, TINY)
    told = [line for line in run.log.splitlines() if "trying again" in line]
    assert len(told) == 2, run.log
    assert "answers 503" in told[0]
    assert "answers 429" in told[1]


def test_a_host_name_that_is_not_found_is_given_up_soon(pod: Pod) -> None:
    started = time.monotonic()
    run = pod.run(TINY, "http://no-such-host.invalid:5000", timeout=60)
    assert_failed(run, pod, 5)
    assert "host name not found" in run.last
    assert "3 tries in a row" in run.last
    assert time.monotonic() - started < 50


# Certificates and TLS


def test_https_to_a_plain_server_is_said_at_once(pod: Pod) -> None:
    with answering(honest(TINY)) as server:
        started = time.monotonic()
        run = pod.run(TINY, server.url.replace("http:", "https:"))
    assert_failed(run, pod, 2)
    assert "http:// instead of https://" in run.last
    assert time.monotonic() - started < 15


def test_http_to_a_tls_server_is_said_at_once(pod: Pod, certificate: Path) -> None:
    alert = b"\x15\x03\x01\x00\x02\x02\x46"
    run = fetch(pod, lambda asked: lambda out: out(alert))
    assert_failed(run, pod, 2)
    assert "https:// instead of http://" in run.last


@pytest.mark.parametrize(
    ("since", "until", "host", "text"),
    [
        (1, 2, "127.0.0.1", "clock says"),
        (-2, -1, "127.0.0.1", "clock says"),
        (-1, 1, "127.0.0.2", "a name that the certificate has"),
    ],
    ids=["not yet valid", "expired", "of another host"],
)
def test_what_is_wrong_with_a_certificate_is_said(
    pod: Pod, tmp_path: Path, since: int, until: int, host: str, text: str
) -> None:
    trustme = pytest.importorskip("trustme", reason="no certificates here: install trustme")
    authority, now = trustme.CA(), datetime.now(timezone.utc)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    made = authority.issue_cert(
        host, not_before=now + timedelta(days=since), not_after=now + timedelta(days=until)
    )
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    env = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(tmp_path / "ca.pem")}
    with answering(honest(TINY), tmp_path) as server:
        run = pod.run(TINY, server.url, env=env)
    assert_failed(run, pod, 2)
    assert text in run.last


def test_tls_without_checks_is_obeyed_and_warned_of(pod: Pod, certificate: Path) -> None:
    with answering(honest(TINY), certificate) as server:
        run = pod.run(TINY, server.url, env={"MLFLOW_TRACKING_INSECURE_TLS": "true"})
    assert_ready(run, pod, TINY)
    assert "warning: MLFLOW_TRACKING_INSECURE_TLS is set" in run.log


# Settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000x"),
        ("MLFLOW_TRACKING_URI", "http://[::1"),
        ("MLFLOW_TRACKING_URI", "127.0.0.1:5000"),
        ("MLFLOW_TRACKING_URI", "http://"),
        ("MLFLOW_TRACKING_URI", "http://a..b"),
        ("MLFLOW_TRACKING_TOKEN", "漢"),
        ("MLFLOW_TRACKING_TOKEN", "a\nb"),
        ("MLFLOW_KEYCLOAK_TOKEN_URL", "http://a:b"),
        ("MLFLOW_KEYCLOAK_TOKEN_URL", "keycloak/token"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "ture"),
        ("MODEL_FETCH_DIGESTS", "foo"),
        ("MODEL_FETCH_LOG_FORMAT", "JSON"),
        ("MODEL_FETCH_NO_SYNC", "on!"),
        ("MODEL_FETCH_TIMEOUT", "nan"),
        ("MODEL_FETCH_CONNECTIONS", "²"),
        ("MODEL_FETCH_RETRIES", "-1"),
    ],
)
def test_a_typing_mistake_names_its_variable(pod: Pod, variable: str, value: str) -> None:
    login = {**LOGIN, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    run = pod.run(TINY, None, "--retries", "0", env={**login, variable: value})
    assert run.code == 2, run.log
    assert variable in run.last
    assert "Traceback" not in run.log
    assert not pod.looks_complete()


@pytest.mark.parametrize(
    "variable", ["MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
)
@pytest.mark.parametrize("value", ["http://127.0.0.1:x", "minio:9000", "http://[::1"])
def test_an_endpoint_of_s3_that_is_no_address(pod: Pod, variable: str, value: str) -> None:
    direct = PinnedModel(TINY.files, "s3://bucket/model")
    run = pod.run(direct, None, env={variable: value, "AWS_ACCESS_KEY_ID": "a"})
    assert_failed(run, pod, 2)
    assert variable in run.last


@pytest.mark.parametrize(
    ("uri", "env"),
    [
        *((uri, {}) for uri in ("mlflow-artifacts://[::1/x", "mlflow-artifacts://h:abc/x")),
        *((uri, {}) for uri in ("http://127.0.0.1:99999/x", "http://a..b/x", "https:///x")),
        *((uri, {}) for uri in ("s3://UPPER_lower!/x", "s3:///x", "s3://a b/x", "s3://[/x")),
        ("s3://bucket/x", {"MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "foo"}),
        ("s3://bucket/x", {"AWS_DEFAULT_REGION": "no region!"}),
        ("s3://bucket/x", {"AWS_PROFILE": "nobody"}),
        ("s3://bucket/x", {"AWS_SECRET_ACCESS_KEY": ""}),
    ],
    ids=str,
)
def test_an_artifact_uri_or_a_setting_of_s3_that_cannot_be(
    pod: Pod, uri: str, env: dict[str, str]
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "HOME": str(pod.folder)}
    keys["MLFLOW_S3_ENDPOINT_URL"] = keys["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    run = pod.run(PinnedModel(TINY.files, uri), None, *IN_TIME, env={**keys, **env})
    assert_failed(run, pod, 2)


def test_a_line_feed_at_a_secrets_end_is_not_part_of_it(pod: Pod) -> None:
    """`kubectl create secret --from-file` keeps that of the file."""
    with answering(honest(TINY)) as server:
        env = {"MLFLOW_TRACKING_USERNAME": "ada\n", "MLFLOW_TRACKING_PASSWORD": "pa55\n"}
        assert_ready(pod.run(TINY, server.url, env=env), pod, TINY)
    assert {asked.headers.get("authorization") for asked in server.asked} == {"Basic YWRhOnBhNTU="}


def test_credentials_that_are_no_utf_8_are_sent_as_they_are(pod: Pod) -> None:
    with answering(honest(TINY)) as server:
        env = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "\udcff"}
        assert_ready(pod.run(TINY, server.url, env=env), pod, TINY)
    assert json.dumps([asked.headers.get("authorization") for asked in server.asked[:1]])
