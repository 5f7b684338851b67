"""Everything that people get wrong: one line that says what to do, exit code 1, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import copier
import pytest
import trustme
import yaml
from copier.errors import UserMessageError

from demo.registry import free_port, serve
from extensions import answers
from extensions.errors import ConfigurationError, TemplateError
from extensions.pin import Pin
from tests.conftest import Render, Run, variables
from tests.gateway import HTML, JSON, Answer, Request, gateway, only_with
from tests.snapshots import register, safetensors, snapshot, write

Copy = Callable[..., Run]


@pytest.fixture
def refused(copier_copy: Copy, tmp_path: Path) -> Callable[..., str]:
    """Run a copy that must fail, into a new and into an existing folder; returns its one line."""

    def run(*data: str, words: tuple[str, ...] = (), **options: str) -> str:
        lines = set()
        existing = tmp_path / "existing"
        write(existing / "mine.txt", "untouched")
        for target in (tmp_path / "new", existing):
            result = copier_copy(*data, target=target, words=words, **options)
            assert result.code == 1, result
            assert result.error.count("\n") == 1, result.error
            assert result.output.strip() == ""
            lines.add(result.error.strip())
        assert not (tmp_path / "new").exists()
        assert [p.name for p in existing.iterdir()] == ["mine.txt"]
        assert len(lines) == 1
        return lines.pop()

    return run


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("project_name=My Project", "project_name: 'My Project' is not a project name: use at most 40 "
         "lower-case letters, digits and '-', starting with a letter."),
        ("namespace=Kube_System", "namespace: 'Kube_System' is not a Kubernetes namespace: use at most "
         "63 lower-case letters, digits and '-'."),
        ("domain_name=exa mple.com", "domain_name: 'exa mple.com' is not a domain name: use lower-case "
         "labels with dots, as in example.com."),
        ("container_registry=https://r.example.com", "container_registry: 'https://r.example.com' is not "
         "a container registry: use host[:port][/path] in lower case, as in registry.example.com/team."),
        ("replicas=0", "replicas: '0' is not a number of replicas: use a whole number from 1 to 99."),
        ("replicas=many", "replicas: 'many' is not a number of replicas: use a whole number from 1 to 99."),
        ("accelerator=h200", "accelerator: 'h200' is not one of gb10, rtx-50, b200, gh200, h100, l4, a10, "
         "a100, t4, cpu."),
        ("platform=nomad", "platform: 'nomad' is not one of kubernetes, thinkube."),
        ("components=[monitoring, magic]", "components: '[monitoring, magic]' is not a list of these, as in "
         "[a, b]: monitoring, autoscaling-hpa, autoscaling-keda, gateway, ingress, network-policy, api-key, "
         "gpu-toleration, playground, external-secrets."),
        ("components=[", "components: '[' is not a list of these, as in [a, b]: monitoring, "
         "autoscaling-hpa, autoscaling-keda, gateway, ingress, network-policy, api-key, gpu-toleration, "
         "playground, external-secrets."),
        ("model_id=../../etc/passwd", "model_id: '../../etc/passwd' is not a Hugging Face id (owner/name) or "
         "the name of a registered model: use letters, digits, '.', '_', '-' and at most one '/'."),
        ("model_version=newest", "model_version: 'newest' is not a model version: use latest, a number, or "
         "@ and an alias."),
        ("mlflow_tracking_uri=http://user:hunter2@mlflow:5000", "mlflow_tracking_uri: what was given is not "
         "a tracking URI: use http(s)://host[:port][/path] without user, password or query."),
        ("tei_ref=v1.9.4", "tei_ref: 'v1.9.4' is not a commit of TEI: use its 40 hexadecimal digits."),
        ("pin={", "pin is not a mapping: resolve the pin again."),
        ("pin={model_id: a}", "pin.registered_model is missing: resolve the pin again."),
        ("model_id=acme/unheard-of", "acme/unheard-of is not in the catalogue and MLFLOW_TRACKING_URI is not "
         "set: set it, or choose one of nomic-ai/nomic-embed-text-v1.5, BAAI/bge-base-en-v1.5, "
         "BAAI/bge-large-en-v1.5, Alibaba-NLP/gte-large-en-v1.5, jinaai/jina-embeddings-v2-base-code, "
         "jinaai/jina-embeddings-v3, Qwen/Qwen3-Embedding-0.6B, Qwen/Qwen3-Embedding-4B."),
    ],
)  # fmt: skip
def test_a_wrong_answer(refused: Callable[..., str], answer: str, line: str) -> None:
    assert refused(answer) == line


YAML_THAT_IS_NONE = [
    "2024-99-99", "0x_", "!!int abc", "!!bool x", "!!timestamp x", "!!float x", "!!binary é", "!!set [",
    "!!omap x", "!!merge x", "!!python/object/apply:os.system [id]", "9" * 5000, "[" * 1500, "{" * 1500,
    "&a [*a", "\x00", "? [", "%YAML 9.9", "- !!null x\n- !!int 1_:_",
]  # fmt: skip


@pytest.mark.parametrize("text", YAML_THAT_IS_NONE, ids=range(len(YAML_THAT_IS_NONE)))
def test_data_that_no_yaml_reader_takes(text: str) -> None:
    assert answers.mapping(text) is None or answers.problem("components", text)
    with pytest.raises(ConfigurationError):
        Pin.from_mapping(answers.mapping(text))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("container_registry", "user:hunter2@registry.example.com"),
        ("container_registry", "https://hunter2@registry.example.com/team"),
        ("domain_name", "user:hunter2@example.com"),
        ("model_id", "https://user:hunter2@huggingface.co/acme/x"),
        ("git_url", "https://hunter2@git.example.com/x.git"),
        ("proxy", "http://user:hunter2@proxy:3128"),
        ("storage_class", "user:hunter2@x"),
    ],
)
def test_a_login_in_the_wrong_place_is_not_repeated(name: str, value: str) -> None:
    said = answers.problem(name, value)
    assert said.startswith(f"{name}: what was given is not")
    assert "hunter2" not in said


def test_such_data_on_the_command_line(refused: Callable[..., str]) -> None:
    assert refused("pin=!!bool x") == "pin is not a mapping: resolve the pin again."
    assert refused("components=" + "[" * 1500).startswith("components: '[[[[[")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("pooling:", "pooling: null is no answer: give one, or leave pooling out."),
        ("advanced: ~", "advanced: null is no answer: give one, or leave advanced out."),
        ("accept_license: [1]", "accept_license: '[1]' is neither yes nor no."),
        ("advanced: 1" + "0" * 400, "advanced: '1" + "0" * 59 + "…' is neither yes nor no."),
        ("replicas: 1.5", "replicas: '1.5' is not a number of replicas: use a whole number from 1 to 99."),
        ("namespace: {a: b}", "namespace: '{'a': 'b'}' is not a Kubernetes namespace: use at most 63 "
         "lower-case letters, digits and '-'."),
        ("tei_ref: 2024-01-01", "tei_ref: '2024-01-01' is not a commit of TEI: use its 40 hexadecimal "
         "digits."),
    ],
)  # fmt: skip
def test_an_answer_of_another_type(data: str, line: str) -> None:
    """--data-file, an answers file that was edited, and the user's own defaults are YAML."""
    with pytest.raises(ConfigurationError) as refusal:
        answers.check(yaml.safe_load(data))
    assert str(refusal.value) == line


