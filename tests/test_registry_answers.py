"""An MLflow that answers otherwise: other types, pages without end, any size, any speed, other hosts."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from extensions import limits, pin, registry
from extensions.errors import ConfigurationError, TemplateError, UnreachableError
from tests.gateway import JSON, Answer, Gateway, Request, gateway
from tests.snapshots import CONFIG, safetensors

RUN = "0" * 32
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": safetensors({"embeddings.word_embeddings.weight": (30, 8)}),
}
Over = Callable[[Request], Answer | None]


def said(value: Any, **headers: str) -> Answer:
    return 200, {**JSON, **headers}, json.dumps(value).encode()


def mlflow(
    files: dict[str, bytes] | None = None,
    *,
    source: str = f"runs:/{RUN}/model",
    root: str = f"mlflow-artifacts:/0/{RUN}/artifacts",
    below: str = "model/",
    params: Any = (),
) -> Over:
    """One version of one model, as MLflow's REST API tells it."""
    content = {below + name: data for name, data in (files or FILES).items()}

    def answer(request: Request) -> Answer | None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path.endswith("model-versions/search"):
            row = {"name": "acme-x", "version": "1", "run_id": RUN, "status": "READY"}
            return said({"model_versions": [row | {"source": source}]})
        if url.path.endswith("registered-models/search"):
            return said({"registered_models": [{"name": "acme-x"}]})
        if url.path.endswith("runs/get"):
            data = {"params": list(params)}
            return said({"run": {"info": {"artifact_uri": root}, "data": data}})
        if url.path.endswith("artifacts/list"):
            folder = query["path"] + "/" if query.get("path") else ""
            rows = {}
            for path, data in content.items():
                if path.startswith(folder):
                    name, inner, _ = path[len(folder) :].partition("/")
                    size = {"is_dir": True} if inner else {"file_size": len(data)}
                    rows[name] = {"path": folder + name} | size
            return said({"files": list(rows.values())})
        if url.path.endswith("/get-artifact"):
            return 200, {}, content[query["path"]]
        if url.path.endswith("/version"):
            return 200, {}, b"3.4.0"
        return 404, JSON, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'

    return answer


def at(end: str, answer: Any) -> Over:
    """Answers one question otherwise: with a value, raw bytes, or a whole answer."""

    def rule(request: Request) -> Answer | None:
        if not urlsplit(request.path).path.endswith(end):
            return None
        if isinstance(answer, tuple):
            return answer
        return (200, JSON, answer) if isinstance(answer, bytes) else said(answer)

    return rule


Served = Callable[..., Gateway]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """`served(over, **how)`: an MLflow at MLFLOW_TRACKING_URI whose answers `over` replaces."""
    with ExitStack() as stack:

        def start(over: Over = lambda _: None, usual: Over | None = None) -> Gateway:
            rest = usual or mlflow()
            server = stack.enter_context(gateway(lambda r: over(r) or rest(r)))
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            return server

        yield start


def refusal(kind: type[TemplateError] = UnreachableError) -> str:
    with pytest.raises(kind) as told:
        pin.resolve("acme-x", "latest")
    assert str(told.value).isprintable()
    assert len(str(told.value)) <= 500
    return str(told.value)


