"""What is done to a fetched model before TEI gets it: small files repaired, weights never touched."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fetchkit.models import CONFIG, POOLING, embedding_model, write  # noqa: E402
from model_fetch import jina, prepare  # noqa: E402
from model_fetch.errors import ConfigurationError, UnsuitableModelError  # noqa: E402


def pin(pooling: str | None = None, **more: Any) -> Any:
    """As much of a pin as the preparation looks at."""
    return SimpleNamespace(facts=SimpleNamespace(pooling=pooling), **more)


@pytest.fixture
def store(tmp_path) -> Path:
    """A read-only artifact store with a model as sentence-transformers 6.2.0 saves it."""
    files: dict[str, Any] = {
        "1_Pooling/config.json": {
            "embedding_dimension": 384,
            "pooling_mode": "mean",
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
        "tokenizer_config.json": {"model_max_length": 256},
        "modules.json": [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
            },
            {
                "idx": 1,
                "name": "1",
                "path": "1_Pooling",
                "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
            },
        ],
    }
    encoded = {path: json.dumps(content).encode() for path, content in files.items()}
    folder = write(embedding_model(4096) | encoded, tmp_path / "store")
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def folder(store, tmp_path) -> Path:
    """The version's folder: links into the store, as with a mounted artifact store."""
    folder = tmp_path / "folder"
    for path in store.rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(store)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_sentence_transformers_writes_today_is_repaired(folder, store):
    before = snapshot(store)
    changes = prepare.prepare(folder, pin("mean"))
    assert len(changes) == 3

    def read(path: str) -> Any:
        return json.loads((folder / path).read_text())

    assert read("sentence_bert_config.json")["max_seq_length"] == 256
    assert read("1_Pooling/config.json")["pooling_mode_mean_tokens"] is True
    assert read("1_Pooling/config.json")["pooling_mode_cls_token"] is False
    assert read("modules.json")[0]["type"] == "sentence_transformers.models.Transformer"

    assert snapshot(store) == before
    linked = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink()}
    assert linked == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(snapshot(folder)) == set(before)


def test_what_rendering_could_not_see_is_told(folder):
    """A tokenizer.json of more than 8 MiB is read here alone, so its remarks come from here."""
    config = folder / "tokenizer_config.json"
    config.unlink()
    config.write_text(json.dumps({"model_max_length": 256, "split_special_tokens": True}))
    told: list[str] = []
    changes = prepare.prepare(folder, pin("mean"), told.append)
    assert any("split_special_tokens" in remark for remark in told)
    assert not set(told) & set(changes)


def test_a_second_time_nothing_is_left_to_do(folder):
    prepare.prepare(folder, pin("mean"))
    after = snapshot(folder)
    assert prepare.prepare(folder, pin("mean")) == []
    assert snapshot(folder) == after


def test_a_good_model_is_left_alone(tmp_path):
    folder = write(embedding_model(4096), tmp_path / "model")
    before = {path: path.stat() for path in folder.rglob("*")}
    assert prepare.prepare(folder, pin()) == []
    assert {path: path.stat() for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("config.json", CONFIG | {"model_type": "t5"}, "no implementation of t5"),
        ("config.json", CONFIG | {"position_embedding_type": "alibi"}, "no longer names Jina"),
        ("config.json", None, "no readable config.json"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("model.safetensors", None, "no weights"),
        ("1_Pooling/config.json", POOLING | {"pooling_mode_max_tokens": True}, "mean and max"),
        ("modules.json", [{"type": "sentence_transformers.models.LSTM"}], "LSTM"),
    ],
)
def test_what_tei_would_serve_wrongly_is_refused_and_left_as_it_is(
    tmp_path, path, content, message
):
    folder = write(embedding_model(4096), tmp_path / "model")
    if content is None:
        (folder / path).unlink()
    else:
        (folder / path).write_text(json.dumps(content))
    before = snapshot(folder)
    with pytest.raises(UnsuitableModelError, match=message):
        prepare.prepare(folder, pin())
    assert snapshot(folder) == before


