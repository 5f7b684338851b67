"""Every model on every accelerator and platform: files that agree, read well, and come out the same again."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from copier.errors import UserMessageError
from pytest_copie.plugin import Copie

from extensions import accelerator, catalog, sizing
from extensions.pin import Pin
from tests import thinkube
from tests.conftest import ROOT, Render, pinned

PLATFORMS = ("kubernetes", "thinkube")
STORAGES = ("pvc", "ephemeral", "mount")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {
        "components": ["monitoring", "autoscaling-keda", "gateway", "network-policy"],
        "open_to_everyone": True,
        "replicas": "2",
    },
    {"components": ["ingress", "api-key", "gpu-toleration"], "mlflow_auth": "keycloak"},
    {
        "components": ["monitoring", "autoscaling-hpa"],
        "mlflow_auth": "basic",
        "runtime_class_name": "nvidia",
    },
)
CASES = [
    pytest.param(model, gpu, platform, id=f"{model.rpartition('/')[2]}-{gpu}-{platform}")
    for model, gpu, platform in itertools.product(catalog.load(), accelerator.names(), PLATFORMS)
]


@pytest.mark.parametrize(("model", "gpu", "platform"), CASES)
def test_a_repository_agrees_with_itself(
    render: Render, model: str, gpu: str, platform: str
) -> None:
    number = sum(map(ord, model + gpu + platform))
    answers = OPTIONS[number % len(OPTIONS)] | {"model_storage": STORAGES[number % len(STORAGES)]}
    pin = pinned(model)
    try:
        asked = {"model_id": model, "accelerator": gpu, "platform": platform, "pin": pin} | answers
        asked["accept_license"] = "-nc-" in pin["facts"]["license"]
        project = render(program=False, **asked)
    except UserMessageError as refusal:
        one_sentence_that_names(str(refusal), model, gpu)
        return

    stored = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert stored["pin"] == pin
    deployed = catalog.deployed(Pin.from_mapping(pin), "retrieval.passage")
    deployed = sizing.limited(deployed, stored).to_mapping()
    assert json.loads((objects(project) / "base/pin.json").read_text()) == deployed
    agrees(project, stored)
    if platform == "thinkube":
        thinkube.check(project, stored)
    for path in texts(project):
        reads_well(path, project)
    if number % 5 == 0:
        again = render(program=False, **{k: v for k, v in stored.items() if k[0] != "_"})
        assert tree(again) == tree(project)


def one_sentence_that_names(text: str, model: str, gpu: str) -> None:
    assert "\n" not in text
    assert text.endswith(".")
    assert model in text or accelerator.for_name(gpu).title in text or gpu in text


def texts(project: Path) -> Iterator[Path]:
    """All files that the template rendered, without what it copies as it is."""
    for path in sorted(project.rglob("*")):
        copied = "model_fetch" in path.parts or "tests" in path.parts
        if path.is_file() and not copied and path.suffix not in (".pyc", ".png"):
            yield path


def tree(project: Path) -> dict[str, bytes]:
    return {str(p.relative_to(project)): p.read_bytes() for p in project.rglob("*") if p.is_file()}


def reads_well(path: Path, project: Path) -> None:
    """No residue of the template, and nothing that a person would not have written."""
    text = path.read_text()
    name = str(path.relative_to(project))
    assert text.endswith("\n"), name
    assert not text.startswith("\n"), name
    assert not text.endswith("\n\n"), name
    if not name.startswith("images/model-fetch/"):
        longest_gap = max((len(gap) - 1 for gap in re.findall("\n{2,}", text)), default=0)
        assert longest_gap <= (2 if name.endswith(".py") else 1), name
    assert not re.search(r"[ \t]$", text, re.MULTILINE), name
    assert not re.search(r"\{%|%\}|\{#|\bundefined\b|\.jinja\b", text), name
    # Prometheus, Grafana and container engines have templates of their own.
    foreign = name.startswith("monitoring/") or "components/monitoring" in name
    foreign = foreign or name.startswith("scripts/")
    assert foreign or not re.search(r"\{\{", text), name
    if path.suffix in (".yaml", ".yml"):
        list(yaml.safe_load_all(text))
    if path.suffix == ".json":
        json.loads(text)
    if text.startswith("#!") and "sh" in text.split("\n", 1)[0]:
        subprocess.run(["bash", "-n", str(path)], check=True)


def objects(project: Path) -> Path:
    """The folder of the Kubernetes objects: Thinkube writes k8s/ itself."""
    return project / ("deploy" if (project / "thinkube.yaml").exists() else "k8s")


def usual(text: str) -> str:
    """A text of compose.yaml as it is without variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def agrees(project: Path, stored: dict[str, Any]) -> None:
    """What several files say, they say alike."""
    registry, name = stored["container_registry"], stored["project_name"]
    kustomization = yaml.safe_load((objects(project) / "kustomization.yaml").read_text())
    base = yaml.safe_load((objects(project) / "base/kustomization.yaml").read_text())
    compose = yaml.safe_load((project / "compose.yaml").read_text())
    listed = json.loads((project / "images/images.json").read_text())["images"]
    deployment = yaml.safe_load((objects(project) / "base/deployment.yaml").read_text())
    service = yaml.safe_load((objects(project) / "base/service.yaml").read_text())
    readme = (project / "README.md").read_text()

    images = {i["name"]: f"{i['newName']}:{i['newTag']}" for i in base["images"]}
    assert images["model-fetch"].startswith(f"{registry}/{name}-model-fetch:")
    assert compose["services"]["model-fetch"]["image"] == images["model-fetch"]
    assert usual(compose["services"]["tei"]["image"]).split("@")[0] == images["tei"]
    built = {key: f"{row['name']}:{row['tag']}" for key, row in listed.items()}
    assert built["model-fetch"] == images["model-fetch"]
    assert built.get("tei", images["tei"]) == images["tei"]

    pod = deployment["spec"]["template"]["spec"]
    (fetch,), (tei,) = pod["initContainers"], pod["containers"]
    assert "--pin=/etc/model/pin.json" in fetch["args"]
    assert "--model-id=/model/current" in tei["args"]
    # One machine keeps the link of each version, so that a server's own never moves.
    link = f"/model/{stored['pin']['registered_model']}/{stored['pin']['version']}"
    link += f"-{stored['model_task']}" if "conversion" in stored["pin"] else ""
    command = compose["services"]["tei"]["command"]
    assert f"--link={link}" in compose["services"]["model-fetch"]["command"]
    assert command == [a.replace("/model/current", link) for a in tei["args"]]
    assert f"--served-model-name={stored['pin']['model_id']}" in tei["args"]
    assert tei["ports"] == [{"name": "http", "containerPort": 8355}]
    assert "--port=8355" in tei["args"]
    assert service["spec"]["ports"][0]["port"] == 8355
    assert [*map(usual, compose["services"]["tei"]["ports"])] == ["127.0.0.1:8355:8355"]
    assert kustomization["namespace"] == stored["namespace"]
    platform = compose["services"]["tei"]["platform"]
    assert pod["nodeSelector"]["kubernetes.io/arch"] == platform.removeprefix("linux/")
    for argument in tei["args"]:
        assert f"`{argument.split('=')[0]}`" in readme, argument
    assert (
        f"| Version | {stored['pin']['version']} of `{stored['pin']['registered_model']}`" in readme
    )


