"""The rules on the eight models as they are published, and on every way in which a copy gets broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from extensions import accelerator, compatibility
from extensions.compatibility import FIXED, OK, REFUSED, WARNED
from tests.models.folders import (
    JINA_V3,
    MODEL_IDS,
    configs,
    files,
    saved_by_sentence_transformers_5_4,
)

Files = dict[str, Any]

NOMIC, BGE, BGE_LARGE, GTE, JINA_CODE, _, QWEN, QWEN_4B = MODEL_IDS
GB10, T4, CPU = (accelerator.for_name(name) for name in ("gb10", "t4", "cpu"))


def outcomes(findings: list[compatibility.Finding]) -> dict[str, str]:
    """The worst outcome of each rule."""
    worst: dict[str, str] = {}
    for finding in findings:
        known = worst.get(finding.rule, OK)
        worst[finding.rule] = max(known, finding.outcome, key=compatibility.OUTCOMES.index)
    return worst


def unusual(findings: list[compatibility.Finding]) -> dict[str, str]:
    """The rules that say anything but ok."""
    return {rule: outcome for rule, outcome in outcomes(findings).items() if outcome != OK}


@pytest.mark.parametrize(
    ("model_id", "hardware", "expected"),
    [
        *itertools.product((BGE, BGE_LARGE), (GB10, T4, CPU, None), ({},)),
        *itertools.product(
            (NOMIC, GTE, JINA_CODE), (GB10, T4, CPU, None), ({"vector-length": WARNED},)
        ),
        *itertools.product((QWEN, QWEN_4B), (GB10, T4, None), ({"overflow": WARNED},)),
        *itertools.product((QWEN, QWEN_4B), (CPU,), ({},)),
        *itertools.product((JINA_V3,), (GB10, T4, CPU, None), ({"conversion": REFUSED},)),
    ],
)
def test_the_published_models(model_id, hardware, expected):
    assert unusual(compatibility.check(files(model_id), hardware)) == expected


@pytest.mark.parametrize("task", compatibility.JINA_V3_TASKS)
@pytest.mark.parametrize("hardware", [GB10, T4, CPU, None])
def test_jina_v3_is_served_with_each_of_its_tasks(task, hardware):
    findings = compatibility.check(files(JINA_V3), hardware, task=task)
    assert unusual(findings) == {"conversion": FIXED}
    assert compatibility.refusal(findings) is None
    assert task in findings[-1].message


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "xlm-roberta"},  # saved again with Jina's own config class
        {"model_type": "jina_embeddings_v3", "architectures": ["JinaEmbeddingsV3Model"]},
        {"architectures": ["XLMRobertaModel"]},
    ],
)
def test_jina_v3_is_known_in_every_form(changes):
    model = files(JINA_V3)
    model["config.json"] |= changes
    assert unusual(compatibility.check(model)) == {"conversion": REFUSED}


def test_jina_v3_takes_only_tasks_that_it_has():
    findings = compatibility.check(files(JINA_V3), task="clustering")
    assert compatibility.refusal(findings) == (
        "The model has no adapter clustering: choose one of retrieval.query, retrieval.passage,"
        " separation, classification, text-matching."
    )


def test_jina_v3_is_not_converted_from_a_pickle():
    model = files(JINA_V3)
    del model["model.safetensors"]
    model["pytorch_model.bin"] = None
    assert unusual(compatibility.check(model, task="separation"))["weights"] == REFUSED


# Broken copies


def without(path: str) -> Callable[[Files], None]:
    return lambda model: model.pop(path, None)


def setting(path: str, **changes: Any) -> Callable[[Files], None]:
    """Set keys of a JSON file; a key whose value is ... is taken out."""

    def change(model: Files) -> None:
        content = model.setdefault(path, {})
        for key, value in changes.items():
            if value is ...:
                content.pop(key, None)
            else:
                content[key] = value

    return change


def with_dense(model: Files, **config: Any) -> None:
    model["modules.json"].insert(
        2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    )
    tanh = "torch.nn.modules.activation.Tanh"
    model["2_Dense/config.json"] = {
        "in_features": 768, "out_features": 256, "bias": True, "activation_function": tanh
    } | config  # fmt: skip
    model["2_Dense/model.safetensors"] = None


BROKEN: dict[str, tuple[str, Callable[[Files], None], dict[str, str], str]] = {
    "no config.json": (
        BGE,
        without("config.json"),
        {"files": REFUSED, "pooling": OK},
        "config.json",
    ),
    "no tokenizer": (BGE, without("tokenizer.json"), {"files": REFUSED}, "fast tokenizers"),
    "no weights": (BGE, without("model.safetensors"), {"weights": REFUSED}, "no weights"),
    "a pickle": (
        BGE,
        lambda m: (m.pop("model.safetensors"), m.update({"pytorch_model.bin": None})),
        {"weights": WARNED},
        "pickle",
    ),
    "a missing shard": (
        QWEN_4B,
        without("model-00002-of-00002.safetensors"),
        {"weights": REFUSED},
        "shard model-00002-of-00002.safetensors is missing",
    ),
    "quantized": (
        QWEN,
        setting("config.json", quantization_config={"bits": 4}),
        {"weights": REFUSED},
        "quantized",
    ),
    "no architectures": (
        BGE,
        setting("config.json", architectures=...),
        {"config": REFUSED},
        "lacks",
    ),
    "no model_type": (BGE, setting("config.json", model_type=...), {"config": REFUSED}, "lacks"),
    "no positions": (
        BGE,
        setting("config.json", max_position_embeddings=...),
        {"keys": REFUSED},
        "max_position_embeddings",
    ),
    "an auto_map that TEI cannot parse": (
        NOMIC,
        lambda m: m["config.json"]["auto_map"].update(AutoTokenizer=["a.b", None]),
        {"config": FIXED},
        "auto_map",
    ),
    "another architecture": (
        BGE,
        setting("config.json", model_type="t5"),
        {"architecture": REFUSED},
        "no implementation of t5",
    ),
    "a reranker": (
        BGE,
        setting("config.json", architectures=["BertForSequenceClassification"]),
        {"architecture": REFUSED},
        "classifier",
    ),
    "a sliding window": (
        QWEN,
        setting("config.json", use_sliding_window=True),
        {"keys": REFUSED},
        "sliding window",
    ),
    "jina-code without auto_map": (
        JINA_CODE,
        setting("config.json", auto_map=..., _name_or_path="jinaai/jina-embeddings-v2-base-code"),
        {"jina-v2": REFUSED},
        "no longer names Jina",
    ),
    "jina-code saved as its own code": (
        JINA_CODE,
        setting(
            "config.json",
            _name_or_path="/tmp/model",
            auto_map={"AutoConfig": "configuration_bert.JinaBertConfig"},
            architectures=["JinaBertModel"],
        ),
        {"jina-v2": REFUSED},
        "no longer names Jina",
    ),
    "gte of transformers 5": (
        GTE,
        setting(
            "config.json",
            rope_theta=...,
            rope_scaling=...,
            rope_parameters={"rope_type": "ntk", "rope_theta": 160000, "factor": 2.0},
        ),
        {"keys": REFUSED},
        "rope_scaling",
    ),
    "gte with another scaling": (
        GTE,
        setting("config.json", rope_scaling={"type": "yarn", "factor": 4.0}),
        {"keys": REFUSED},
        "yarn",
    ),
    "qwen3 with a scaling": (
        QWEN,
        setting("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        {"keys": REFUSED},
        "yarn",
    ),
    "qwen3 of transformers 5": (
        QWEN,
        setting(
            "config.json",
            rope_theta=...,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000},
        ),
        {"keys": FIXED},
        "rope_theta",
    ),
    "nomic of transformers 5": (
        NOMIC,
        setting("config.json", max_position_embeddings=2048),
        {"nomic-config": WARNED},
        "1.9.3",
    ),
    "nomic saved by transformers": (
        NOMIC,
        setting(
            "config.json",
            rotary_emb_base=...,
            n_embd=...,
            activation_function=...,
            hidden_size=768,
            max_position_embeddings=2048,
        ),
        {"nomic-config": WARNED, "keys": REFUSED},
        "lacks",
    ),
    "nomic without pooling": (
        NOMIC,
        without("1_Pooling/config.json"),
        {"pooling": REFUSED},
        "silently takes the first token",
    ),
    "jina-code without pooling": (
        JINA_CODE,
        without("1_Pooling/config.json"),
        {"pooling": REFUSED},
        "silently takes the first token",
    ),
    "qwen3 without pooling": (
        QWEN,
        without("1_Pooling/config.json"),
        {"pooling": REFUSED},
        "without which TEI stops",
    ),
    "max pooling": (
        BGE,
        setting(
            "1_Pooling/config.json", pooling_mode_cls_token=False, pooling_mode_max_tokens=True
        ),
        {"pooling": REFUSED},
        "max_tokens",
    ),
    "two poolings": (
        BGE,
        setting("1_Pooling/config.json", pooling_mode_mean_tokens=True),
        {"pooling": REFUSED},
        "cls and mean",
    ),
    "two poolings of 5.4": (
        BGE,
        lambda m: m.update({"1_Pooling/config.json": {"pooling_mode": ["cls", "max"]}}),
        {"pooling": REFUSED},
        "cls and max",
    ),
    "a pooling without what TEI requires": (
        QWEN,
        setting("1_Pooling/config.json", pooling_mode_cls_token=...),
        {"pooling": FIXED},
        "lasttoken",
    ),
    "prompts left out of the pooling": (
        BGE,
        setting("1_Pooling/config.json", include_prompt=False),
        {"pooling": WARNED},
        "without its prompt",
    ),
    "longer inputs than positions": (
        BGE,
        setting("sentence_bert_config.json", max_seq_length=8192),
        {"length": FIXED},
        "lowered to the model's 512",
    ),
    "an unknown module": (
        BGE,
        lambda m: m["modules.json"].append({"type": "sentence_transformers.models.LayerNorm"}),
        {"modules": REFUSED},
        "LayerNorm",
    ),
    "a Dense module": (BGE, with_dense, {}, ""),
    "a Dense module with an unknown function": (
        BGE,
        lambda m: with_dense(m, activation_function="torch.nn.modules.activation.GELU"),
        {"modules": REFUSED},
        "GELU",
    ),
    "a Dense module without weights": (
        BGE,
        lambda m: (with_dense(m), m.pop("2_Dense/model.safetensors")),
        {"modules": REFUSED},
        "2_Dense lacks",
    ),
    "a prompt that is no text": (
        QWEN,
        lambda m: m["config_sentence_transformers.json"]["prompts"].update(document=None),
        {"prompts": FIXED},
        "not texts",
    ),
    "a prompt that is always used": (
        QWEN,
        setting("config_sentence_transformers.json", default_prompt_name="query"),
        {},
        "",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_copy(name):
    model_id, change, expected, message = BROKEN[name]
    model = files(model_id)
    change(model)
    findings = compatibility.check(model, GB10)
    found = unusual(findings)
    always = unusual(compatibility.check(files(model_id), GB10))
    assert found == {k: v for k, v in (always | expected).items() if v != OK}
    messages = [f.message for f in findings if expected.get(f.rule) == f.outcome]
    assert not expected or any(message in m for m in messages)


@pytest.mark.parametrize("model_id", [m for m in MODEL_IDS if m != JINA_V3])
def test_files_of_sentence_transformers_5_4_are_repaired(model_id):
    """What mlflow.sentence_transformers.log_model writes today: repaired, never refused."""
    model = files(model_id)
    saved_by_sentence_transformers_5_4(model)
    findings = compatibility.check(model, GB10)
    assert compatibility.refusal(findings) is None
    found = unusual(findings)
    assert found.pop("overflow", WARNED) == WARNED
    assert found.pop("vector-length", WARNED) == WARNED
    assert found.pop("alibi", FIXED) == FIXED  # to the 400 tokens of tokenizer_config.json
    rotary = {"keys": FIXED} if model_id in (QWEN, QWEN_4B) else {}
    assert found == {"pooling": FIXED, "length": FIXED, "modules": FIXED} | rotary

    mended = compatibility.repaired(model, findings)
    original = configs(model_id)
    assert mended["sentence_bert_config.json"] == {"max_seq_length": 400, "do_lower_case": False}
    assert mended["modules.json"] == original["modules.json"]
    for mode in ("cls_token", "mean_tokens"):
        key = f"pooling_mode_{mode}"
        assert mended["1_Pooling/config.json"][key] is original["1_Pooling/config.json"][key]
    for key in ("rope_theta", "rope_scaling", "model_type"):
        assert mended["config.json"].get(key) == original["config.json"].get(key)
    again = unusual(compatibility.check(mended, GB10))
    assert FIXED not in again.values()


def test_a_dense_module_of_sentence_transformers_5_4_is_kept():
    model = files(BGE)
    saved_by_sentence_transformers_5_4(model)
    kind = "sentence_transformers.base.modules.dense.Dense"
    model["modules.json"].insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": kind})
    model["2_Dense/model.safetensors"] = None
    model["2_Dense/config.json"] = {
        "in_features": 768,
        "out_features": 256,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    findings = compatibility.check(model)
    assert compatibility.refusal(findings) is None
    mended = compatibility.repaired(model, findings)
    assert mended["modules.json"][2]["type"] == "sentence_transformers.models.Dense"

    model["2_Dense/config.json"]["module_input_name"] = "token_embeddings"
    assert "token_embeddings" in str(compatibility.refusal(compatibility.check(model)))


def test_a_length_that_nobody_says_leaves_the_file_out():
    model = files(BGE)
    model["sentence_bert_config.json"] = {"transformer_task": "feature-extraction"}
    model["tokenizer_config.json"] = {"model_max_length": 10**30}
    mended = compatibility.repaired(model, compatibility.check(model))
    assert mended["sentence_bert_config.json"]["max_seq_length"] == 512

    model["config.json"].pop("max_position_embeddings")
    del model["tokenizer_config.json"]
    findings = compatibility.check(model)
    assert "sentence_bert_config.json" not in compatibility.repaired(model, findings)


def test_two_repairs_of_one_file_both_stay():
    model = files(QWEN)
    model["config.json"]["id2label"] = {"0": 5}
    theta = model["config.json"].pop("rope_theta")
    model["config.json"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    mended = compatibility.repaired(model, compatibility.check(model))
    assert mended["config.json"]["id2label"] == {}
    assert mended["config.json"]["rope_theta"] == theta


def test_a_pooling_that_tei_is_told_needs_no_file():
    model = files(NOMIC)
    del model["1_Pooling/config.json"]
    assert unusual(compatibility.check(model, pooling="mean")) == {"vector-length": WARNED}
    assert unusual(compatibility.check(files(QWEN), pooling="last-token")) == {"overflow": WARNED}
    contradicted = compatibility.check(files(BGE), pooling="mean")
    assert unusual(contradicted) == {"pooling": WARNED}


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen2", "llama", "modernbert"])
def test_an_architecture_that_needs_other_hardware(kind):
    checked = (compatibility.check_hardware(kind, hardware) for hardware in (GB10, T4, CPU))
    on_gb10, on_t4, on_cpu = map(unusual, checked)
    assert on_t4 == {"hardware": REFUSED}
    if kind == "gemma3_text":  # in float32 alone
        assert (on_gb10, on_cpu) == ({"hardware": REFUSED}, {})
    elif kind == "modernbert":  # its mask is lost on a GPU without flash attention
        assert (on_gb10, on_cpu) == ({}, {})
    else:
        assert (on_gb10, on_cpu) == ({}, {"hardware": REFUSED})


@pytest.mark.parametrize("hardware", [GB10, T4, CPU])
@pytest.mark.parametrize("model_id", [m for m in MODEL_IDS if m != JINA_V3])
def test_what_hardware_decides_needs_no_files(model_id, hardware):
    model_type = configs(model_id)["config.json"]["model_type"]
    alone = compatibility.check_hardware(model_type, hardware)
    together = unusual(compatibility.check(files(model_id), hardware))
    assert unusual(alone) == {k: v for k, v in together.items() if k != "vector-length"}


def test_a_roberta_has_fewer_positions_than_it_says():
    model = files(BGE)
    model["config.json"] |= {"model_type": "xlm-roberta", "max_position_embeddings": 514}
    model["config.json"]["pad_token_id"] = 1
    assert unusual(compatibility.check(model)) == {}
    model["sentence_bert_config.json"]["max_seq_length"] = 514
    mended = compatibility.repaired(model, compatibility.check(model))
    assert mended["sentence_bert_config.json"]["max_seq_length"] == 512


JUNK: tuple[Any, ...] = (None, 0, -1, True, "text", [], [None], {}, {"a": None}, 1e300)


@pytest.mark.parametrize("path", [p for p in files(QWEN) if p.endswith(".json")])
def test_any_content_gives_findings_and_not_a_traceback(path):
    """Whatever a file holds, as a whole or under one key, each rule says one sentence."""
    model_ids = (QWEN, NOMIC, JINA_CODE, GTE, JINA_V3)
    for model_id, junk in itertools.product(model_ids, JUNK):
        content = files(model_id).get(path)
        variants = [files(model_id) | {path: junk}]
        for key in content if isinstance(content, dict) else ():
            variants.append(files(model_id) | {path: content | {key: junk}})
        for index in range(len(content) if isinstance(content, list) else 0):
            replaced = [junk if i == index else item for i, item in enumerate(content)]
            variants.append(files(model_id) | {path: replaced})
        for variant in variants:
            for finding in compatibility.check(variant, GB10, task="separation"):
                assert finding.outcome in compatibility.OUTCOMES
                assert finding.source
                assert finding.message.endswith(".")
                assert "\n" not in finding.message


def test_findings_are_complete_and_in_order():
    rules = [rule.name for rule in compatibility.RULES]
    assert len(set(rules)) == len(rules)
    found = [finding.rule for finding in compatibility.check(files(QWEN), GB10)]
    others = ("jina-v2", "nomic-config", "window", "alibi")
    assert found == [name for name in rules if name not in others]
