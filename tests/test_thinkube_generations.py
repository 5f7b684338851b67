"""Both generations of the platform's call, for what it deploys, where, and what its registry holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import copier
import pytest
import yaml
from copier.errors import UserMessageError

from demo.registry import serve
from tests import gateway, thinkube
from tests.conftest import pinned
from tests.snapshots import register, snapshot
from tests.test_thinkube import url  # noqa: F401

THERE, OTHER = "BAAI/bge-base-en-v1.5", "nomic-ai/nomic-embed-text-v1.5"
MODELS = {"the model": THERE, "another model": OTHER, "nothing": THERE, "no registry": THERE}
KINDS, ACCELERATORS = ("component", "app"), ("gb10", "l4", "cpu")
NAMES = {"component": "text-embeddings", "app": "search"}


@pytest.fixture(scope="module")
def registries(
    mlflow_proxied: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """MLFLOW_TRACKING_URI by what is registered there; the platform mirrors under these names."""
    files = snapshot(tmp_path_factory.mktemp("model"), sidecars=False)
    register(mlflow_proxied, files, THERE.replace("/", "-"), model_id=THERE)
    with serve(tmp_path_factory.mktemp("empty")) as empty:
        yield {"the model": mlflow_proxied, "another model": mlflow_proxied, "nothing": empty}


def call(url: str, target: Path, generation: str, **changes: str) -> dict[str, Any]:  # noqa: F811
    """What `copier copy --force` does with the platform's words; returns the stored answers."""
    copier.run_copy(
        url,
        target,
        data=thinkube.answers(generation, **changes),
        vcs_ref=thinkube.REFS[generation],
        defaults=True,
        overwrite=True,
        unsafe=True,
        quiet=True,
    )
    stored: dict[str, Any] = yaml.safe_load((target / ".copier-answers.yml").read_text())
    return stored


def refusal(kind: str, accelerator: str, registry: str) -> str:
    """A part of the line that ends the call; empty where it renders."""
    if kind == "app" and registry in ("another model", "nothing"):
        return "registered model"
    return "the LLM gateway gives every pod" if (kind, accelerator) == ("component", "cpu") else ""


@pytest.mark.parametrize(
    ("generation", "kind", "accelerator", "registry"),
    list(itertools.product(thinkube.REFS, KINDS, ACCELERATORS, MODELS)),
)
def test_every_call_of_the_platform(
    url: str,  # noqa: F811
    registries: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    generation: str,
    kind: str,
    accelerator: str,
    registry: str,
) -> None:
    if registry in registries:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", registries[registry])
    target = tmp_path / NAMES[kind]
    changes = {"kind": kind, "project_name": NAMES[kind], "accelerator": accelerator}
    changes["model_id"] = MODELS[registry]

    if expected := refusal(kind, accelerator, registry):
        with pytest.raises(UserMessageError) as refused:
            call(url, target, generation, **changes)
        assert expected in str(refused.value)
        assert "\n" not in str(refused.value)
        assert not target.exists()
        return

    stored = call(url, target, generation, **changes)
    thinkube.check(target, stored)
    assert stored["thinkube_deployment"] == kind
    assert stored["pin"]["version"] == ("1" if registry == "the model" else None)
    assert "deployment_type" not in stored
    said = [line for line in capfd.readouterr().err.splitlines() if "left to the pods" in line]
    assert len(said) == (registry in ("another model", "nothing"))


@pytest.mark.parametrize(
    ("deployment_type", "name", "shape"),
    [
        ("user_app", "text-embeddings", "app"),
        ("user_app", "search", "app"),
        ("component", "text-embeddings", "component"),
        ("something newer", "search", "app"),
        (None, "text-embeddings", "component"),
        (None, "search", "app"),
    ],
)
def test_the_platform_s_word_on_the_shape_wins_over_the_name(
    render: Any, deployment_type: str | None, name: str, shape: str
) -> None:
    said = {"deployment_type": deployment_type} if deployment_type else {}
    project = render(program=False, k8s_namespace=name, project_name=name, **said)
    stored = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert (stored["platform"], stored["thinkube_deployment"]) == ("thinkube", shape)
    assert "deployment_type" not in stored


def test_the_shape_of_before_is_kept_by_an_update_without_the_platform(
    render: Any, tmp_path: Path
) -> None:
    target = tmp_path / "text-embeddings"
    said = {"k8s_namespace": "text-embeddings", "admin_username": "boss"}
    render(target, program=False, deployment_type="user_app", **said)
    first = (target / "images/thinkube/settings.sh").read_text()
    render(target, program=False)
    assert (target / "images/thinkube/settings.sh").read_text() == first
    assert "DEPLOYMENT=app\n" in first
    assert "ARTIFACT_STORE_USER=boss\n" in first


def test_other_platforms_store_nothing_of_it(render: Any) -> None:
    project = render(program=False, deployment_type="user_app", admin_username="boss")
    assert "admin_username" not in (project / ".copier-answers.yml").read_text()


@pytest.mark.parametrize("model_id", ["acme/unknown", OTHER])
@pytest.mark.parametrize("version", ["latest", "7", "@production"])
def test_what_a_component_without_its_model_may_be(
    render: Any,
    registries: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    model_id: str,
    version: str,
) -> None:
    """Only a model of the catalogue, and no certain version: all else is a mistake."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registries["nothing"])
    answers = {"platform": "thinkube", "model_id": model_id, "model_version": version}
    if (model_id, version) == (OTHER, "latest"):
        project = render(program=False, **answers)
        assert "in no registry at hand" in (project / "README.md").read_text()
        return
    with pytest.raises(UserMessageError, match="has no registered model"):
        render(program=False, **answers)


@pytest.mark.parametrize("status", [401, 403])
def test_a_registry_that_refuses_the_login_is_an_error_for_a_component_too(
    render: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    denied = (status, gateway.JSON, b'{"error_code": "PERMISSION_DENIED"}')
    with gateway.gateway(lambda _: denied) as refusing:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing.uri)
        with pytest.raises(UserMessageError, match=r"\(40[13]\)"):
            render(program=False, platform="thinkube")


@pytest.mark.parametrize("name", ["", "a b", "x\ny", "$(id)", "-x", "a" * 64])
def test_a_name_that_no_admin_has_is_refused(render: Any, tmp_path: Path, name: str) -> None:
    pin = pinned(THERE)
    answers = {"platform": "thinkube", "model_id": THERE, "pin": pin}
    with pytest.raises(UserMessageError, match="admin_username"):
        render(tmp_path / "no", admin_username=name, **answers)
    assert not (tmp_path / "no").exists()