SEARCH, RUNS, LIST = "model-versions/search", "runs/get", "artifacts/list"


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        (SEARCH, None), (SEARCH, []), (SEARCH, "x"), (SEARCH, {"model_versions": {"a": 1}}),
        (SEARCH, {"model_versions": None}), (SEARCH, {"model_versions": ["x"]}),
        (SEARCH, {"model_versions": [{"version": "1", "source": ["a"]}]}),
        (SEARCH, {"model_versions": [{"version": "1", "source": "a", "run_id": {"a": 1}}]}),
        (SEARCH, {"model_versions": [{"version": "1", "status": 1}]}),
        (SEARCH, {"model_versions": [{"version": "9" * 400}]}),
        (SEARCH, {"model_versions": [{"version": None}]}),
        (SEARCH, b"[" * 100_000), (SEARCH, b'{"model_versions": [], "model_versions": []}'),
        (SEARCH, b'{"a": NaN}'), (SEARCH, b'{"a": "\\ud800"}'), (SEARCH, b"\xff\xfe"),
        (RUNS, {"run": []}), (RUNS, {"run": {"info": None}}), (RUNS, {"run": {"info": {"artifact_uri": 1}}}),
        (RUNS, {"run": {"info": {}, "data": {"params": None}}}),
        (RUNS, {"run": {"info": {}, "data": {"params": ["a"]}}}),
        (LIST, {"files": None}), (LIST, {"files": ["x"]}), (LIST, {"files": {}}),
        (LIST, {"files": [{"path": 1}]}),
        (LIST, {"files": [{"path": "model/a", "file_size": "1e3"}]}),
        (LIST, {"files": [{"path": "model/a", "file_size": -5}]}),
        (LIST, {"files": [{"path": "model/a", "file_size": 2**53 + 1}]}),
        (LIST, {"files": [{"path": "model/a", "file_size": True}]}),
        (LIST, b'{"files": [{"path": "model/a", "file_size": 1e999}]}'),
        (LIST, {"files": [], "next_page_token": 5}),
    ],
)  # fmt: skip
def test_answers_of_other_types(served: Served, end: str, answer: Any) -> None:
    served(at(end, answer))
    told = refusal()
    assert "answers, but not as MLflow does" in told or "no version number" in told


@pytest.mark.parametrize("model", [True, [], "x", {"aliases": None}, {"aliases": ["x"]}])
def test_a_registered_model_of_another_type(served: Served, model: Any) -> None:
    """Found by `make fuzz`."""
    served(at("registered-models/get", {"registered_model": model}))
    with pytest.raises(TemplateError):
        pin.resolve("acme-x", "@best")


@pytest.mark.parametrize("rows", [[], [{"path": "elsewhere/x"}], [{"path": "../x"}]])
@pytest.mark.parametrize("token", ["same", "new"])
def test_pages_without_end(served: Served, rows: list[Any], token: str) -> None:
    count = iter(range(10_000))

    def pages(request: Request) -> Answer | None:
        page = {"files": rows, "next_page_token": token if token == "same" else str(next(count))}
        return said(page) if LIST in request.path else None

    server = served(pages)
    assert "pages without end" in refusal()
    assert len(server.requests) <= limits.PAGES + 5


def test_a_list_of_models_without_end(served: Served) -> None:
    page = {"registered_models": [], "next_page_token": "x"}
    server = served(at("registered-models/search", page))
    with pytest.raises(UnreachableError, match="pages without end"):
        pin.choices()
    assert len(server.requests) < 5


def test_a_folder_of_too_many_files(served: Served) -> None:
    rows = [{"path": f"model/{n}", "file_size": 1} for n in range(limits.ENTRIES + 1)]
    served(at(LIST, {"files": rows}))
    assert "more than 5000 files" in refusal()


BOMB = gzip.compress(b"{" + b" " * (64 << 20) + b"}", 9)


@pytest.mark.parametrize(
    ("end", "answer"),
    [
        ("/get-artifact", (200, {"Content-Encoding": "gzip"}, BOMB)),
        ("/get-artifact", (200, {}, b" " * (len(FILES["config.json"]) + 1))),
        ("/get-artifact", (200, {}, b"{}")),
        (SEARCH, (200, JSON | {"Content-Encoding": "gzip"}, BOMB)),
        (SEARCH, (200, JSON | {"Content-Encoding": "br"}, b"x")),
        (SEARCH, (200, JSON | {"Content-Encoding": "gzip"}, b"no gzip")),
        (SEARCH, (200, JSON, b" " * (limits.ANSWER_BYTES + 1))),
        (SEARCH, (500, JSON, b" " * (limits.ANSWER_BYTES + 1))),
    ],
)
def test_answers_of_another_size(served: Served, end: str, answer: Answer) -> None:
    served(at(end, answer))
    assert "127.0.0.1" in refusal()


def test_an_answer_that_is_compressed_all_the_same(served: Served) -> None:
    def zipped(request: Request) -> Answer | None:
        answer = mlflow()(request)
        assert answer is not None
        assert request.headers["Accept-Encoding"] == "identity"
        status, headers, body = answer
        return status, headers | {"Content-Encoding": "gzip"}, gzip.compress(body)

    served(zipped)
    assert pin.resolve("acme-x", "latest").facts.hidden_size == CONFIG["hidden_size"]