@pytest.mark.parametrize("model", catalog.load())
def test_without_a_registry_the_version_is_left_to_the_cluster(render: Render, model: str) -> None:
    answers = {"accept_license": True} if "jina-embeddings-v3" in model else {}
    project = render(model_id=model, model_version="@champion", **answers)

    pin = json.loads((project / "k8s/base/pin.json").read_text())
    assert (pin["version"], pin["selector"], pin["files"]) == (None, "@champion", [])
    assert pin["model_id"] == model
    assert "in no registry at hand" in (project / "README.md").read_text()


def test_the_default_answers_are_those_of_a_dgx_spark(copie: Copie, template: Path) -> None:
    """By pytest-copie, which is for exactly this; see conftest's `render` for all the others."""
    result = copie.copy(template_dir=template)
    assert result.exit_code == 0, result.exception
    stored = result.answers

    assert (stored["accelerator"], stored["image_platform"]) == ("gb10", "linux/arm64")
    assert stored["replicas"] == "1"
    assert stored["components"] == []


def test_every_question_has_a_help_that_asks_and_a_default() -> None:
    """Copier ignores a misspelled key without a word."""
    known = {"type", "help", "choices", "default", "validator", "ask", "when", "multiselect"}
    config = yaml.safe_load((Path(__file__).parent.parent / "copier.yml").read_text())
    questions = {name: q for name, q in config.items() if not name.startswith("_")}
    for name, question in questions.items():
        assert set(question) <= known, name
        assert "default" in question, name
        hidden = name in ("pin", "objects_folder", "page_folder", "answers_agree")
        assert hidden or re.search(r"\?( \(|$)", question["help"]), name


