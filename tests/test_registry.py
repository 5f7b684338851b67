"""Lookups in real MLflow servers: every way in which a model is registered, on every kind of store."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pexpect
import pytest

from extensions import pin as pins
from extensions.pin import Pin
from tests.conftest import Run, environment, variables
from tests.gateway import JSON, Answer, Request, gateway, only_with
from tests.snapshots import (
    KINDS,
    LAYOUTS,
    REVISION,
    etag,
    lay_out,
    register,
    safetensors,
    snapshot,
    write,
)

SERVERS = ("mlflow_proxied", "mlflow_local", "mlflow_s3")
MODEL_ID = "acme/tiny-bert"


@pytest.fixture(scope="session", params=SERVERS)
def server(request: pytest.FixtureRequest, s3: dict[str, str]) -> str:
    """Each server in turn, with all layouts registered in it, as runs and as logged models."""
    uri = str(request.getfixturevalue(request.param))
    folder = request.getfixturevalue("tmp_path_factory").mktemp(f"models-{request.param}")
    source = snapshot(folder / "snapshot")
    with variables(s3):  # who registers has keys; who looks up has none
        for layout in LAYOUTS:
            laid = lay_out(source, layout, folder / layout)
            for kind in KINDS:
                register(uri, laid, f"acme-{layout}-{kind}", kind)
    return uri


@pytest.fixture
def lookup(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    return server


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_version_is_pinned_whatever_its_layout(lookup: str, layout: str, kind: str) -> None:
    pin = pins.resolve(f"acme/{layout}-{kind}", "latest")

    assert pin == Pin.from_mapping(pin.to_mapping())
    assert pin.registered_model == f"acme-{layout}-{kind}"
    assert pin.version == "1"
    assert (pin.logged_model_id is None) == (kind == "run")
    assert not (pin.artifact_uri or "").startswith(("runs:", "models:"))
    files = {file.path: file for file in pin.files}
    whole = {"1_Pooling/config.json", "modules.json", "sentence_bert_config.json"}
    whole |= {"config_sentence_transformers.json"} if layout != "pipeline" else set()
    parts = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert set(files) == parts | (whole if layout != "pipeline" else set())
    inner = {"mirror": "", "sentence-transformers": "model.sentence_transformer/"}
    assert files["config.json"].source == inner.get(layout, "model/") + "config.json"
    tokenizer = "components/tokenizer/" if layout == "pipeline" else inner.get(layout, "model/")
    assert files["tokenizer.json"].source == tokenizer + "tokenizer.json"
    assert pin.facts.architecture == "bert"
    assert pin.facts.dimensions == 8
    assert pin.facts.pooling == (None if layout == "pipeline" else "mean")
    tokens = {"sentence-transformers": 64, "pipeline": 64}  # sentence-transformers ≥ 5.4 moved it
    assert pin.facts.max_input_tokens == tokens.get(layout, 32)
    # 30 × 8 + 8, as the header says; where the server cannot send a part of a file, its size / 4.
    exact = (pin.artifact_uri or "").startswith("mlflow-artifacts:")
    assert pin.facts.parameters == (248 if exact else files["model.safetensors"].size // 4)
    assert pin.facts.dtype == "float32"


def test_the_pinned_sizes_are_those_of_the_stored_files(
    mlflow_proxied: str, mlflow_local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid = lay_out(snapshot(tmp_path / "snapshot"), "pipeline", tmp_path / "pipeline")
    for number, uri in enumerate((mlflow_proxied, mlflow_local)):
        register(uri, laid, f"acme-sizes-{number}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        pin = pins.resolve(f"acme-sizes-{number}", "latest")
        for file in pin.files:
            assert file.size == (laid / file.source).stat().st_size, file.path
    stored = Path(urlsplit(pin.artifact_uri or "").path)
    assert all((stored / file.source).is_file() for file in pin.files)


def test_a_mirror_brings_its_commit_and_digests(lookup: str, tmp_path: Path) -> None:
    source = snapshot(tmp_path / "same")
    pin = pins.resolve("acme/mirror-run", "latest")
    files = {file.path: file for file in pin.files}

    assert pin.revision == REVISION
    weights = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert files["model.safetensors"].sha256 == weights
    assert files["config.json"].blob_sha1 == etag(source / "config.json")
    assert files["1_Pooling/config.json"].blob_sha1 == etag(source / "1_Pooling/config.json")


def test_what_was_saved_anew_claims_no_commit(lookup: str) -> None:
    pin = pins.resolve("acme/checkpoint-run", "latest")

    assert pin.revision is None
    assert all(file.blob_sha1 is None for file in pin.files)
    # What was read whole while rendering has a digest all the same; the weights have none.
    assert {f.path for f in pin.files if f.sha256 is None} >= {"model.safetensors"}


def test_selectors(
    mlflow_proxied: str,
    mlflow_s3: str,
    s3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from demo.registry import connect

    source = snapshot(tmp_path / "snapshot", sidecars=False)
    for uri in (mlflow_proxied, mlflow_s3):
        with variables(s3):
            numbers = [register(uri, source, "acme-selected") for _ in range(11)]
        assert numbers[-1] == "11"  # as text it would sort below 2
        connect(uri).set_registered_model_alias("acme-selected", "champion", "2")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        found = {s: pins.resolve("acme/selected", s).version for s in ("latest", "7", "@champion")}
        assert found == {"latest": "11", "7": "7", "@champion": "2"}


def test_a_registered_name_is_understood_and_its_model_id_found(
    mlflow_proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)
    source = snapshot(tmp_path / "snapshot")
    register(mlflow_proxied, source, "acme-mirrored", model_id="acme/mirrored")
    register(mlflow_proxied, source, "own-name")

    assert pins.resolve("acme-mirrored", "latest").model_id == "acme/mirrored"
    assert pins.resolve("own-name", "latest").model_id == "own-name"
    labels = {value: label for label, value in pins.choices()}
    assert labels["acme/mirrored"] == "acme/mirrored, version 1, 0 MB"
    assert "own-name" in labels


def test_the_log_of_a_run_leads_to_its_logged_model(
    mlflow_proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`runs:/R/model` of MLflow 3: the run's own folder is empty."""
    from demo.registry import connect
    from demo.registry import register as register_version

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), "acme-by-logged", "logged-model")
    version = connect(mlflow_proxied).get_model_version("acme-by-logged", "1")
    register_version(mlflow_proxied, "acme-by-run", f"runs:/{version.run_id}/model", version.run_id)

    by_run = pins.resolve("acme-by-run", "latest")
    assert by_run.logged_model_id == pins.resolve("acme-by-logged", "latest").logged_model_id