def test_such_answers_in_the_files_that_people_write(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    write(tmp_path / "data.yml", "pooling:")
    write(tmp_path / "settings.yml", "defaults: {replicas: 7.5}")
    assert refused(words=("--data-file", str(tmp_path / "data.yml"))) == (
        "pooling: null is no answer: give one, or leave pooling out."
    )
    assert refused(COPIER_SETTINGS_PATH=str(tmp_path / "settings.yml")) == (
        "defaults of Copier's settings: replicas: '7.5' is not a number of replicas: use a whole "
        "number from 1 to 99."
    )


def test_a_default_that_is_overridden_is_nobody_s_business(
    copier_copy: Copy, tmp_path: Path
) -> None:
    write(tmp_path / "settings.yml", "defaults: {replicas: many, other_template: {a: [1]}}")
    settings = {"COPIER_SETTINGS_PATH": str(tmp_path / "settings.yml")}
    done = copier_copy("replicas=1", "accelerator=cpu", **settings)
    assert done.code == 0, done.error


PIN = {
    "model_id": "a", "registered_model": "a", "selector": "latest", "version": None, "files": [],
    "facts": {"architecture": "bert", "dimensions": 8, "pooling": "mean", "weights_bytes": 1000},
}  # fmt: skip


def test_a_pin_with_the_necessary_keys_alone_renders(render: Render) -> None:
    render(pin=PIN, model_id="a", accelerator="cpu", program=False)
    nulls = dict.fromkeys(("remarks", "conversion", "revision", "run_id", "artifact_uri"))
    facts = {**PIN["facts"], "license": None, "prompts": None}  # type: ignore[dict-item]
    render(pin=PIN | nulls | {"facts": facts}, model_id="a", accelerator="cpu", program=False)


def file(path: str, **more: object) -> dict[str, object]:
    return {"path": path, "from": path, "size": 1, **more}


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": {"architecture": "bert", "pooling": "mean${HOME}"}},
        {"facts": {"architecture": "bert", "dtype": "float64"}},
        {"facts": {"architecture": "bert", "weights_bytes": 0}},
        {"facts": {"architecture": "bert", "weights_bytes": 10**400}},
        {"facts": {"architecture": "bert", "hidden_size": 2**53 + 1}},
        {"facts": {"architecture": "bert", "layers": True}},
        {"facts": {"architecture": "bert", "dimensions": 1.0}},
        {"facts": {"architecture": "\x1b[31m"}},
        {"facts": {"architecture": "bert", "prompts": {"a": ["b"]}}},
        {"facts": {"architecture": "bert", "prompts": {1: "b"}}},
        {"remarks": ["a\nb"]},
        {"remarks": "a"},
        {"model_id": "a\n"},
        {"files": {"a": 1}},
        {"files": [file("a", size=-1)]},
        {"files": [file("a", size=2**53 + 1)]},
        {"files": [file("a", size=True)]},
        {"files": [file("a", sha256="A" * 64)]},
        {"files": [file("../a")]},
        {"files": [file("a" * 300)]},
        {"files": [file("a/" * 600 + "b")]},
        {"files": [file(".model-fetch.json")]},
        {"files": [file(".converted/x")]},
        {"files": [file("1_Pooling/.hidden")]},
        {"files": [file("config.json.new")]},
        {"files": [file("model.safetensors.client/x.client")]},
        {"files": [file("config.json"), file("Config.json")]},
        {"files": [file("config.json"), file("config.json.")]},
        {"files": [file("straße.json"), file("STRASSE.json")]},
        {"files": [file("\u00e9.json"), file("e\u0301.json")]},
        {"files": [file("a"), file("A/b")]},
        {"files": [file(str(n)) for n in range(5001)]},
        {"version": "3", "files": [file("a")]},
        {"artifact_uri": "runs:/a/b"},
        {"artifact_uri": "mlflow-artifacts://[::1"},
        {"artifact_uri": "http://host:99999999/x"},
        {"artifact_uri": "s3://a\nb"},
        {"artifact_uri": "s3://a "},
        {"artifact_uri": "ftp://user:password@host/x"},
        {"artifact_uri": "https://token@host/x"},
        {"artifact_uri": "sftp://user:password@host/x"},
        {"artifact_uri": "https://host/x?sig=secret"},
        {"artifact_uri": "mlflow-artifacts://user@host/x"},
    ],
)  # fmt: skip
def test_a_pin_that_is_none(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Pin.from_mapping(PIN | changes)
    assert str(refusal.value).endswith(": resolve the pin again.")
    assert "password" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "wasbs://container@account.blob.core.windows.net/a", "sftp://user@host/a", "s3://b/a@b c",
        "/srv/my models", "file:///srv/a:b@c", "mlflow-artifacts:/1/2/artifacts/bge m3",
        "dbfs:/a", "abfss://c@account.dfs.core.windows.net/a", "http://host:80/a",
    ],
)  # fmt: skip
def test_an_artifact_uri_without_a_secret_is_kept(uri: str) -> None:
    assert Pin.from_mapping(PIN | {"artifact_uri": uri}).artifact_uri == uri


