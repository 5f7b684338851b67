"""What TEI is known to compute rightly: the table against the rules, and against the real TEI."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from extensions import accelerator, compatibility, contract, sizing
from extensions.compatibility import FIXED, REFUSED, WARNED
from extensions.embedding_model import Facts
from tests import real_tei
from tests.contract import program, tiny
from tests.models.folders import MODEL_IDS, files

Files = dict[str, Any]
NOMIC, BGE, _, GTE, JINA_CODE, _, QWEN, _ = MODEL_IDS
GB10, T4, CPU = (accelerator.for_name(name) for name in ("gb10", "t4", "cpu"))


def model(kind: str, **config: Any) -> Files:
    """A folder of one architecture, as the Hub has it; ... takes a key out."""
    content = copy.deepcopy(
        files({"bert": BGE, "nomic_bert": NOMIC, "new": GTE, "qwen3": QWEN}[kind])
    )
    for key, value in config.items():
        content["config.json"].pop(key, None)
        if value is not ...:
            content["config.json"][key] = value
    return content


def judged(content: Files, **more: Any) -> tuple[str | None, dict[str, str], Files]:
    """Why it is refused, what each rule that says anything says, and the folder afterwards."""
    findings = compatibility.check(content, pooling="mean", **more)
    said = {f.rule: f.outcome for f in findings if f.outcome != compatibility.OK}
    return compatibility.refusal(findings), said, compatibility.repaired(content, findings)


# Keys of config.json


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("bert", {"is_decoder": True}, "causal"),
        ("bert", {"add_cross_attention": True}, "cross attention"),
        ("bert", {"position_embedding_type": "relative_key_query"}, "absolute"),
        ("bert", {"position_embedding_type": "rope"}, "absolute"),
        ("bert", {"hidden_act": "quick_gelu"}, "no such function"),
        ("bert", {"hidden_act": "mish"}, "no such function"),
        ("bert", {"max_position_embeddings": 128.0}, "count"),
        ("bert", {"vocab_size": ...}, "lacks vocab_size"),
        ("bert", {"quantization": {"bits": 4}}, "quantized"),
        ("nomic_bert", {"prenorm": True}, "prenorm"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction"),
        ("nomic_bert", {"rotary_emb_interleaved": True}, "rotary_emb_interleaved"),
        ("nomic_bert", {"type_vocab_size": 0}, "positive"),
        ("nomic_bert", {"activation_function": "geglu"}, "swiglu"),
        ("nomic_bert", {"causal": True}, "causal"),
        ("nomic_bert", {"use_rms_norm": True}, "LayerNorm"),
        ("new", {"position_embedding_type": "absolute"}, "rotary"),
        ("new", {"logn_attention_scale": True}, "does not start"),
        ("new", {"layer_norm_type": "rms_norm"}, "LayerNorm"),
        ("new", {"pack_qkv": False}, "one tensor"),
        ("new", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("qwen3", {"attention_bias": True}, "bias"),
        ("qwen3", {"use_sliding_window": True}, "sliding window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "dimension"),
        ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "linear"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2}}, "yarn"),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5}}, "twice"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5}}},
         "by the kind of layer"),
        ("qwen3", {"rope_scaling": {"rope_type": "default", "rope_theta": 5}}, "rope_theta in"),
        ("new", {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("new", {"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.3}}, "mixed_b"),
        ("new", {"rope_scaling": {"type": "ntk"}}, "by no number"),
        ("bert", {"pruned_heads": {"0": [1]}}, "every head"),
        ("bert", {"transformers_weights": "other.safetensors"}, "whatever it says"),
    ],
)  # fmt: skip
def test_what_tei_would_compute_otherwise_is_refused(kind, config, said):
    refused, _, _ = judged(model(kind, **config))
    assert refused is not None
    assert said in refused
    assert refused.endswith(".")


@pytest.mark.parametrize(
    ("kind", "config", "written"),
    [
        ("bert", {"hidden_act": "gelu_python"}, {"hidden_act": "gelu"}),
        ("bert", {"hidden_act": "gelu_fast"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("bert", {"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ("bert", {"hidden_dropout_prob": ...}, {"hidden_dropout_prob": 0.1}),
        ("bert", {"layer_norm_eps": ...}, {"layer_norm_eps": 1e-12}),
        ("bert", {"pad_token_id": None}, {"pad_token_id": 0}),
        ("bert", {"pad_token_id": -1}, {"pad_token_id": 0}),
        ("new", {"layer_norm_type": ..., "position_embedding_type": ...},
         {"layer_norm_type": "layer_norm", "position_embedding_type": "rope"}),
        ("qwen3", {"attention_bias": ...}, {"attention_bias": False}),
        ("qwen3", {"eos_token_id": [151645, 151643]}, {"eos_token_id": 151645}),
        ("qwen3", {"eos_token_id": None}, {"eos_token_id": 0}),
        ("qwen3", {"use_sliding_window": ...}, {"use_sliding_window": False}),
        ("qwen3", {"head_dim": ...}, {"head_dim": 128}),  # transformers' class; TEI: sizes divided
        ("qwen3", {"num_key_value_heads": None}, {"num_key_value_heads": 16}),
        ("qwen3", {"pad_token_id": -1}, {"pad_token_id": 0}),  # TEI's router parses it of every model
        ("new", {"pad_token_id": [0]}, {"pad_token_id": 0}),
        ("bert", {"use_cache": "no"}, {"use_cache": True}),
        ("qwen3", {"is_causal": False}, {"use_bidirectional_attention": True}),
        ("new", {"rope_scaling": {"type": "ntk", "rope_type": "ntk", "factor": 2.0}},
         {"rope_scaling": {"type": "ntk", "factor": 2.0}}),
        ("qwen3", {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
         {"rope_theta": 5.0}),
    ],
)  # fmt: skip
def test_what_tei_does_not_read_is_written_as_it_does(kind, config, written):
    refused, said, after = judged(model(kind, **config))
    assert refused is None
    assert said["keys"] == FIXED
    assert {key: after["config.json"][key] for key in written} == written
    assert "keys" not in judged(after)[1]


@pytest.mark.parametrize(
    ("kind", "key"),
    [("bert", "position_embedding_type"), ("bert", "use_cache"), ("new", "logn_attention_scale")],
)
def test_a_null_that_tei_cannot_parse_is_left_out(kind, key):
    refused, said, after = judged(model(kind, **{key: None}))
    assert (refused, said["keys"]) == (None, FIXED)
    assert key not in after["config.json"]


def test_what_transformers_takes_of_a_missing_or_empty_key_is_written():
    rows = contract.architectures()
    config = {"global_rope_theta": 7e4, "local_rope_theta": None}
    written = contract.judge(rows["modernbert"], config).written
    assert written["local_rope_theta"] == 7e4  # null: that of the global layers
    assert contract.judge(rows["modernbert"], {}).written["local_rope_theta"] == 10000.0
    heads = {"num_attention_heads": 8}
    assert contract.judge(rows["llama"], heads).written["num_key_value_heads"] == 8
    assert contract.judge(rows["gemma3_text"], {}).written["sliding_window"] == 4096
    assert contract.judge(rows["mistral"], {}).written["sliding_window"] == 4096
    assert "sliding_window" not in contract.judge(rows["mistral"], {"sliding_window": None}).written


def test_mistral_is_cut_where_its_window_would_act():
    """transformers lets a token see as many as the window has, TEI one more (flash_mistral.rs:57)."""
    content = model("qwen3")
    content["config.json"] = QWEN2 | {"architectures": ["MistralModel"], "model_type": "mistral"}
    del content["config.json"]["use_sliding_window"]
    content["config.json"]["max_position_embeddings"] = 32768
    for window, expected in (
        ({"sliding_window": 1000}, 1000),
        ({"sliding_window": None}, 32768),
        ({}, 4096),
    ):
        said = copy.deepcopy(content)
        said["config.json"] |= window
        said["sentence_bert_config.json"] = {"max_seq_length": 32768}
        assert contract.sequence_length(said) == expected
        refused, _, after = judged(said)
        assert refused is None
        assert after["sentence_bert_config.json"]["max_seq_length"] == expected


QWEN2 = {
    "architectures": ["Qwen2Model"], "model_type": "qwen2", "hidden_size": 64, "vocab_size": 308,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 1e6, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "use_sliding_window": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "causal", "code"),
    [
        ({}, None, None),
        ({"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}, False, None),
        ({"auto_map": {"AutoModel": "acme/it--modeling_qwen.Qwen2Model"}}, False, None),
        ({"auto_map": {"AutoModel": "modeling_two_way.Qwen2TwoWay"}}, None, WARNED),
        ({"architectures": ["Qwen2BiModel"]}, None, WARNED),
        ({"architectures": ["Qwen2ForCausalLM"]}, None, None),
        ({"architectures": ["Qwen2BiModel"], "use_bidirectional_attention": True}, False, None),
    ],
)
def test_code_that_attends_otherwise_is_heeded_or_told(more, causal, code):
    content = model("qwen3")
    content["config.json"] = QWEN2 | more
    refused, said, after = judged(content)
    assert refused is None
    assert after["config.json"].get("is_causal") is causal
    assert said.get("code") == code


def test_code_of_another_architecture_is_told():
    code = {"AutoModel": "acme/it--modeling_bert.BertWithGates"}
    assert judged(model("bert", auto_map=code))[1]["code"] == WARNED
    assert "code" not in judged(model("nomic_bert"))[1]
    assert "code" not in judged(model("new"))[1]


def test_a_key_that_nobody_has_compared_is_a_remark():
    for config in ({"attention_temperature": 0.5}, {"use_parallel_residual": True}):
        refused, said, _ = judged(model("bert", **config))
        assert (refused, said["keys"]) == (None, WARNED)
    assert judged(model("bert", some_new_flag=False, another=None))[1].get("keys") is None


def test_nomic_as_transformers_5_saves_it_is_repaired():
    content = model("nomic_bert")
    content["config.json"] = {
        **{"architectures": ["NomicBertModel"], "model_type": "nomic_bert", "vocab_size": 30528},
        **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        **{"num_hidden_layers": 12, "max_position_embeddings": 2048, "type_vocab_size": 2},
        **{"hidden_act": "silu", "layer_norm_eps": 1e-12, "pad_token_id": 0, "head_dim": 64},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    refused, said, after = judged(content)
    assert (refused, said["keys"]) == (None, FIXED)
    original = model("nomic_bert")["config.json"]
    for key in ("n_embd", "n_head", "n_inner", "n_layer", "activation_function", "rotary_emb_base",
                "prenorm", "qkv_proj_bias", "mlp_fc1_bias", "rotary_emb_interleaved"):  # fmt: skip
        assert after["config.json"][key] == original[key]
    content["config.json"]["hidden_act"] = "gelu"  # its layers are gated all the same
    assert judged(content)[0] is None or "swiglu" in str(judged(content)[0])


def test_nomic_is_cut_where_its_positions_begin_to_stretch():
    content = model("nomic_bert", rotary_scaling_factor=2.0)
    content["sentence_bert_config.json"] = {"max_seq_length": 8192}
    _, said, after = judged(content)
    assert said["nomic-config"] == WARNED
    assert after["sentence_bert_config.json"]["max_seq_length"] == 2048


# Files of sentence-transformers


TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def with_modules(*kinds: str, **dense: Any) -> Files:
    """BGE with these modules; a Dense is linear without bias unless `dense` says otherwise."""
    content = model("bert")
    content["modules.json"] = [
        {"idx": i, "name": str(i), "path": "" if kind == "Transformer" else f"{i}_{kind}",
         "type": kind if "." in kind else f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    pooling = content.pop("1_Pooling/config.json")
    for module in content["modules.json"]:
        if module["path"].endswith("Pooling"):
            content[f"{module['path']}/config.json"] = pooling
        if module["path"].endswith("Dense"):
            linear = {"in_features": 768, "out_features": 9, "bias": False,
                      "activation_function": IDENTITY}  # fmt: skip
            said = {k: v for k, v in (linear | dense).items() if v is not ...}
            content[f"{module['path']}/config.json"] = said
            content[f"{module['path']}/model.safetensors"] = None
    return content


@pytest.mark.parametrize(
    ("kinds", "dense", "said"),
    [
        (("Transformer", "Pooling", "Pooling", "Normalize"), {}, "more than one Pooling"),
        (("Transformer", "Pooling", "Normalize", "Dense"), {"bias": True}, "normalizes before"),
        (("Transformer", "Pooling", "Normalize", "Dense"), {"activation_function": TANH}, "normalizes"),
        (("Transformer", "Pooling", "Normalize", "Dense"), {"activation_function": ...}, "normalizes"),
        (("Transformer", "Dense", "Pooling"), {}, "before the Pooling"),
        (("Transformer", "Normalize", "Pooling"), {}, "before the Pooling"),
        (("Pooling", "Normalize"), {}, "does not begin with"),
        (("Transformer", "Dense"), {}, "late interaction"),
        (("Transformer", "Normalize"), {}, "late interaction"),
        (("Transformer", "Pooling", "Dense"), {"use_residual": True}, "use_residual"),
        (("Transformer", "Pooling", "Dense"), {"module_output_name": "token_embeddings"}, "works on"),
        (("Transformer", "Pooling", "Dense"), {"activation_function": "torch.nn.ReLU"}, "Tanh and"),
        (("Transformer", "Pooling", "LayerNorm"), {}, "LayerNorm"),
        (("Transformer", "Pooling", "pylate.models.Dense.Dense"), {}, "pylate"),
        (("Transformer", "Pooling", "my_code.Dense"), {}, "my_code.Dense"),
    ],
)  # fmt: skip
def test_modules_that_tei_cannot_do_are_refused(kinds, dense, said):
    refused, _, _ = judged(with_modules(*kinds, **dense))
    assert refused is not None
    assert said in refused


def test_a_transformer_in_a_folder_of_its_own_is_refused():
    """TEI would take the files beside modules.json, whatever they are."""
    content = with_modules("Transformer", "Pooling", "Normalize")
    content["modules.json"][0]["path"] = "0_Transformer"
    assert "0_Transformer" in str(judged(content)[0])


def test_modules_that_tei_can_do_are_served_and_written_as_it_reads_them():
    linear = ("Transformer", "Pooling", "Normalize", "Dense")
    assert judged(with_modules(*linear))[0] is None
    refused, said, after = judged(
        with_modules("Transformer", "Pooling", "Dropout", "Dense", activation_function=...)
    )
    assert (refused, said["modules"]) == (None, FIXED)
    assert [m["type"].rpartition(".")[2] for m in after["modules.json"]] == [
        "Transformer", "Pooling", "Dense",
    ]  # fmt: skip
    assert after["3_Dense/config.json"]["activation_function"] == TANH
    assert said["vector-length"] == WARNED


def test_the_pooling_is_the_one_that_modules_json_names():
    content = with_modules("Transformer", "Dropout", "Pooling", "Normalize")
    content["1_Pooling/config.json"] = {"pooling_mode_max_tokens": True}  # an old one
    refused, said, after = judged(content)
    assert (refused, said["pooling"]) == (None, FIXED)
    assert after["1_Pooling/config.json"]["pooling_mode_cls_token"] is True


def test_a_pooling_that_sentence_transformers_does_not_read_is_told():
    """Without modules.json it pools by mean, whatever 1_Pooling says (base/model.py:1198)."""
    for mode, told in (("cls", WARNED), ("mean", None)):
        content = model("bert")
        del content["modules.json"]
        ends = {"cls": "cls_token", "mean": "mean_tokens"}
        modes = {f"pooling_mode_{end}": name == mode for name, end in ends.items()}
        content["1_Pooling/config.json"] = {"word_embedding_dimension": 768, **modes}
        found = compatibility.check(content, pooling=mode)
        assert {f.rule: f.outcome for f in found}["pooling"] == (told or compatibility.OK)


@pytest.mark.parametrize(
    "config",
    [
        {"modality_config": {"text": {"method_output_name": ["hidden_states", 1]}}},
        {"modality_config": {"text": {"method_output_name": "pooler_output"}}},
        {"modality_config": {"text": {"method": "get_text_features"}}},
        {"module_output_name": "sentence_embedding"},
        {"transformer_task": "fill-mask"},
        {"query_expansion": {"strategy": "fixed", "length": 32}},
        {"config_args": {"output_hidden_states": True}},
        {"tokenizer_args": {"vocab_file": "other.txt"}},
        {"tokenizer_name_or_path": "acme/other"},
        {"processor_kwargs": {"split_special_tokens": True}},
        {"processing_kwargs": {"text": {"add_special_tokens": False}}},
        {"modality_config": {"image": {"method": "forward"}}},
    ],
)
def test_another_layers_output_is_refused(config):
    content = model("bert")
    content["sentence_bert_config.json"] |= config
    assert judged(content)[1]["transformer"] == REFUSED


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}),
        ("config.json", {"architectures": ["HF_ColBERT"]}),
        ("config.json", {"architectures": ["BertForSplade"]}),
    ],
)
def test_what_gives_no_single_vector_is_refused(path, config):
    content = model("bert")
    content[path] = content.get(path, {}) | config
    assert judged(content)[1]["one-vector"] == REFUSED
    content[path] |= {"model_type": "SentenceTransformer"} if "model_type" in config else {}
    assert path == "config.json" or judged(content)[0] is None


def test_arguments_of_the_tokenizer_count_as_its_own_config():
    """Whatever the name: sentence-transformers renamed them twice."""
    for name in ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs"):
        content = model("bert")
        arguments = {"do_lower_case": False, "model_max_length": 100, "trust_remote_code": True}
        content["sentence_bert_config.json"] = {name: arguments}
        content["tokenizer_config.json"] = {"tokenizer_class": "BertTokenizer"}
        content["tokenizer.json"] = tiny.tokenizer() | {"normalizer": dict(NORMALIZER)}
        refused, _, after = judged(content)
        assert refused is None
        assert after["tokenizer.json"]["normalizer"]["lowercase"] is False
        assert after["sentence_bert_config.json"]["max_seq_length"] == 100


@pytest.mark.parametrize("mode", ["cls", "mean", "last-token"])
@pytest.mark.parametrize("kind", sorted(contract.architectures()))
def test_only_poolings_that_work_are_answered(kind, mode):
    works = mode.replace("-", "") in contract.architectures()[kind].pooling
    assert (compatibility.pooling_problem(kind, mode) is None) == works


@pytest.mark.parametrize(
    ("told", "sentence", "expected"),
    [(128, None, 128), (128, 0, 128), (128.0, None, 128), (10**30, None, None), (1e30, None, None),
     (128, 64, 64), (512, None, None), (600, None, None)],
)  # fmt: skip
def test_the_length_is_what_sentence_transformers_takes(told, sentence, expected):
    content = model("bert")
    del content["sentence_bert_config.json"]
    content["tokenizer_config.json"] = {"model_max_length": told}
    if sentence is not None:
        content["sentence_bert_config.json"] = {"max_seq_length": sentence}
    after = judged(content)[2]
    assert after.get("sentence_bert_config.json", {}).get("max_seq_length") == expected


def test_a_prompt_of_every_text_is_rendered():
    facts = Facts("bert", default_prompt="query", prompts={"query": "query: "}, weights_bytes=10**8)
    assert "--default-prompt-name=query" in flags(facts)
    assert not [f for f in flags(Facts("bert", weights_bytes=10**8)) if "default-prompt-name" in f]


def plan(facts: Facts, **given: Any) -> Any:
    from tests.test_sizing import ANSWERS, pin_with

    answers = ANSWERS | {"accelerator": "cpu"} | given
    return sizing.plan(sizing.limited(pin_with(facts), answers), answers)


def flags(facts: Facts, **given: Any) -> tuple[str, ...]:
    return plan(facts, **given).args


# Tokenizer


NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
              "strip_accents": None, "lowercase": True}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "key", "value", "field"),
    [
        ("BertTokenizer", "do_lower_case", False, "lowercase"),
        ("BertTokenizerFast", "strip_accents", False, "strip_accents"),
        ("DistilBertTokenizer", "tokenize_chinese_chars", False, "handle_chinese_chars"),
        ("MPNetTokenizer", "do_lower_case", False, "lowercase"),
    ],
)
def test_what_only_tokenizer_config_says_is_written_into_the_copy(kind, key, value, field):
    content = model("bert")
    content["sentence_bert_config.json"]["do_lower_case"] = False
    content["tokenizer_config.json"] = {"tokenizer_class": kind, key: value}
    inner = {"type": "Sequence", "normalizers": [{"type": "NFC"}, dict(NORMALIZER)]}
    for normalizer in (dict(NORMALIZER), inner):
        content["tokenizer.json"] = tiny.tokenizer() | {"normalizer": normalizer}
        _, said, after = judged(content)
        assert said["tokenizer"] == FIXED
        written = after["tokenizer.json"]["normalizer"]
        part = written if "normalizers" not in written else written["normalizers"][1]
        assert part[field] is value
        assert content["tokenizer.json"]["normalizer"] == normalizer  # the original is not touched
        # A sequence is one that transformers 5 replaces.
        left = WARNED if "normalizers" in normalizer else None
        assert judged(after)[1].get("tokenizer") == left


def test_what_a_tokenizer_takes_by_default_is_written_too():
    """transformers lowers the texts of a BERT that has no tokenizer_config.json."""
    content = model("bert")
    content.pop("tokenizer_config.json", None)
    cased = dict(NORMALIZER) | {"lowercase": False}
    content["tokenizer.json"] = tiny.tokenizer() | {"normalizer": cased}
    content["sentence_bert_config.json"]["do_lower_case"] = False
    _, said, after = judged(content)
    assert said["tokenizer"] == FIXED
    assert after["tokenizer.json"]["normalizer"]["lowercase"] is True


def test_a_prefix_space_and_lower_case_are_written_and_left_sides_told():
    content = model("bert")
    content["tokenizer.json"] = tiny.tokenizer() | {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}
    }
    content["tokenizer_config.json"] = {
        "tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, "truncation_side": "left"
    }  # fmt: skip
    content["sentence_bert_config.json"]["do_lower_case"] = True
    _, said, after = judged(content)
    assert after["tokenizer.json"]["pre_tokenizer"]["add_prefix_space"] is True
    assert after["tokenizer.json"]["normalizer"]["normalizers"] == [{"type": "Lowercase"}]
    assert said["lower-case"] == FIXED
    messages = [f.message for f in compatibility.check(content, pooling="mean")]
    assert any("truncation_side" in message for message in messages)


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


@pytest.mark.parametrize("processor", [None, BYTE_LEVEL, "template"])
def test_the_end_token_is_added_where_tokenizer_config_asks_for_it(processor):
    content = model("qwen3")
    whole = tiny.tokenizer()
    template = whole["post_processor"] | {"single": whole["post_processor"]["single"][:2]}
    content["tokenizer.json"] = whole | {
        "post_processor": template if processor == "template" else processor
    }
    content["tokenizer_config.json"] = {"add_eos_token": True, "eos_token": {"content": "[SEP]"}}
    _, said, after = judged(content)
    assert said["special-tokens"] == FIXED
    tokenizers = pytest.importorskip("tokenizers")
    loaded = tokenizers.Tokenizer.from_str(json.dumps(after["tokenizer.json"]))
    assert loaded.encode("w1 w2").tokens[-1] == "[SEP]"
    assert "special-tokens" not in judged(after)[1]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True},
            "add_prefix_space",
        ),
        ({"auto_map": {"AutoTokenizer": ["tokenization_it.Slow", None]}}, "code of its own"),
        ({"added_tokens_decoder": {"999": {"content": "<query>"}}}, "first <query>"),
        ({"additional_special_tokens": ["<query>"]}, "first <query>"),
        ({"extra_special_tokens": {"query_token": "<query>"}}, "first <query>"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "BertJapaneseTokenizer is Python code"),
        ({"tokenizer_class": "PhobertTokenizer"}, "PhobertTokenizer is Python code"),
        ({"tokenizer_class": "RobertaTokenizer", "cls_token": "[MASK]"}, "cls_token: [MASK]"),
        ({"tokenizer_class": "BertTokenizerFast", "sep_token": {"content": "w1"}}, "sep_token: w1"),
        ({"tokenizer_class": "MPNetTokenizer", "unk_token": "w2"}, "unk_token: w2"),
        ({"add_eos_token": False, "eos_token": "[SEP]"}, "add_eos_token: false"),
        ({"add_bos_token": False, "bos_token": {"content": "[CLS]"}}, "add_bos_token: false"),
    ],
)
def test_what_versions_of_transformers_differ_in_is_told(config, said):
    content = model("qwen3")
    prefix = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["tokenizer.json"] = tiny.tokenizer() | {"pre_tokenizer": prefix}
    content["tokenizer_config.json"] = config
    findings = compatibility.check(content, pooling="mean")
    assert any(said in f.message for f in findings if f.outcome == WARNED)
    known = {"added_tokens_decoder": {"0": {"content": "[CLS]"}}, "add_prefix_space": False,
             "add_eos_token": True, "eos_token": "[SEP]"}  # fmt: skip
    content["tokenizer_config.json"] = known
    assert {"tokenizer", "special-tokens"}.isdisjoint(judged(content)[1])


MASK = {"content": "[MASK]", "lstrip": False, "rstrip": False, "normalized": False, "special": True,
        "single_word": True}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "said", "lost"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"4": MASK}}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4": MASK | {"lstrip": True}}}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": MASK | {"content": "w2"}}}, None),
        ("tokenizer_config.json", {"additional_special_tokens": ["w2"]}, None),
        ("tokenizer_config.json", {"extra_special_tokens": ["w3", "w2"]}, None),
        ("added_tokens.json", {"w2": 7}, None),
        ("special_tokens_map.json", {"additional_special_tokens": ["w2"]}, None),
        ("added_tokens.json", {"<query>": 255}, "<query>"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<query>"]}, "<query>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "BertTokenizer"])
def test_added_tokens_of_every_file_are_written_or_told(path, said, lost, name, tmp_path):
    content = model("bert")
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "pad", "sep", "unk", "mask")}
    whole = tiny.tokenizer()
    if name == "BertTokenizer":  # as transformers builds it
        whole |= {"normalizer": dict(NORMALIZER), "pre_tokenizer": {"type": "BertPreTokenizer"}}
    content["tokenizer.json"] = whole
    content["tokenizer_config.json"] = names | {"tokenizer_class": name}
    content[path] = content.get(path, {}) | said
    findings = compatibility.check(content, pooling="mean")
    told = [f.message for f in findings if f.rule == "tokenizer" and f.outcome == WARNED]
    assert (f"first {lost}" in " ".join(told)) if lost else not told
    after = compatibility.repaired(content, findings)
    assert "tokenizer" not in {
        f.rule for f in compatibility.check(after, pooling="mean") if f.outcome == FIXED
    }
    transformers = pytest.importorskip("transformers")
    for file in ("tokenizer.json", "config.json", "tokenizer_config.json", path):
        tiny.write(tmp_path / file, content[file])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = pytest.importorskip("tokenizers").Tokenizer.from_str(json.dumps(after["tokenizer.json"]))
    for text in ("w1 w2[MASK] w3", "w1 xw2 w3 xw3", "w2  [MASK] w4"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_the_tokenizer_class_may_stand_in_config_json():
    content = model("new", tokenizer_class="RobertaTokenizer")
    prefix = {"type": "ByteLevel", "add_prefix_space": False}
    content["tokenizer.json"] = tiny.tokenizer() | {"pre_tokenizer": prefix}
    content["tokenizer_config.json"] = {"add_prefix_space": True}
    assert judged(content)[2]["tokenizer.json"]["pre_tokenizer"]["add_prefix_space"] is True


# Weights


@pytest.mark.parametrize("dtype", ["U32", "I8", "U8", "F64", "I64", "F8_E4M3", "BOOL"])
def test_weights_of_another_type_are_refused(dtype):
    tensors = {"embeddings.word_embeddings.weight": dtype, "embeddings.position_ids": "I64"}
    assert dtype in str(judged(model("bert"), tensors=tensors)[0])
    fine = {"embeddings.word_embeddings.weight": "BF16", "embeddings.position_ids": "I64"}
    assert judged(model("bert"), tensors=fine)[0] is None


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("encoder.layer.0.attention.self.query.qweight", "I32", "I32"),
        ("encoder.layer.0.output.dense.SCB", "I8", "I8"),
        ("encoder.layer.0.attention.self.query.base_layer.weight", "F32", "not merged"),
        ("encoder.layer.0.attention.self.query.lora_A.default.weight", "F32", "not merged"),
        ("classifier.modules_to_save.default.weight", "F32", "not merged"),
        ("embeddings.token_type_ids", "I64", None),
    ],
)
def test_weights_that_are_packed_or_not_merged_are_refused(name, dtype, said):
    tensors = {"embeddings.word_embeddings.weight": "F32", name: dtype}
    refused = judged(model("bert"), tensors=tensors)[0]
    assert (refused is None) if said is None else (said in str(refused))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_an_adapter_beside_the_weights_is_refused(weights):
    content = model("bert")
    del content["model.safetensors"]
    content |= {weights: None, "adapter_config.json": {"base_model_name_or_path": "acme/it"}}
    assert "merge it" in str(judged(content)[0])


@pytest.mark.parametrize(
    ("kind", "name", "fits"),
    [
        ("bert", "bert.embeddings.word_embeddings.weight", True),
        ("bert", "roberta.embeddings.word_embeddings.weight", False),
        ("bert", "encoder.embeddings.word_embeddings.weight", False),
        ("nomic_bert", "nomic.embeddings.word_embeddings.weight", False),
        ("new", "new.embeddings.word_embeddings.weight", True),
        ("qwen3", "model.embed_tokens.weight", True),
        ("qwen3", "language_model.model.embed_tokens.weight", False),
    ],
)
def test_tensors_are_looked_for_where_tei_looks(kind, name, fits):
    assert (judged(model(kind), tensors={name: "F32"})[0] is None) == fits


def test_layers_under_other_names_are_refused():
    """The embeddings are where TEI looks, and the layers as another library calls them, or too few."""
    for layer, layers, fits in (
        ("encoder.layer", 24, True),
        ("layers", 24, False),
        ("encoder.layer", 23, False),
    ):
        names = [f"{layer}.{n}.{part}.weight" for n in range(layers) for part in range(8)]
        tensors = dict.fromkeys(["embeddings.word_embeddings.weight", *names], "F32")
        assert (judged(model("bert", num_hidden_layers=24), tensors=tensors)[0] is None) == fits


def test_whole_weights_under_other_names_are_refused():
    tensors = {f"transformer.h.{i}.weight": "F32" for i in range(500)}
    assert "TEI looks for" in str(judged(model("qwen3"), tensors=tensors)[0])


# Hardware and image


@pytest.mark.parametrize(
    ("kind", "facts", "hardware", "served"),
    [
        ("deberta-v2", {}, CPU, False),
        ("deberta-v2", {}, GB10, False),
        ("qwen3", {}, CPU, False),
        ("qwen3", {}, T4, False),
        ("qwen3", {}, GB10, True),
        ("qwen3", {"attention": "both"}, CPU, True),
        ("gemma3_text", {}, CPU, False),
        ("gemma3_text", {"attention": "both"}, CPU, True),
        ("bert", {}, CPU, True),
    ],
)
def test_without_our_edits_some_are_refused(kind, facts, hardware, served):
    known = Facts(kind, **facts)
    findings = compatibility.check_hardware(kind, hardware, edited=False, facts=known)
    assert (compatibility.refusal(findings) is None) == served
    built = compatibility.check_hardware(kind, hardware, facts=known)
    assert compatibility.refusal(built) is None


def test_embeddinggemma_is_cut_at_half_its_window_on_the_official_image():
    facts = Facts("gemma3_text", max_input_tokens=2048, attention="both", window=512)
    assert compatibility.served_tokens(facts, CPU) is None
    assert compatibility.served_tokens(facts, CPU, edited=False) == 257


def test_alibi_is_cut_to_a_table_that_fits_and_its_memory_is_counted():
    facts = Facts("bert", max_input_tokens=8192, attention_heads=12, alibi=True, hidden_size=768,
                  weights_bytes=644_000_000)  # fmt: skip
    assert compatibility.served_tokens(facts, CPU) == 4096
    assert compatibility.served_tokens(facts, GB10) is None
    served = plan(facts)
    assert served.served_input_tokens <= 4096
    assert served.memory.overhead == 12 * 12 * 4096**2
    content = copy.deepcopy(files(JINA_CODE))
    after = judged(content, longest=4096)[2]
    assert after["config.json"]["max_position_embeddings"] == 4096


def test_an_activation_that_a_gpu_leaves_out_is_refused_there():
    silu = Facts("bert", activation="silu")
    for hardware, served in ((CPU, True), (T4, False), (GB10, False)):
        findings = compatibility.check_hardware("bert", hardware, facts=silu)
        assert (compatibility.refusal(findings) is None) == served


# The real TEI


def test_the_table_was_verified_with_the_default_tei():
    """A changed tei_ref fails here, until `make contract CONTRACT_ARGS=--write` has noted a run."""
    noted = json.loads(program.RESULT.read_text())
    assert noted["commit"] == contract.table()["commit"] == real_tei.commit()
    assert set(noted["rows"]) == set(tiny.MODELS)
    assert f"{program.BEGIN}\n{program.markdown()}\n{program.END}" in program.DOCUMENT.read_text()


def test_every_row_has_a_source():
    for row in contract.table()["architectures"].values():
        for key, said in row.get("keys", {}).items():
            assert said["source"].split()[0] in ("run", "read"), key


NEEDS_REFERENCE = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed: make .venv/.reference",
)


@pytest.mark.reference
@pytest.mark.skipif(real_tei.router(edited=True) is None, reason=real_tei.LEFT_OUT)
@NEEDS_REFERENCE
@pytest.mark.parametrize("name", ["modernbert", "nomic_bert", "gte", "gemma3_text"])
def test_what_log_model_saves_today_is_served_rightly(name, tmp_path):
    """From sentence-transformers' own files to the real TEI's vectors, through model-fetch's rules."""
    saved = tmp_path / "saved"
    expected = tiny.saved_again(tiny.build(name, tmp_path / "first"), saved)
    served = program.repaired(saved, "mean", edited=True)
    found = program.Program(edited=True).vectors(served, "mean")
    assert tiny.worst(found["alone"], expected) > program.RIGHT
    assert found["batches"] > program.ALONE