@pytest.mark.parametrize("part", ["status line", "header", "body"])
def test_an_answer_that_drips(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    import threading

    before = {"status line": b"HTTP/1.1 2", "header": b"HTTP/1.1 200 OK\r\nX: "}
    head = before.get(part, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        try:
            connection.sendall(head)
            while True:
                connection.sendall(b" ")
                time.sleep(0.2)
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        began = time.monotonic()
        assert "does not answer in time" in refusal()
        assert time.monotonic() - began < 10


def test_a_look_up_ends_however_many_answers_it_takes(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.limits, "LOOKUP_SECONDS", 0.0)
    served()
    assert "too slow" in refusal()


def test_a_redirect_leaves_the_server_s_name_never(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither token, nor workspace, nor the body of a search reaches another host."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-77b0")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    with gateway(mlflow()) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            away = f"{elsewhere.uri}/api/2.0/mlflow/model-versions/search"
            served(at(SEARCH, (status, {"Location": away}, b"")))
            assert "leads elsewhere" in refusal()
        assert elsewhere.requests == []
    for location in (
        "//evil.example/x",
        "file:///etc/passwd",
        "http://[::1",
        "http://169.254.169.254/latest/meta-data/",
        "http://0xA9FEA9FE/",
        "http://[fe80::1]/",
        "",
        "https://127.0.0.1:1/",
    ):
        served(at(SEARCH, (302, {"Location": location}, b"")))
        assert "127.0.0.1" in refusal()


@pytest.mark.parametrize(
    ("location", "follows"),
    [
        ("https://mlflow.example/b", True),
        ("/b", True),
        ("http://mlflow.example/b", False),
        ("//mlflow.example:8443/b", False),
        ("https://mlflow.example.evil.example/b", False),
        ("https://mlflow.example@evil.example/b", False),
    ],
)
def test_a_redirect_keeps_its_tls_and_its_server(location: str, follows: bool) -> None:
    asked = lambda: registry.Registry._redirected(  # noqa: E731
        SimpleNamespace(shown="https://mlflow.example"),  # type: ignore[arg-type]
        "https://mlflow.example/a",
        location,
    )
    if follows:
        assert asked() == ("https://mlflow.example", "/b")
        return
    with pytest.raises(TemplateError, match="leads elsewhere"):
        asked()


def test_a_redirect_within_the_server_is_followed(served: Served) -> None:
    def moved(request: Request) -> Answer | None:
        if request.path.startswith("/mlflow/"):
            return None
        return 308, {"Location": f"/mlflow{request.path}"}, b""

    server = served(moved)
    assert pin.resolve("acme-x", "latest").version == "1"
    assert any(r.path.startswith("/mlflow/") for r in server.requests)
    served(lambda r: (302, {"Location": r.path}, b""))
    assert "redirects without end" in refusal()


# Where a version's files are


def test_files_at_the_root_of_a_run(served: Served) -> None:
    root = f"s3://mlflow/1/{RUN}/artifacts"
    for source in (f"runs:/{RUN}", f"runs:/{RUN}/", f"runs:/{RUN}/.", root, f"{root}/"):
        served(usual=mlflow(source=source, below="", root=root))
        found = pin.resolve("acme-x", "latest")
        assert found.artifact_uri == root
        assert {f.source for f in found.files} >= {"config.json", "model.safetensors"}


def test_a_folder_with_what_means_something_in_a_uri(served: Served) -> None:
    from urllib.parse import unquote

    root = f"mlflow-artifacts:/0/{RUN}/artifacts"
    for folder in ("bge m3", "50% off", "a?b#c", "é ü"):
        for source in (f"runs:/{RUN}/{folder}", f"{root}/{folder}"):
            served(usual=mlflow(source=source, below=f"{folder}/"))
            uri = pin.resolve("acme-x", "latest").artifact_uri
            assert uri is not None
            assert unquote(urlsplit(uri).path) == f"/0/{RUN}/artifacts/{folder}"


def copies(rows: dict[str, str]) -> Over:
    """Versions of other models by name and number: their sources."""

    def rule(request: Request) -> Answer | None:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path.endswith(("model-versions/get", "registered-models/alias")):
            source = rows.get(f"{query['name']}/{query.get('version') or '@' + query['alias']}")
            if source is None:
                return 404, JSON, b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}'
            row = {"version": "7", "source": source, "run_id": RUN, "status": "READY"}
            return said({"model_version": row})
        return None

    return rule


def test_a_copied_version_is_followed(served: Served) -> None:
    chain = {"staging 1/2": "models:/first@best", "first/@best": f"runs:/{RUN}/model"}
    served(copies(chain), mlflow(source="models:/staging 1/2"))
    found = pin.resolve("acme-x", "latest")
    assert (found.registered_model, found.version) == ("acme-x", "1")
    assert str(found.artifact_uri).endswith("/artifacts/model")

    served(copies({"a/1": "models:/a/1"}), mlflow(source="models:/a/1"))
    assert "copies without end" in refusal(TemplateError)
    served(copies({}), mlflow(source="models:/gone/3"))
    assert "models:/gone/3, which is gone" in refusal(TemplateError)


def test_the_base_of_a_model_is_not_the_model(served: Served) -> None:
    """Many who fine-tune log their base as the run's parameter model_id."""
    served(usual=mlflow(params=[{"key": "model_id", "value": "BAAI/bge-base-en-v1.5"}]))
    assert pin.resolve("acme/x", "latest").model_id == "acme/x"
    assert pin.resolve("acme-x", "latest").model_id == "acme-x"
    served(usual=mlflow(params=[{"key": "model_id", "value": "acme/x"}]))
    assert pin.resolve("acme-x", "latest").model_id == "acme/x"


def test_the_workspace_is_pinned(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
    server = served()
    assert pin.resolve("acme-x", "latest").to_mapping()["workspace"] == "team-a"
    assert all(r.headers["X-MLFLOW-WORKSPACE"] == "team-a" for r in server.requests)
    monkeypatch.setenv("MLFLOW_WORKSPACE", "team a\r\n")
    assert "MLFLOW_WORKSPACE" in refusal(ConfigurationError)


@pytest.mark.parametrize(
    "root",
    [
        "ftp://svc:UPW-77@ftp.example/0", "https://UPW-77@host/a", "mlflow-artifacts://u:UPW-77@h/a",
        "https://host/a?sig=UPW-77", "runs:/a/b", "mlflow-artifacts://[::1", "s3://a\nb", "",
    ],
)  # fmt: skip
def test_an_artifact_uri_that_cannot_be_pinned(served: Served, root: str) -> None:
    served(usual=mlflow(root=root))
    assert "UPW-77" not in refusal(TemplateError)


# Settings


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_TRACKING_URI", "http://mlflow:5000x"),
        ("MLFLOW_TRACKING_URI", "http://[::1"),
        ("MLFLOW_TRACKING_URI", "http://"),
        ("MLFLOW_TRACKING_URI", "http:///x"),
        ("MLFLOW_TRACKING_URI", "http://mlflow:99999"),
        ("MLFLOW_TRACKING_TOKEN", "schlüssel"),
        ("MLFLOW_TRACKING_TOKEN", "a\nb"),
        ("MLFLOW_KEYCLOAK_TOKEN_URL", "http://[::1"),
        ("MLFLOW_KEYCLOAK_TOKEN_URL", "keycloak/token"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "-1"),
    ],
)
def test_a_setting_that_is_none_is_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    served()
    monkeypatch.setenv(variable, value)
    told = refusal(ConfigurationError)
    assert told.startswith(variable)
    assert value not in told


@pytest.mark.parametrize(
    "answer",
    [
        b"[]", b"[" * 100_000, b'{"access_token": 5}', b'{"access_token": ""}',
        b'{"access_token": "a\\nb"}', b'{"access_token": "\xc3\xbc"}', b'{"access_token": NaN}',
        b" " * (limits.ANSWER_BYTES + 1),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_token_that_is_none(
    served: Served, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    served()
    with gateway(lambda _: (200, JSON, answer)) as identity:
        monkeypatch.setenv("MLFLOW_KEYCLOAK_TOKEN_URL", f"{identity.uri}/token")
        monkeypatch.setenv("MLFLOW_KEYCLOAK_CLIENT_ID", "render")
        monkeypatch.setenv("MLFLOW_CLIENT_SECRET", "secret")
        assert "Keycloak at" in refusal()