def test_what_the_template_does_not_know_is_one_line_too(template: Path, tmp_path: Path) -> None:
    """The last net: an error of ours, in a question or in a file, is no traceback either."""
    for name, text in (("README.md.jinja", "{{ 1 / 0 }}"), ("Makefile.jinja", "{{ nowhere.at }}")):
        spoilt = tmp_path / name
        shutil.copytree(template, spoilt, symlinks=True)
        (spoilt / "template" / name).write_text(text)
        with pytest.raises(UserMessageError, match="TKT_TRACEBACK=1") as told:
            copier.run_copy(str(spoilt), tmp_path / "new", defaults=True, unsafe=True, quiet=True)
        assert str(told.value).isprintable()
        assert not (tmp_path / "new").exists()
        with variables({"TKT_TRACEBACK": "1"}), pytest.raises(Exception) as raw:  # noqa: PT011
            copier.run_copy(str(spoilt), tmp_path / "new", defaults=True, unsafe=True, quiet=True)
        assert not isinstance(raw.value, UserMessageError)


def test_an_error_is_one_line_that_keeps_its_advice() -> None:
    said = str(TemplateError(f"a\x1b[2J\u202e\r\n{'x' * 200_000}: register it again."))
    assert said.isprintable()
    assert len(said) <= 500
    assert said.startswith("a [2J xxx")
    assert said.endswith(": register it again.")


