"""Text of users and of the registry: it arrives as it is, or is refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import copier
import pytest
import yaml
from copier.errors import UserMessageError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from extensions import answers, texts
from tests.conftest import Render, Run, pinned
from tests.snapshots import register, snapshot

MODEL = "BAAI/bge-base-en-v1.5"
HOSTILE = [
    "{{ 7 * 7 }}{% raw %}{# x #}",
    "': \"}\n- [*a &b !!python/object:os.system",
    "$(touch /tmp/owned) `id` ${HOME} ; rm -rf / #",
    "| a | b |\n|---|\n<script>alert(1)</script> ![x](http://x) **bold** _it_",
    "- not a list",
    "1. not a list",
    "\\u0000 \\x1b[31m",
    "yes",
    "null",
    "0x10",
    "2024-01-01",
    "é 漢字 🚀",
    "'''",
    '"""',
    "<<: *anchor",
    "--help",
    "a" * 200,
]
# admin_username is Thinkube's alone: tests/test_thinkube_generations.py has its own values.
FREE_TEXT = [n for n, rule in answers.RULES.items() if not rule.choices and n != "admin_username"]


def values(name: str) -> st.SearchStrategy[str]:
    """What people and machines type: mostly near the rule, sometimes anything."""
    pattern = st.from_regex(re.compile(answers.RULES[name].pattern, re.ASCII), fullmatch=True)
    return st.one_of(st.sampled_from(HOSTILE), pattern, st.text(max_size=80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untrusted")


@pytest.mark.parametrize("name", FREE_TEXT)
def test_a_free_text_answer_arrives_or_is_refused(name: str, template: Path, folder: Path) -> None:
    target = folder / name

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(value=values(name))
    @example(value=HOSTILE[0])
    @example(value=HOSTILE[2])
    @example(value=HOSTILE[3])
    @example(value=HOSTILE[5])
    @example(value="no")
    @example(value="http://0:90000")
    def arrives(value: str) -> None:
        shutil.rmtree(target, ignore_errors=True)
        given = {name: value} if name.startswith("model_") else {"pin": pinned(MODEL), name: value}
        given.setdefault("model_id", MODEL)
        components = ["monitoring", "gateway", "ingress", "network-policy", "api-key"]
        components.append("external-secrets")
        given |= {"components": components, "accelerator": "l4", "mlflow_auth": "keycloak"}
        given |= {"ci": "github", "gitops": "flux"}
        try:
            copier.run_copy(
                str(template),
                target,
                data=given,
                defaults=True,
                unsafe=True,
                quiet=True,
                exclude=["images/model-fetch/model_fetch"],
            )
        except UserMessageError as refusal:
            assert str(refusal).isprintable()  # noqa: PT017
            assert not target.exists()
            return
        check_files(target)
        stored = yaml.safe_load((target / ".copier-answers.yml").read_text())
        assert stored[name] == value
        if name == "project_description" and value:  # an empty one is replaced by a sentence
            assert shows_literally((target / "README.md").read_text(), value)

    arrives()


def check_files(project: Path) -> None:
    """All YAML parses, all shell parses, and nothing was executed as a template."""
    for path in project.rglob("*"):
        if path.suffix in (".yaml", ".yml"):
            list(yaml.safe_load_all(path.read_text()))
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".sh":
            subprocess.run(["bash", "-n", str(path)], check=True)
    made = subprocess.run(["make", "-n", "help"], cwd=project, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def shows_literally(markdown: str, text: str) -> bool:
    """The first paragraph, as a reader sees it, is the text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    first = next(t for t in tokens if t.type == "inline" and t.map and t.map[0] >= 1)
    shown = "".join(c.content for c in first.children or [] if c.type in ("text", "text_special"))
    only_text = all(c.type in ("text", "text_special") for c in first.children or [])
    return only_text and " ".join(shown.split()) == " ".join(text.split())


@given(st.text())
@settings(max_examples=300, deadline=None, database=None)
def test_texts_stay_texts(text: str) -> None:
    assert yaml.safe_load(texts.yaml_text(text)) == text or not encodable(text)
    single = " ".join(text.split()).strip()
    if single.isprintable() and single:
        assert shows_literally(f"# t\n\n{texts.markdown_text(single)}\n", single)
    assert "\n" not in texts.markdown_code(text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"]), max_size=40))
@settings(max_examples=25, deadline=None, database=None)
def test_a_shell_word_is_one_word(text: str) -> None:
    said = subprocess.run(["sh", "-c", f"printf %s {texts.shell_text(text)}"], capture_output=True)
    assert said.stdout == text.encode()


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def test_hostile_texts_in_a_registered_model_stay_texts(
    render: Render, mlflow_proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever registers a model writes its files, its parameters and its description."""
    source = snapshot(tmp_path / "snapshot", architectures=["{{ 7 * 7 }}"], torch_dtype="`id`")
    hostile = {f"name {number}": text for number, text in enumerate(HOSTILE)}
    (source / "config_sentence_transformers.json").write_text(json.dumps({"prompts": hostile}))
    register(mlflow_proxied, source, "acme-hostile", model_id="{{ 7 * 7 }}/$(id)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)

    project = render(model_id="acme-hostile", accelerator="cpu")

    check_files(project)
    stored = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert stored["pin"]["model_id"] == "acme-hostile"
    assert stored["pin"]["facts"]["class_name"] == "{{ 7 * 7 }}"
    prompts = stored["pin"]["facts"]["prompts"]
    assert prompts["name 0"] == HOSTILE[0]
    assert prompts["name 2"] == HOSTILE[2]
    readme = (project / "README.md").read_text()
    assert "49" not in readme
    assert "<script>" not in re.sub(r"`+[^`]+`+", "", readme)


def test_a_registered_name_with_template_syntax_is_not_offered(
    mlflow_proxied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extensions import pin

    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), "{{ _copier_conf.data }}")
    register(mlflow_proxied, tmp_path / "snapshot", "acme-harmless")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)

    labels = pin.choices()
    assert any(value == "acme-harmless" for _, value in labels)
    assert not any("{" in label + value for label, value in labels)


# Secrets

SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "user-4f1c",
    "MLFLOW_TRACKING_PASSWORD": "password-9a2e",
    "MLFLOW_TRACKING_TOKEN": "token-77b0",
    "MLFLOW_CLIENT_SECRET": "client-secret-c3d4",
    "MLFLOW_AUTH_USERNAME": "auth-user-e5f6",
    "MLFLOW_AUTH_PASSWORD": "auth-password-0718",
    "AWS_ACCESS_KEY_ID": "aws-key-29ab",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-cdef",
    "GITHUB_TOKEN": "github-env-1357",
    "HF_TOKEN": "hf-2468",
}
UNDECLARED = {
    "github_token": "ghp-undeclared-1a2b",
    "ansible_become_pass": "become-3c4d",
    "admin_password": "admin-5e6f",
    "ansible_ssh_private_key_file": "ssh-key-7890",
}


def test_no_secret_leaves_the_environment(
    copier_copy: Callable[..., Run], mlflow_proxied: str, tmp_path: Path
) -> None:
    register(mlflow_proxied, snapshot(tmp_path / "snapshot"), "acme-secret")
    data = ["model_id=acme-secret", "accelerator=cpu", "mlflow_auth=keycloak"]
    data += [f"{name}={value}" for name, value in UNDECLARED.items()]

    good = copier_copy(*data, MLFLOW_TRACKING_URI=mlflow_proxied, **SECRETS)
    assert good.code == 0, good.error
    failed = copier_copy(
        *data,
        "model_version=99",
        target=tmp_path / "no",
        MLFLOW_TRACKING_URI=mlflow_proxied,
        **SECRETS,
    )
    assert failed.code == 1
    for secret in {**SECRETS, **UNDECLARED}.values():
        for said in (good.output, good.error, failed.output, failed.error):
            assert secret not in said
        for path in good.target.rglob("*"):
            assert secret not in path.name
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("https://user:ghp_SECRET@github.example.com/acme/t", "https://github.example.com/acme/t"),
        ("https://ghp_SECRET@github.example.com/acme/t", "https://github.example.com/acme/t"),
        ("https://user:p@ss@host/x", "https://host/x"),
        ("HTTPS://user:TOKEN@host/x", "HTTPS://host/x"),
        ("git+https://user:TOKEN@host/x", "git+https://host/x"),
        ("https://host/x?private_token=TOKEN", "https://host/x"),
        ("https://host?private_token=TOKEN@x/y", "https://host"),
        ("https://host/a@b#TOKEN", "https://host/a@b"),
        ("ssh://git@github.com/a/b", "ssh://git@github.com/a/b"),
        ("ssh://git:password@host:22/a/b", "ssh://git@host:22/a/b"),
        ("git@github.com:acme/template", "git@github.com:acme/template"),
        ("gh:acme/template", "gh:acme/template"),
        ("/srv/templates/a@b", "/srv/templates/a@b"),
        ("file:///srv/a@b", "file:///srv/a@b"),
    ],
)
def test_the_template_s_own_address_is_stored_without_its_login(typed: str, stored: str) -> None:
    assert texts.without_credentials(typed) == stored