def test_shards_are_listed_with_their_index(
    mlflow_proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)
    source = snapshot(tmp_path / "snapshot", sidecars=False)
    (source / "model.safetensors").unlink()
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        (source / shard).write_bytes(safetensors({"w": (4,)}))
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    register(mlflow_proxied, source, "acme-sharded")

    pin = pins.resolve("acme-sharded", "latest")
    weights = {f.path for f in pin.files if "safetensors" in f.path}
    assert weights == {"model.safetensors.index.json", *shards}
    assert pin.facts.weights_bytes == 2 * (source / shards[0]).stat().st_size


def test_the_small_client_suffices(
    copier_copy: Callable[..., Run], mlflow_proxied: str, tmp_path: Path
) -> None:
    """What a person installs: Copier, the loader and mlflow-skinny, on the real command line."""
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), "acme-skinny")
    asked = ["model_id=acme-skinny", "accelerator=cpu"]

    result = copier_copy(*asked, python=environment("user"), MLFLOW_TRACKING_URI=mlflow_proxied)

    assert result.code == 0, result.error
    pin = json.loads((result.target / "k8s/base/pin.json").read_text())
    assert (pin["registered_model"], pin["version"]) == ("acme-skinny", "1")


def test_a_person_picks_from_what_is_registered(
    template: Path, mlflow_proxied: str, tmp_path: Path
) -> None:
    """The list shows version and size, and offers nothing that TEI could not serve."""
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), "acme-picked", model_id="acme/picked")
    write(tmp_path / "sklearn/model.pkl", "pickle")
    register(mlflow_proxied, tmp_path / "sklearn", "acme-not-offered")
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "200"}
    copier = ["-m", "copier", "copy", "--trust", str(template), str(tmp_path / "target")]
    person = pexpect.spawn(
        sys.executable,
        copier,
        env=home | {"MLFLOW_TRACKING_URI": mlflow_proxied},
        dimensions=(100, 200),
        encoding="utf-8",
        timeout=120,
    )
    seen = io.StringIO()
    person.logfile_read = seen
    person.expect("Which model should be served")
    person.expect(r"acme/picked, version 1, 0 MB")
    person.sendline("\x1b[A")  # arrow up: the last of the list
    person.expect("Which version of it")
    person.sendcontrol("c")
    person.expect("Execution stopped by user")
    person.close()
    assert "acme-not-offered" not in seen.getvalue()
    assert not (tmp_path / "target").exists()