def test_answers_that_exclude_each_other(refused: Callable[..., str]) -> None:
    assert refused("components=[autoscaling-hpa, autoscaling-keda]") == (
        "components: autoscaling-hpa and autoscaling-keda would fight over the replicas: choose one."
    )


def test_a_pin_of_another_model(
    refused: Callable[..., str], pin_of: Callable[..., dict[str, object]]
) -> None:
    pin = json.dumps(pin_of("BAAI/bge-base-en-v1.5"))
    assert refused("model_id=BAAI/bge-large-en-v1.5", f"pin={pin}") == (
        "the pin is of BAAI/bge-base-en-v1.5, not of BAAI/bge-large-en-v1.5: leave pin out."
    )


NO_SERVERS = [
    "sqlite:///mlflow.db",
    "mlflow.example.com",
    "https://",
    "http://[::1",
    "http://h:5000x",
]


@pytest.mark.parametrize("uri", NO_SERVERS)
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "MLFLOW_KEYCLOAK_TOKEN_URL"])
def test_an_address_that_is_no_server(refused: Callable[..., str], variable: str, uri: str) -> None:
    login = {"MLFLOW_KEYCLOAK_CLIENT_ID": "c", "MLFLOW_CLIENT_SECRET": "s"}
    line = refused(
        **{"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}", **login, variable: uri}
    )
    assert line.startswith(f"{variable} is not the address of a server (")
    assert line.endswith("): use http(s)://host[:port].")


def test_a_registry_that_is_not_there(refused: Callable[..., str]) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    assert refused(MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0") == (
        f"MLflow at {uri} cannot be reached (the connection is refused): check the address and that "
        "the server runs."
    )