THETA = {kind: {"rope_type": "default", "rope_theta": 300.0}
         for kind in ("full_attention", "sliding_attention")}  # fmt: skip


@pytest.mark.reference
@pytest.mark.skipif(real_tei.router(edited=True) is None, reason=real_tei.LEFT_OUT)
@NEEDS_REFERENCE
@pytest.mark.parametrize(
    ("name", "spoilt", "built"),
    [
        ("bert", {"use_cache": None}, {}),
        ("qwen3", {"head_dim": ...}, {"head_dim": 128}),
        ("gte", {"pad_token_id": [0]}, {}),
        ("gte", {"rope_parameters": {"rope_type": "default"}}, {}),
        ("modernbert", {"local_rope_theta": None, "global_rope_theta": 300.0, "rope_parameters": ...},
         {"rope_parameters": THETA}),
    ],
)  # fmt: skip
def test_what_transformers_takes_and_tei_does_not_parse_is_repaired(name, spoilt, built, tmp_path):
    folder = tiny.build(name, tmp_path / "model", **built)
    expected, path = tiny.vectors(folder), folder / "config.json"
    config = json.loads(path.read_text()) | spoilt
    tiny.write(path, {key: value for key, value in config.items() if value is not ...})
    real = program.Program(edited=True)
    with pytest.raises(real_tei.NotServing):
        real.vectors(folder, "mean")
    found = real.vectors(program.repaired(folder, "mean", edited=True), "mean")
    assert tiny.worst(found["alone"], expected) > program.RIGHT
    assert found["batches"] > program.ALONE


@pytest.mark.reference
@pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT)
@NEEDS_REFERENCE
def test_the_table_is_right_on_the_real_tei(capsys):
    code = program.main(["--quick"])
    said = capsys.readouterr().out
    assert code == 0, said


def test_a_fault_is_seen(tmp_path, monkeypatch):
    """The program itself: vectors that are not the model's are a fault."""
    pytest.importorskip("transformers")
    folder = tiny.build("bert", tmp_path / "model")
    wrong = SimpleNamespace(
        edited=True, worst={}, vectors=lambda *_: {"alone": [[1.0] * 64] * 9, "batches": 1.0}
    )
    found = list(program._compare("bert", "as saved", folder, "mean", wrong))
    assert "not the model's vectors" in found[0][1]
    assert isinstance(Path(folder), Path)
