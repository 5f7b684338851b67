"""Each of the eight models through the whole chain: a real registry, a render, a fetch, what TEI gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from copier.errors import UserMessageError

from demo.registry import register_snapshot
from extensions import compatibility
from tests.models import folders
from tests.models.folders import JINA_V3, MODEL_IDS

NOMIC, BGE, _, GTE, JINA_CODE, _, QWEN, QWEN_4B = MODEL_IDS
PLAIN = tuple(model_id for model_id in MODEL_IDS if model_id != JINA_V3)


NUMBERS: dict[tuple[str, str], str] = {}
"""Of the versions in the registry, which other tests' versions may stand before."""


@pytest.fixture(scope="session")
def server(mlflow_proxied: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with the eight models as mirrors of the Hub, version 1, and as sentence-transformers
    saves them today, version 2."""
    root = tmp_path_factory.mktemp("eight")
    for model_id in MODEL_IDS:
        for version, saved_again in ((1, False), (2, True)):
            if saved_again and model_id == JINA_V3:
                continue
            folder = folders.write(
                model_id, root / f"{version}-{model_id}", saved_again=saved_again
            )
            number = register_snapshot(mlflow_proxied, folder, model_id)
            NUMBERS[model_id, str(version)] = number
    return mlflow_proxied


@dataclass(frozen=True)
class Fetched:
    """What one run of the rendered repository's model-fetch left."""

    code: int
    log: str
    folder: Path

    def json(self, path: str) -> Any:
        return json.loads((self.folder / path).read_text())

    @property
    def files(self) -> dict[str, Any]:
        """As the rules look at a folder."""
        names = [p for p in sorted(self.folder.rglob("*")) if p.is_file() and p.name[0] != "."]
        found = {p.relative_to(self.folder).as_posix(): p for p in names}
        return {
            name: json.loads(path.read_text()) if path.suffix == ".json" else None
            for name, path in found.items()
        }


@pytest.fixture
def chain(
    server: str, render: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Fetched]:
    """Render against the registry, and run the rendered program on the rendered pin."""

    def run(model_id: str, version: str, **answers: Any) -> Fetched:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        number = NUMBERS.get((model_id, version), version)
        repository = render(model_id=model_id, model_version=number, **answers)
        link = tmp_path / "model/current"
        result = subprocess.run(
            [
                *(sys.executable, "-m", "model_fetch"),
                *("--pin", str(repository / "k8s/base/pin.json")),
                *("--cache", str(tmp_path / "cache"), "--link", str(link), "--no-sync"),
            ],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(repository / "images/model-fetch"),
                "MLFLOW_TRACKING_URI": server,
            },
            capture_output=True,
            text=True,
        )
        return Fetched(result.returncode, result.stdout + result.stderr, link)

    return run


@pytest.mark.parametrize("model_id", PLAIN)
def test_a_published_model_arrives_as_it_is(chain, model_id):
    fetched = chain(model_id, "1")
    assert fetched.code == 0, fetched.log
    expected = folders.configs(model_id)
    assert {path: fetched.json(path) for path in expected} == expected
    findings = compatibility.check(fetched.files)
    assert compatibility.refusal(findings) is None
    assert not [finding for finding in findings if finding.outcome == compatibility.FIXED]


@pytest.mark.parametrize("model_id", PLAIN)
def test_a_model_that_was_saved_again_is_repaired(chain, model_id):
    fetched = chain(model_id, "2")
    assert fetched.code == 0, fetched.log
    assert fetched.log.count("prepared for TEI: ") >= 3
    assert fetched.json("sentence_bert_config.json")["max_seq_length"] == 400
    original = folders.configs(model_id)["1_Pooling/config.json"]
    pooling = fetched.json("1_Pooling/config.json")
    for mode in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken"):
        assert pooling[mode] is original.get(mode, False)
    findings = compatibility.check(fetched.files)
    assert {f.outcome for f in findings} <= {compatibility.OK, compatibility.WARNED}


def test_jina_v3_is_refused_until_its_licence_is_accepted(chain):
    with pytest.raises(UserMessageError, match=r"licensed cc-by-nc-4\.0, which forbids commercial"):
        chain(JINA_V3, "1")


@pytest.mark.parametrize("task", ["retrieval.passage", "text-matching"])
def test_jina_v3_is_converted_for_its_task(chain, task):
    fetched = chain(JINA_V3, "1", accept_license=True, model_task=task)
    assert fetched.code == 0, fetched.log
    assert f"merged the adapter {task}" in fetched.log
    assert fetched.json("config.json")["model_type"] == "nomic_bert"
    assert fetched.json("conversion.json")["task"] == task
    prompt = fetched.json("config_sentence_transformers.json")["prompts"].get(task, "")
    assert prompt == folders.configs(JINA_V3)["config.json"]["task_instructions"][task]
    findings = compatibility.check(fetched.files)
    assert {f.outcome for f in findings} <= {compatibility.OK, compatibility.WARNED}


def without(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def setting(path: str, **changes: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / path).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (folder / path).write_text(json.dumps(content))

    return change


def truncated(path: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, 200)


NTK = {"rope_type": "ntk", "rope_theta": 160000, "factor": 2.0}

BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "nomic without pooling": (NOMIC, without("1_Pooling/config.json"), "pool"),
    "bge without pooling": (BGE, without("1_Pooling/config.json"), "pool"),
    "jina-code without pooling": (JINA_CODE, without("1_Pooling/config.json"), "pool"),
    "qwen3 without pooling": (QWEN, without("1_Pooling/config.json"), "pool"),
    "gte without tokenizer": (GTE, without("tokenizer.json"), "tokenizer.json"),
    "jina-v3 without tokenizer": (JINA_V3, without("tokenizer.json"), "tokenizer.json"),
    "jina-code without auto_map": (
        JINA_CODE,
        setting("config.json", auto_map=None, _name_or_path="model"),
        "no longer names Jina's code",
    ),
    "gte saved by transformers 5": (
        GTE,
        setting("config.json", rope_theta=None, rope_scaling=None, rope_parameters=NTK),
        "rope_parameters",
    ),
    "a reranker": (
        BGE,
        setting("config.json", architectures=["BertForSequenceClassification"]),
        "classifier",
    ),
    "truncated weights": (BGE, truncated("model.safetensors"), "model.safetensors"),
    "a missing shard": (QWEN_4B, without("model-00002-of-00002.safetensors"), "shard|lacks"),
    "a truncated shard": (
        QWEN_4B,
        truncated("model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors",
    ),
    "an unknown module": (
        NOMIC,
        lambda folder: (folder / "modules.json").write_text('[{"type": "x.models.LSTM"}]'),
        "LSTM",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_copy_is_refused_in_one_line(chain, server, tmp_path, name):
    """By the lookup, by the render, or by model-fetch: whoever sees it first."""
    model_id, change, message = BROKEN[name]
    folder = folders.write(model_id, tmp_path / "broken")
    change(folder)
    broken_id = f"acme/{name.replace(' ', '-')}"
    register_snapshot(server, folder, broken_id)
    try:
        fetched = chain(broken_id, "1")
    except UserMessageError as error:
        said = str(error)
    else:
        assert fetched.code in (7, 9), fetched.log
        assert not fetched.folder.exists()
        assert "Traceback" not in fetched.log
        said = fetched.log.strip().splitlines()[-1]
    assert re.search(message, said)
    assert "\n" not in said