def test_a_private_ca_that_is_not_named(
    refused: Callable[..., str], copier_copy: Copy, registered: str, tmp_path: Path
) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    key = tmp_path / "key.pem"
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(key)
    with gateway(lambda _: None, registered, key) as secure:
        asked = {"MLFLOW_TRACKING_URI": secure.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        assert refused("model_id=acme/good", **asked) == (
            f"MLflow at {secure.uri} shows a certificate that cannot be verified: name your CA's file "
            "in MLFLOW_TRACKING_SERVER_CERT_PATH."
        )
        assert refused("model_id=acme/good", **asked, MLFLOW_TRACKING_INSECURE_TLS="true") == (
            "MLFLOW_TRACKING_INSECURE_TLS is set, but TLS is always verified here: unset it and name "
            "your CA's file in MLFLOW_TRACKING_SERVER_CERT_PATH."
        )
        for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "SSL_CERT_FILE"):
            good = copier_copy("model_id=acme/good", **asked, **{name: str(tmp_path / "ca.pem")})
            assert good.code == 0, good.error


PAGES: dict[str, tuple[Answer, dict[str, str], str]] = {
    "login wanted": (
        (401, HTML, b"<h1>Who are you?</h1>"),
        {},
        "wants a login (401): set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or the MLFLOW_KEYCLOAK_* variables.",
    ),
    "login page of oauth2-proxy": (
        (403, HTML, b"<h1>Log in</h1>"),
        {},
        "wants a login (403): set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or the MLFLOW_KEYCLOAK_* variables.",
    ),
    "login refused": (
        (401, HTML, b"no"),
        {"MLFLOW_TRACKING_TOKEN": "expired-token"},
        "refuses the credentials of the environment (401): check user, password or token, and "
        "whether it has expired.",
    ),
    "forbidden": (
        (403, JSON, b'{"error_code": "PERMISSION_DENIED"}'),
        {"MLFLOW_TRACKING_TOKEN": "some-token"},
        "does not let this login read the model (403): ask for READ permission on it.",
    ),
    "host name": (
        (
            403,
            {"Content-Type": "text/plain"},
            b"Invalid Host header - possible DNS rebinding attack",
        ),
        {},
        "refuses its own host name (403): start the server with --allowed-hosts that includes it.",
    ),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_server_that_refuses(refused: Callable[..., str], page: str) -> None:
    answer, variables, line = PAGES[page]
    with gateway(lambda _: answer) as closed:
        assert refused(MLFLOW_TRACKING_URI=closed.uri, **variables) == (
            f"MLflow at {closed.uri} {line}"
        )
    assert {request.headers["Accept"] for request in closed.requests} == {"application/json"}


def test_a_login_page_in_the_way(refused: Callable[..., str]) -> None:
    with gateway(lambda _: (200, HTML, b"<html>Log in</html>")) as page:
        assert refused(MLFLOW_TRACKING_URI=page.uri) == (
            f"{page.uri} answers, but not as MLflow does: check MLFLOW_TRACKING_URI, and whether a "
            "login page stands before it."
        )


def test_a_server_that_fails(refused: Callable[..., str]) -> None:
    with gateway(lambda _: (500, JSON, b'{"error_code": "INTERNAL_ERROR"}')) as broken:
        asked = {"MLFLOW_TRACKING_URI": broken.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        assert refused(**asked) == (
            f"MLflow at {broken.uri} failed at asking /api/2.0/mlflow/model-versions/search (HTTP 500, "
            "INTERNAL_ERROR): look into the server's log."
        )


def test_no_client_installed(refused: Callable[..., str], tmp_path: Path) -> None:
    write(tmp_path / "hidden/mlflow.py", "raise ModuleNotFoundError('No module named mlflow')")
    assert refused(
        MLFLOW_TRACKING_URI="http://127.0.0.1:1", PYTHONPATH=str(tmp_path / "hidden")
    ) == (
        "MLFLOW_TRACKING_URI is set, but MLflow's client is not installed here: install "
        "mlflow-skinny beside copier, or unset the variable."
    )


# What is registered


@pytest.fixture(scope="session")
def registered(mlflow_proxied: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server with one good model, and with those that cannot be served."""
    folder = tmp_path_factory.mktemp("bad-models")

    def bad(name: str, spoil: Callable[[Path], object], **config: object) -> None:
        source = snapshot(folder / name, sidecars=False, **config)
        spoil(source)
        register(mlflow_proxied, source, f"acme-{name}")

    bad("good", lambda _: None)
    bad("no-tokenizer", lambda f: (f / "tokenizer.json").unlink())
    bad(
        "no-weights",
        lambda f: [(f / n).unlink() for n in ("model.safetensors", "pytorch_model.bin")],
    )
    bad("bad-config", lambda f: write(f / "config.json", '{"model_type": '))
    bad("list-config", lambda f: write(f / "config.json", "[]"))
    bad("cut", lambda f: write(f / "model.safetensors", safetensors({"w": (64, 8)})[:-100]))
    bad("no-safetensors", lambda f: write(f / "model.safetensors", b"\xff" * 4096))
    sklearn = folder / "sklearn"
    write(sklearn / "model.pkl", "pickle")
    write(sklearn / "MLmodel", "flavors: {sklearn: {}}")
    register(mlflow_proxied, sklearn, "acme-sklearn")
    gguf = folder / "gguf"
    write(gguf / "model-q4.gguf", "GGUF")
    register(mlflow_proxied, gguf, "acme-gguf")
    register(mlflow_proxied, folder / "good", "acme-mirror-of", model_id="acme-mirror/of")
    return mlflow_proxied


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (["model_id=acme/goood"], "MLflow at {uri} has no registered model acme-goood: the closest names are "
         "acme-good"),
        (["model_id=acme/good", "model_version=7"], "acme-good has no version 7: it has 1."),
        (["model_id=acme/good", "model_version=@best"], "acme-good has no alias @best: it has no alias at "
         "all."),
        (["model_id=acme/no-tokenizer"], "Version 1 of acme-no-tokenizer lacks tokenizer.json, which TEI "
         "needs: register it again with its complete files."),
        (["model_id=acme/no-weights"], "Version 1 of acme-no-weights lacks model.safetensors (or "
         "pytorch_model.bin), which TEI needs: register it again with its complete files."),
        (["model_id=acme/bad-config"], "Version 1 of acme-bad-config: config.json is not JSON: the "
         "registered copy is damaged, register it again."),
        (["model_id=acme/list-config"], "Version 1 of acme-list-config: config.json holds no JSON object: "
         "register it again."),
        (["model_id=acme/cut"], "model.safetensors has {cut} bytes where its header says {whole}: the "
         "registered copy is cut off, register it again."),
        (["model_id=acme/no-safetensors"], "model.safetensors is no safetensors file: its header does not "
         "fit; register it again."),
        (["model_id=acme-sklearn"], "Version 1 of acme-sklearn is no embedding model that TEI can serve: its "
         "artifacts hold no folder with config.json and model.safetensors."),
        (["model_id=acme-gguf"], "Version 1 of acme-gguf is a GGUF model, which TEI cannot read: register "
         "the safetensors original."),
        (["model_id=acme/mirror-of"], "acme-mirror-of in MLflow at {uri} is a copy of acme-mirror/of, not "
         "of acme/mirror-of: answer model_id=acme-mirror/of if you mean it."),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_served(
    refused: Callable[..., str], registered: str, answers: list[str], line: str
) -> None:
    said = refused(*answers, MLFLOW_TRACKING_URI=registered)
    whole = len(safetensors({"w": (64, 8)}))
    wanted = line.format(uri=registered, cut=whole - 100, whole=whole)
    assert said.startswith(wanted)
    assert said == wanted or not wanted.endswith(".")


def test_an_empty_registry(refused: Callable[..., str], tmp_path: Path) -> None:
    with serve(tmp_path / "empty") as uri:
        assert refused(MLFLOW_TRACKING_URI=uri) == (
            f"MLflow at {uri} has no registered model: register nomic-ai-nomic-embed-text-v1.5 first."
        )


# Keycloak


@pytest.fixture
def guarded(registered: str) -> Iterator[tuple[str, str, list[Request]]]:
    """(MLflow behind a bearer token, Keycloak's token URL, requests to Keycloak)."""

    def keycloak(request: Request) -> Answer:
        form = request.form
        password = form.get("grant_type") == "password" and form.get("password") == "right"
        client = form.get("grant_type") == "client_credentials" and form["client_secret"] == "right"
        if password or client:
            return 200, JSON, b'{"access_token": "fresh-token", "expires_in": 300}'
        return 401, JSON, b'{"error": "invalid_grant", "error_description": "for hunter2"}'

    with gateway(keycloak) as identity, gateway(only_with("fresh-token"), registered) as front:
        yield front.uri, f"{identity.uri}/realms/x/protocol/openid-connect/token", identity.requests


LOGINS = {
    "password": {"MLFLOW_AUTH_USERNAME": "me", "MLFLOW_AUTH_PASSWORD": "right"},
    "client_credentials": {"MLFLOW_CLIENT_SECRET": "right"},
}


@pytest.mark.parametrize("grant", LOGINS)
def test_keycloak_gives_a_token(
    copier_copy: Copy, guarded: tuple[str, str, list[Request]], grant: str
) -> None:
    uri, token_url, requests = guarded
    login = {"MLFLOW_KEYCLOAK_TOKEN_URL": token_url, "MLFLOW_KEYCLOAK_CLIENT_ID": "render"}
    asked = {"MLFLOW_TRACKING_URI": uri, **login, **LOGINS[grant]}

    result = copier_copy("model_id=acme/good", "accelerator=cpu", **asked)

    assert result.code == 0, result.error
    assert {request.form["grant_type"] for request in requests} == {grant}
    everything = "".join(p.read_text() for p in result.target.rglob("*") if p.is_file())
    assert "fresh-token" not in everything + result.output + result.error


def test_keycloak_refuses(
    refused: Callable[..., str], guarded: tuple[str, str, list[Request]]
) -> None:
    uri, token_url, _ = guarded
    login = {"MLFLOW_KEYCLOAK_TOKEN_URL": token_url, "MLFLOW_KEYCLOAK_CLIENT_ID": "render"}
    identity = token_url.partition("/realms")[0]
    wrong = {"MLFLOW_AUTH_USERNAME": "me", "MLFLOW_AUTH_PASSWORD": "hunter2"}
    assert refused("model_id=acme/good", MLFLOW_TRACKING_URI=uri, **login, **wrong) == (
        f"Keycloak at {identity} refuses the login (invalid_grant): check the client, the secret, and "
        "the user of the password grant."
    )
    assert refused("model_id=acme/good", MLFLOW_TRACKING_URI=uri, **login) == (
        "MLFLOW_KEYCLOAK_TOKEN_URL is set, but MLFLOW_CLIENT_SECRET (or MLFLOW_AUTH_USERNAME and "
        "MLFLOW_AUTH_PASSWORD) is not."
    )


@pytest.mark.parametrize(
    ("description", "told"),
    [
        ("Account disabled\x1b[31m", "invalid_grant: Account disabled?[31m"),
        ("wrong: hunter/2", "invalid_grant"),
        ("in password=hunter%2f2&", "invalid_grant"),
        (["a"], "invalid_grant"),
    ],
)
def test_keycloak_says_why_not(refused: Callable[..., str], description: object, told: str) -> None:
    said = json.dumps({"error": "invalid_grant", "error_description": description}).encode()
    login = {
        "MLFLOW_KEYCLOAK_CLIENT_ID": "render",
        "MLFLOW_AUTH_USERNAME": "me",
        "MLFLOW_AUTH_PASSWORD": "hunter/2",
    }
    with gateway(lambda _: (401, JSON, said)) as identity:
        asked = {"MLFLOW_TRACKING_URI": identity.uri, "MLFLOW_KEYCLOAK_TOKEN_URL": identity.uri}
        assert f"refuses the login ({told}):" in refused("model_id=acme/good", **asked, **login)
