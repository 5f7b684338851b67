"""Every reader of rendering, on values that were spoilt at random: a documented error, or a value.

Seeded, with a bounded number of tries, so that `make test` is the same each time; `make fuzz` takes
more tries and another seed each time. Hypothesis, not atheris: the readers take structures, not
bytes, and what is found comes out small. What was found is an example in the tests of its reader.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extensions import answers, embedding_model, reading, registry
from extensions import pin as pins
from extensions.errors import TemplateError
from tests.conftest import ROOT, pinned, program
from tests.snapshots import CONFIG
from tests.test_registry_answers import RUN
from tests.test_weights_header import FILES, Memory

TRIES = int(os.environ.get("FUZZ_TRIES", "150"))
seeded = settings(
    max_examples=TRIES,
    derandomize="FUZZ_TRIES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JUNK = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, 10**400, 0.5, 1e308, "", "a", "x" * 300, "\x1b[31m",
    "{{ 7 * 7 }}", "../x", "/", "1", "-1", "é", "\u202e", [], [[]], [None], ["a"], {}, {"": ""}, {"a": None},
    "float32", "mean", "bert", [1, 2], {"a": {"b": {"c": []}}},
]  # fmt: skip


def spoil(value: Any, draw: Callable[..., Any]) -> Any:
    """The value with up to three of its parts replaced, left out, or doubled."""
    holder: dict[str, Any] = {"root": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 3))):
        at: Any = holder
        key: Any = "root"
        while isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
            at = at[key]
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys))
        if draw(st.booleans()) or at is holder:
            at[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif isinstance(at, dict):
            del at[key]
        else:
            at.append(at[key])
    return holder["root"]


spoilt = st.composite(lambda draw, value: spoil(value, draw))


def ends(work: Callable[[], Any]) -> Any:
    """What comes of it; an error must be one of those that users know, in one short line."""
    try:
        return work()
    except TemplateError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) <= 500
    return None


@seeded
@given(spoilt(pinned("BAAI/bge-base-en-v1.5", workspace="a", conversion=None)))
def test_a_pin(mapping: Any) -> None:
    pin = ends(lambda: pins.Pin.from_mapping(mapping))
    if pin is not None:
        assert pins.Pin.from_mapping(pin.to_mapping()) == pin
        json.dumps(pin.to_mapping()).encode()


DOCUMENTS = {
    "config.json": CONFIG,
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
    "modules.json": [{"idx": 0, "path": "", "type": "a.Transformer"}, {"path": "2_Dense", "type": "a.Dense"}],
    "tokenizer_config.json": {"model_max_length": 64, "added_tokens_decoder": {"0": {"content": "[PAD]"}}},
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "tokenizer.json": {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 1}}},
    "2_Dense/config.json": {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "x"},
}  # fmt: skip
HEADER = {
    "w": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
    "__metadata__": {"a": "b"},
}


@seeded
@given(st.sampled_from(sorted(DOCUMENTS)), st.data())
def test_a_model_s_files(path: str, data: st.DataObject) -> None:
    written = {name: json.dumps(value).encode() for name, value in DOCUMENTS.items()}
    written[path] = json.dumps(data.draw(spoilt(DOCUMENTS[path]))).encode()
    header = json.dumps(data.draw(spoilt(HEADER))).encode()
    weights = FILES["model.safetensors"]
    if data.draw(st.booleans()):
        weights = len(header).to_bytes(8, "little") + header + bytes(4)
    folder = Memory(written | {"model.safetensors": weights, "2_Dense/model.safetensors": weights})
    model = ends(lambda: embedding_model.inspect(folder, "a model"))
    if model is not None:
        ends(lambda: pins._judged(model, "a model"))


ANSWERS = {
    "model-versions/search": {
        "model_versions": [{"version": "1", "source": f"runs:/{RUN}/model", "run_id": RUN, "status": "READY"}]
    },
    "runs/get": {
        "run": {"info": {"artifact_uri": "s3://a/b"}, "data": {"params": [{"key": "a", "value": "a/b"}]}}
    },
    "artifacts/list": {"files": [{"path": "model/config.json", "file_size": 3, "is_dir": False}]},
    "registered-models/get": {"registered_model": {"aliases": [{"alias": "a", "version": "1"}]}},
    "registered-models/search": {"registered_models": [{"name": "acme-x"}], "next_page_token": ""},
    "logged-models/search": {"models": [{"info": {"source_run_id": RUN, "model_id": "m-1"}}]},
}  # fmt: skip


@seeded
@given(st.sampled_from(sorted(ANSWERS)), st.data())
def test_a_registry_s_answers(which: str, data: st.DataObject) -> None:
    said = ANSWERS | {which: data.draw(spoilt(ANSWERS[which]))}

    class Told(registry.Registry):
        """A registry that says this, without a network."""

        def __init__(self) -> None:
            self.shown = "http://mlflow"

        def _ask(self, url: str, *_: Any, **__: Any) -> registry.Answer:
            value = next((v for end, v in said.items() if url.endswith(end)), None)
            status = 404 if value is None else 200
            body = json.dumps(value or {"error_code": "RESOURCE_DOES_NOT_EXIST"}).encode()
            return registry.Answer(status, "application/json", False, "", body)

    told = Told()
    version = ends(lambda: told.find("acme-x", "latest"))
    if version is not None:
        ends(lambda: told.entries(version, ""))
    ends(lambda: told.find("acme-x", "@b"))
    ends(told.names)


@seeded
@given(st.sampled_from(sorted(answers.NAMES)), st.sampled_from(JUNK) | st.text(max_size=40))
def test_an_answer(name: str, value: Any) -> None:
    ends(lambda: answers.check({name: value}))
    if isinstance(value, str):
        answers.mapping(value)


@seeded
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_a_document(data: bytes) -> None:
    try:
        value = reading.document(data)
    except reading.UnreadableError:
        return
    assert value == json.loads(data)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@seeded
@given(spoilt(pinned("BAAI/bge-base-en-v1.5")))
def test_a_pin_that_update_compares(tmp_path_factory: pytest.TempPathFactory, pin: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz/k8s/base"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pin.json").write_text(json.dumps(pin))
    (folder / "deployment.yaml").write_text('    - "--port=80"\n')
    update = program(ROOT / "template/scripts/update.py")
    state = update.Repository(folder.parent.parent).state()
    assert state is None or all(line.isprintable() for line in update.described(state, state))