def test_damaged_files_are_refused(tmp_path):
    folder = write(embedding_model(4096), tmp_path / "model")
    (folder / "modules.json").write_text('[{"type":')
    with pytest.raises(UnsuitableModelError, match=r"modules\.json is not JSON"):
        prepare.prepare(folder, pin())
    (folder / "modules.json").write_text("[]")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UnsuitableModelError, match="damaged or cut short"):
        prepare.prepare(folder, pin())


def test_a_pooling_from_the_pin_stands_in_for_the_file(tmp_path):
    folder = write(embedding_model(4096), tmp_path / "model")
    (folder / "1_Pooling/config.json").unlink()
    assert prepare.prepare(folder, pin("mean")) == []


# jina-embeddings-v3


@pytest.fixture
def jina_folder(tmp_path) -> Path:
    pytest.importorskip("numpy", reason="the conversion needs numpy")
    import jina_checkpoints

    store = tmp_path / "store"
    jina_checkpoints.save(jina_checkpoints.random_checkpoint(), store, "hf")
    folder = tmp_path / "folder"
    for path in store.rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(store)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return folder


def conversion(task: str = "retrieval.passage", kind: str = jina.KIND) -> dict[str, str]:
    return {"kind": kind, "task": task}


def test_a_conversion_takes_the_place_of_what_was_fetched(jina_folder, tmp_path):
    before = snapshot(tmp_path / "store")
    changes = prepare.prepare(jina_folder, pin("mean", conversion=conversion()))
    assert changes == [
        'merged the adapter retrieval.passage, whose texts begin with "Represent the document for'
        " retrieval: \", and wrote 40 tensors (float16) for TEI's nomic_bert"
    ]
    assert set(snapshot(jina_folder)) == {
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "conversion.json",
        "model.safetensors",
        "sentence_bert_config.json",
        "tokenizer.json",
    }
    assert not [path for path in jina_folder.rglob("*") if path.is_symlink()]
    assert snapshot(tmp_path / "store") == before
    record = json.loads((jina_folder / "conversion.json").read_text())
    assert record["task"] == "retrieval.passage"
    assert record["license"] == "cc-by-nc-4.0"
    config = json.loads((jina_folder / "config.json").read_text())
    assert config["model_type"] == "nomic_bert"
    assert prepare.prepare(jina_folder, pin("mean")) == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, UnsuitableModelError, "choose one of its tasks"),
        (conversion("clustering"), UnsuitableModelError, "no adapter clustering"),
        (conversion(kind="quantize"), ConfigurationError, "pin.conversion must be"),
        ({"kind": jina.KIND}, ConfigurationError, "pin.conversion must be"),
        ("retrieval.query", ConfigurationError, "pin.conversion must be"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(jina_folder, given, error, message):
    before = snapshot(jina_folder)
    with pytest.raises(error, match=message):
        prepare.prepare(jina_folder, pin("mean", conversion=given))
    assert snapshot(jina_folder) == before


def test_an_interrupted_conversion_leaves_what_was_fetched(jina_folder, monkeypatch):
    before = snapshot(jina_folder)
    blocks = jina.Weight.blocks

    def interrupted(weight, dtype):
        yield from blocks(weight, dtype)
        if "layers.1" in weight.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(jina.Weight, "blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(jina_folder, pin("mean", conversion=conversion()))
    assert snapshot(jina_folder) == before

    monkeypatch.undo()
    (jina_folder / ".converted").mkdir()  # a process that was killed could not clean up
    (jina_folder / ".converted/model.safetensors.partial").write_bytes(b"half")
    prepare.prepare(jina_folder, pin("mean", conversion=conversion()))
    assert ".converted/model.safetensors.partial" not in snapshot(jina_folder)