# From the pin to the folder that TEI gets

PROGRAM = Path(__file__).parent.parent / "template" / "images" / "model-fetch"


def fetch(pin: dict[str, object], folder: Path, **environment: str) -> tuple[int, str, Path]:
    """Run model-fetch on a pin; returns its exit code, what it said, and the link."""
    write(folder / "pin.json", json.dumps(pin))
    link = folder / "model" / "current"
    places = ["--cache", str(folder / "cache"), "--link", str(link), "--termination-log", ""]
    command = [sys.executable, "-m", "model_fetch", "--pin", str(folder / "pin.json"), *places]
    known = {"PATH": os.environ["PATH"], "HOME": str(folder)} | environment
    done = subprocess.run(command, cwd=PROGRAM, env=known, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, link


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_pinned_is_what_arrives(
    lookup: str, s3: dict[str, str], layout: str, kind: str, tmp_path: Path
) -> None:
    """In every layout, from every store: a proxy, a shared folder, S3 with keys."""
    source = snapshot(tmp_path / "same")
    pin = pins.resolve(f"acme/{layout}-{kind}", "latest").to_mapping()

    code, said, link = fetch(pin, tmp_path, MLFLOW_TRACKING_URI=lookup, **s3)

    assert code == 0, said
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (link / name).read_bytes() == (source / name).read_bytes(), name
    arrived = {str(p.relative_to(link)) for p in link.rglob("*") if p.is_file()}
    dead_weight = [n for n in arrived if n.startswith(("onnx", "tf_model", "README"))]
    assert not dead_weight or "used in place" in said
    if layout == "sentence-transformers":  # what TEI cannot parse was repaired
        assert json.loads((link / "sentence_bert_config.json").read_text())["max_seq_length"] == 64
        pooling = json.loads((link / "1_Pooling/config.json").read_text())
        assert pooling["pooling_mode_mean_tokens"] is True


@pytest.mark.parametrize(
    "user", [{"MLFLOW_AUTH_USERNAME": "me", "MLFLOW_AUTH_PASSWORD": "right"}, {}]
)
def test_a_pin_without_a_version_is_resolved_behind_keycloak(
    mlflow_proxied: str, tmp_path: Path, user: dict[str, str]
) -> None:
    from demo.registry import connect
    from extensions import catalog

    name = f"BAAI-bge-base-en-v1.5{len(user)}"
    for _ in range(3):
        register(mlflow_proxied, snapshot(tmp_path / "snapshot"), name)
    connect(mlflow_proxied).set_registered_model_alias(name, "champion", "2")
    pin = catalog.resolve("BAAI/bge-base-en-v1.5", "@champion").to_mapping()
    pin |= {"model_id": name, "registered_model": name}
    grant = "password" if user else "client_credentials"

    def keycloak(request: Request) -> Answer:
        if request.form["grant_type"] != grant:
            return 401, JSON, b'{"error": "unauthorized_client"}'
        return 200, JSON, b'{"access_token": "fresh", "expires_in": 300}'

    with gateway(keycloak) as identity, gateway(only_with("fresh"), mlflow_proxied) as front:
        login = {
            "MLFLOW_KEYCLOAK_TOKEN_URL": f"{identity.uri}/token",
            "MLFLOW_KEYCLOAK_CLIENT_ID": "pods",
            "MLFLOW_CLIENT_SECRET": "right",
        }
        asked = {"MLFLOW_TRACKING_URI": front.uri, **login, **user}
        code, said, link = fetch(pin, tmp_path, **asked)

    assert code == 0, said
    assert "@champion is version 2" in said
    assert (link / "model.safetensors").exists()
    assert "fresh" not in said
    assert "right" not in said