def test_the_template_s_folders_are_enough_to_render_it() -> None:
    """Not a link leads to what else is in this repository: copies of these folders would lack it."""
    folders = [ROOT / name for name in ("template", "extensions")]
    links = [path for folder in folders for path in folder.rglob("*") if path.is_symlink()]
    assert links
    for link in links:
        assert any(link.resolve(strict=True).is_relative_to(folder) for folder in folders), link
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "template/LICENSE").read_bytes()


@pytest.mark.parametrize(
    ("accelerator", "tei_image", "said"),
    [
        ("h100", "official", " or of Hugging Face's image"),
        ("cpu", "official", ""),
        ("cpu", "build", ""),
    ],
)
def test_images_whose_digest_is_unknown_are_told(
    render: Render, accelerator: str, tei_image: str, said: str
) -> None:
    rendered = render(accelerator=accelerator, tei_image=tei_image, image_platform="linux/amd64")
    readme = " ".join((rendered / "README.md").read_text().split())
    assert f"No digest of a base image{said} was known to the template" in readme
    pinned_image = "@sha256:" in (rendered / "compose.yaml").read_text()
    assert pinned_image == (tei_image == "official" and not said)


def test_what_its_own_commands_leave_is_no_change(render: Render) -> None:
    project = render(program=False)
    for words in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *words], cwd=project, check=True)
    for left in (".env", "tei.spdx.json", "smoke/__pycache__/smoke.pyc"):
        (project / left).parent.mkdir(exist_ok=True)
        (project / left).touch()
    status = ["git", "status", "--porcelain", "--untracked-files=all"]
    said = subprocess.run(status, cwd=project, capture_output=True, text=True, check=True).stdout
    assert all(line.startswith("A ") for line in said.splitlines())


CONVERTS = {"model_fetch/jina.py", "model_fetch/jina_layouts.py", "requirements-numpy.txt"}
CLIENT = {"requirements-mlflow.txt"}


@pytest.mark.parametrize(
    ("model", "changes", "answers", "expected"),
    [
        ("BAAI/bge-base-en-v1.5", {}, {}, set()),
        ("Qwen/Qwen3-Embedding-0.6B", {"artifact_uri": "mlflow-artifacts:/1/a/artifacts/model"}, {}, set()),
        ("BAAI/bge-base-en-v1.5", {"artifact_uri": "abfss://c@a.dfs.core.windows.net/m"}, {}, CLIENT),
        ("BAAI/bge-base-en-v1.5", {"version": None, "files": []}, {}, CLIENT),
        ("BAAI/bge-base-en-v1.5", {}, {"platform": "thinkube"}, CLIENT),
        ("jinaai/jina-embeddings-v3", {}, {"accept_license": True}, CONVERTS),
    ],
)  # fmt: skip
def test_model_fetch_has_what_its_model_and_store_need(
    render: Render,
    model: str,
    changes: dict[str, Any],
    answers: dict[str, Any],
    expected: set[str],
) -> None:
    project = render(model_id=model, pin=pinned(model, **changes), **answers)

    folder = project / "images/model-fetch"
    assert {name for name in CONVERTS | CLIENT if (folder / name).exists()} == expected
    # Every module that is there can be imported without those that are not.
    modules = [f"model_fetch.{path.stem}" for path in (folder / "model_fetch").glob("[a-z]*.py")]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *modules], cwd=folder, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_pin_that_is_to_be_converted_by_a_program_that_cannot_is_refused_in_one_line(
    render: Render, tmp_path: Path
) -> None:
    project = render(model_id="BAAI/bge-base-en-v1.5", pin=pinned("BAAI/bge-base-en-v1.5"))
    (tmp_path / "model").mkdir()
    code = (
        "from pathlib import Path; from types import SimpleNamespace as N; import sys\n"
        "from model_fetch import errors, prepare\n"
        "pin = {'kind': 'jina-embeddings-v3', 'task': 'separation'}\n"
        "try: prepare._convert(Path(sys.argv[1]), pin)\n"
        "except errors.ConfigurationError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "model")],
        cwd=project / "images/model-fetch", text=True, capture_output=True,
    )  # fmt: skip
    assert done.stdout == (
        "this image does not convert jina-embeddings-v3: render the repository for that model\n"
    ), done.stderr
