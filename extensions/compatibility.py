"""Whether TEI serves a model as it is, after small repairs, or not at all: one set of rules.

The rules look at the parsed configuration files of a model folder, at the names of its tensors where
somebody has read them, and at nothing else, so the same ones run when a repository is rendered and
when the init container has fetched the model. What TEI computes rightly is a table (contract.py);
here it is applied. "TEI" with a file name is huggingface/text-embeddings-inference at
0d124dc9773be6ac5a9a57d8439aba9bbbf33273; "#" with a number is an issue or pull request there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from . import contract, module_rules, tokenizer_rules
from .contract import JINA_V2, JINA_V2_CODE
from .embedding_model import Facts
from .findings import (
    FIXED,
    OK,
    OUTCOMES,
    REFUSED,
    WARNED,
    Files,
    Finding,
    Hardware,
    Model,
    Result,
    Rule,
    Tensors,
)
from .module_rules import POOLING_MODES, pooling_problem

__all__ = [
    "FIXED",
    "JINA_V2",
    "JINA_V2_CODE",
    "OK",
    "OUTCOMES",
    "POOLING_MODES",
    "REFUSED",
    "WARNED",
    "Finding",
    "Hardware",
    "Model",
    "pooling_problem",
]

ARCHITECTURES = contract.architectures()
"""By `model_type` (TEI backends/candle/src/lib.rs:126-154 and the dispatch below it)."""

JINA_V3_TASKS = (
    "retrieval.query",
    "retrieval.passage",
    "separation",
    "classification",
    "text-matching",
)
"""The adapters of jina-embeddings-v3."""


def check(
    files: Files,
    hardware: Hardware | None = None,
    *,
    task: str | None = None,
    pooling: str | None = None,
    tensors: Tensors | None = None,
    longest: int | None = None,
    edited: bool = True,
) -> list[Finding]:
    """Every rule that applies to the model, in order, with what it says.

    Args:
        files: what is in the folder; see Files.
        hardware: what TEI runs on; None leaves the rules about hardware out.
        task: the adapter of jina-embeddings-v3's conversion, when one is asked for.
        pooling: what TEI is told as --pooling; None when nobody tells it, so that it reads the
            folder.
        tensors: of the weights; None where nobody has read their names.
        longest: tokens that the service takes, where it takes fewer than the model.
        edited: TEI has the edits of images/tei (the official image has none).
    """
    model = Model(files, task, pooling, tensors, longest, edited)
    return _run(JINA_V3_RULES if model.is_jina_v3 else RULES, model, hardware)


def check_hardware(
    model_type: str, hardware: Hardware, *, edited: bool = True, facts: Facts | None = None
) -> list[Finding]:
    """The rules that need no files of a model, for when they are not at hand.

    Args:
        model_type: of config.json; nomic_bert for a converted jina-embeddings-v3.
        edited: TEI has the edits of images/tei.
        facts: what is known of the model beside.
    """
    config: dict[str, Any] = {"model_type": model_type, "architectures": ["Model"]}
    if facts is not None and facts.attention == "both":
        config["use_bidirectional_attention"] = True
    if facts is not None and facts.alibi:
        config["position_embedding_type"] = "alibi"
    if facts is not None and facts.activation and (row := ARCHITECTURES.get(model_type)):
        config |= dict.fromkeys(_activations(row), facts.activation)
    rules = [rule for rule in RULES if rule.look in (_hardware, _mask, _fused, _overflow)]
    return _run(rules, Model({"config.json": config}, edited=edited), hardware)


def served_tokens(facts: Facts, hardware: Hardware, *, edited: bool = True) -> int | None:
    """Tokens of the longest input that is served rightly there; None: as many as the model takes.

    EmbeddingGemma without our edit: within half its window the window cuts nothing. ALiBi without
    flash attention: its table, which TEI builds at start, grows with the square of the length.
    """
    row = ARCHITECTURES.get(facts.architecture if not facts.alibi else JINA_V2)
    if row is None or facts.max_input_tokens is None:
        return None
    path = _path(row, hardware)
    limit = None
    mask = row.mask
    if mask and mask.limit == "window" and not edited and path in mask.paths and facts.window:
        limit = facts.window // 2 + 1
    if row.table and path != "flash":
        limit = next(
            (n for n in (8192, 4096, 2048, 1024) if table_bytes(facts, n) <= _LARGEST_TABLE), 512
        )
    return limit if limit is not None and limit < facts.max_input_tokens else None


_LARGEST_TABLE = 5 << 29
"""Bytes at start that a pod is given for ALiBi's table: 2.5 GiB, which is 4,096 tokens of 12 heads."""


def table_bytes(facts: Facts, tokens: int) -> int:
    """Peak while TEI starts of a model with ALiBi and no flash attention: 12 bytes per entry.

    Run on the CPU program, 2026-11-25: 12 heads, 8192 positions 9,743 MiB, 4096 2,449, 2048 625;
    a third of it stays.
    """
    return 12 * (facts.attention_heads or 16) * tokens**2


def _run(rules: Iterable[Rule], model: Model, hardware: Hardware | None) -> list[Finding]:
    findings: list[Finding] = []
    for rule in rules:
        if not rule.applies(model):
            continue
        results = list(rule.look(model, hardware)) or [(OK, rule.holds)]
        new = [Finding(rule.name, r[0], r[1], rule.source, *r[2:]) for r in results]
        # The next rule sees the repairs, so that two of them can meet in one file.
        model = replace(model, files=repaired(model.files, new))
        findings += new
    return findings


def verdict(findings: list[Finding]) -> str:
    """The worst outcome of all."""
    return max((f.outcome for f in findings), key=OUTCOMES.index, default=OK)


def refusal(findings: list[Finding]) -> str | None:
    """Why the model is not served, in one sentence; None when it is."""
    return next((f.message for f in findings if f.outcome == REFUSED), None)


def repaired(files: Files, findings: list[Finding]) -> dict[str, object]:
    """The folder after the repairs that the findings describe."""
    result = dict(files)
    for finding in findings:
        for path, content in finding.changes.items():
            if content is None:
                result.pop(path, None)
            else:
                result[path] = content
    return result


# The rules. Each is a sentence, a source, and a function that yields what is wrong.


def _files(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    if not model.config:
        yield REFUSED, "There is no readable config.json: register the model with its files."
    if "tokenizer.json" not in model.files:
        yield (
            REFUSED,
            "There is no tokenizer.json, and TEI reads only fast tokenizers: save the tokenizer with "
            "a current transformers and register that.",
        )


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def _weights(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    names = set(model.files)
    if "adapter_config.json" in names and not names.isdisjoint(_WEIGHTS):
        yield (
            REFUSED,
            "An adapter stands beside the weights (adapter_config.json), which sentence-transformers "
            "applies and TEI does not: merge it (PEFT's merge_and_unload) and register that.",
        )
        return
    if model.config.get("quantization_config") or model.config.get("quantization"):
        yield REFUSED, "The weights are quantized, which TEI does not read: register the original."
    if "model.safetensors" in names:
        return
    index = "model.safetensors.index.json"
    if index in names:
        weight_map = model.json(index).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if missing := sorted(shards - names):
            yield REFUSED, f"The shard {missing[0]} is missing: register the model completely."
    elif "pytorch_model.bin" in names:
        yield (
            WARNED,
            "The weights are a pickle (pytorch_model.bin), which loads slower and may carry code: "
            "save the model with safetensors.",
        )
    elif names & {"adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"}:
        yield (
            REFUSED,
            "These are the weights of an adapter alone: merge it into its base model (PEFT's "
            "merge_and_unload) and register that.",
        )
    else:
        yield (
            REFUSED,
            "There are no weights that TEI reads: register model.safetensors, or its index with all "
            "shards.",
        )


def _safetensors(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    for outcome, message, *_ in _weights(model, hardware):
        if outcome == WARNED:
            yield (
                REFUSED,
                "The weights are in pytorch_model.bin only, which the conversion never opens: "
                "register a revision with model.safetensors.",
            )
        else:
            yield outcome, message


def _config(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    config = model.config
    if not model.class_names or not isinstance(config.get("model_type"), str):
        yield (
            REFUSED,
            "config.json lacks architectures or model_type, which TEI requires: register the model "
            "with its original config.json.",
        )
        return
    kinds: Mapping[str, type] = {"auto_map": str, "id2label": str, "label2id": int}
    kept = {
        key: {k: v for k, v in config[key].items() if isinstance(v, kind)}
        for key, kind in kinds.items()
        if isinstance(config.get(key), dict)
    }
    if wrong := sorted(key for key, value in kept.items() if value != config[key]):
        yield (
            FIXED,
            f"config.json: entries of {' and '.join(wrong)} that TEI cannot parse were left out.",
            {"config.json": {**config, **{key: kept[key] for key in wrong}}},
        )


def _architecture(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    if model.architecture is None:
        yield (
            REFUSED,
            f"TEI has no implementation of {model.model_type}: choose a model of another "
            "architecture, or another server.",
        )
        return
    # TEI passes over that one while there are no labels (router/src/lib.rs:412-421).
    labels = isinstance(model.config.get("id2label"), dict)
    ignored = "" if labels else "NewForTokenClassification"
    scores = [n for n in model.class_names if n.endswith("Classification") and n != ignored]
    if scores:
        yield (
            REFUSED,
            f"{scores[0]} is a classifier or reranker, which gives scores, not embeddings.",
        )


def _keys(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    config, row = model.config, model.architecture
    if row is None:
        return
    lengths = ("max_position_embeddings", "max_trained_positions")
    if all(config.get(key) is None for key in (*lengths, "n_positions")):
        yield REFUSED, f"config.json has neither {lengths[0]} nor {lengths[1]}, which TEI requires."
        return
    judged = contract.judge(row, config)
    for problem in judged.refused:
        yield REFUSED, problem
    if judged.refused:
        return
    if judged.written or judged.dropped:
        named = sorted({*judged.written, *judged.dropped})
        kept = {key: value for key, value in config.items() if key not in judged.dropped}
        yield (
            FIXED,
            f"config.json: {', '.join(named)} written as TEI reads it, from what the file says elsewhere or "
            f"the default of {model.model_type}.",
            {"config.json": {**kept, **judged.written}},
        )
    if judged.unknown:
        said = ", ".join(f"{key}: {value!r:.40}" for key, value in judged.unknown.items())
        yield (
            WARNED,
            f"config.json says what nobody has compared with TEI ({said[:300]}): if it changes what the "
            "model computes, TEI does not know it; compare vectors.",
        )


def _window(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """EmbeddingGemma saved by transformers 4.57 to 5.22: each save halved the window (n // 2 + 1)."""
    config = model.config
    window = contract.count(config.get("sliding_window"))
    if config.get("use_bidirectional_attention") is not True or window is None or window % 2 == 0:
        return
    if window == _GEMMA_HALVED:
        yield (
            FIXED,
            f"config.json: sliding_window {window} is one that transformers halved while saving, and was "
            f"written as {(window - 1) * 2} again.",
            {"config.json": {**config, "sliding_window": (window - 1) * 2}},
        )
    else:
        yield (
            REFUSED,
            f"config.json says sliding_window: {window}, which transformers halved at least once while "
            "saving: register the model with its original config.json.",
        )


_GEMMA_HALVED = 257
"""Of EmbeddingGemma's 512; halved more often, or of another model, the original cannot be told."""


def _path(row: contract.Architecture, hardware: Hardware) -> str:
    return contract.path_of(
        row, is_gpu=hardware.is_gpu, flash=hardware.flash_attention, dtype=hardware.dtype
    )


def _hardware(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    row = model.architecture
    if row is None or hardware is None:
        return
    path = _path(row, hardware)
    if path not in row.paths:
        where = "on a CPU" if path == "cpu" else "without flash attention"
        said = f"TEI does not serve {model.model_type} {where} ({hardware.title})."
        yield REFUSED, row.refusals.get(path, said)
    elif hardware.dtype not in row.dtypes:
        yield (
            REFUSED,
            f"TEI serves {model.model_type} in {row.dtypes[0]} only, and {hardware.title} "
            f"runs in {hardware.dtype}.",
        )


def _mask(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    row = model.architecture
    if row is None or row.mask is None or hardware is None or model.edited:
        return
    both = model.config.get("use_bidirectional_attention") is True
    if _path(row, hardware) not in row.mask.paths or (row.mask.when == "causal" and both):
        return
    if row.mask.limit and both:
        yield (
            WARNED,
            f"{row.mask.harm}: longer texts are cut at half its window, because this image of TEI is not "
            "the one that is built here.",
        )
    else:
        yield (
            REFUSED,
            f"{row.mask.harm}: build TEI with its edits (tei_image=build, tei_edits=true)"
            f"{', or choose a GPU with flash attention' if 'flash' in row.paths else ''}.",
        )


def _activations(row: contract.Architecture) -> list[str]:
    return [key for key, said in row.keys.items() if said.get("type") == "activation"]


def _fused(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """A GPU computes product and activation in one call, which knows two functions."""
    row = model.architecture
    if row is None or hardware is None or not hardware.is_gpu or not row.fused_activation:
        return
    fused = contract.table()["activations"]["fused"]
    for key in _activations(row):
        value = model.config.get(key)
        if value is not None and value not in fused:
            yield (
                REFUSED,
                f"On a GPU TEI leaves out the activation {str(value)[:40]} of {model.model_type}: serve it "
                "on a CPU.",
            )


def _code(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """TEI runs what it has for the model_type, whatever class the model's makers run."""
    row, config = model.architecture, model.config
    if row is None or row.own_code:
        return
    code = contract.remote_code(config)
    known = {name for said in row.keys.values() for name in said.get("code", {})}
    directed = isinstance(config.get("use_bidirectional_attention"), bool)
    strange = [n for n in model.class_names if row.classes and not re.fullmatch(row.classes, n)]
    if code is not None and code not in known:
        yield (
            WARNED,
            f"The model comes with code of its own ({code[:60]}), and TEI runs its own {row.name}: if that "
            "code attends or computes otherwise, the vectors are others; compare them.",
        )
    elif strange and not directed and code is None:
        yield (
            WARNED,
            f"config.json names the class {strange[0][:60]}, and TEI runs its own {row.name}, which attends "
            "to what stands before alone: where the class attends both ways, write "
            "use_bidirectional_attention into config.json; compare vectors.",
        )


def _jina_v2(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    if not contract.names_jina_v2(model.config):
        yield (
            REFUSED,
            "This copy of a jina-embeddings-v2 model was saved again and no longer names Jina's code "
            "(auto_map or _name_or_path), so TEI does not know it: register the original files.",
        )


def _alibi(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """TEI builds a table of that many positions at start; ALiBi has no trained positions."""
    config = model.config
    row = model.architecture
    length = contract.sequence_length(model.files)
    length = min(length or 0, model.longest or length or 0)
    if row and row.table and 0 < length < (contract.positions(config) or 0):
        yield (
            FIXED,
            f"config.json: max_position_embeddings was lowered to the {length} tokens that are served, for "
            "the memory of TEI's table of positions.",
            {"config.json": {**config, "max_position_embeddings": length}},
        )


def _nomic(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    config = model.config
    if {"n_positions", "max_position_embeddings"} <= set(config):
        yield (
            WARNED,
            "config.json has both n_positions and max_position_embeddings, which TEI 1.9.3 and older "
            "cannot parse: keep the TEI that this template builds.",
        )
    if config.get("rotary_scaling_factor") is not None:
        yield (
            WARNED,
            f"The model stretches its positions beyond {contract.positions(config)} tokens "
            "(rotary_scaling_factor), for which TEI changes the vectors of a whole batch: texts are cut "
            "there.",
        )


def _tensors(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    row, config = model.architecture, model.config
    if row is None or not model.tensors:
        return
    keys = ("num_hidden_layers", "n_layer", "n_layers")
    layers = next((n for key in keys if (n := contract.count(config.get(key)))), 1)
    if problem := contract.tensor_problem(row, model.tensors, layers):
        yield REFUSED, problem
    gated = [name for name in model.tensors if name.endswith("mlp.fc11.weight")]
    activation = config.get("activation_function")
    if gated and model.model_type == "nomic_bert" and activation != "swiglu":
        yield (
            REFUSED,
            f"The weights have {gated[0]} of a gated layer, and config.json says activation_function: "
            f"{activation}: register the model with its original config.json.",
        )


def _overflow(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    if hardware is None or hardware.dtype == "float16":
        yield (
            WARNED,
            "The model was trained in bfloat16 and runs in float16, where large values can overflow: "
            "look for null in the vectors of your own texts.",
        )


def _conversion(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    adapters = model.config.get("lora_adaptations")
    known = adapters if isinstance(adapters, list) and adapters else list(JINA_V3_TASKS)
    if model.task is None:
        yield (
            REFUSED,
            "TEI does not serve jina-embeddings-v3 as published: choose one of its tasks, and "
            "model-fetch converts it.",
        )
    elif model.task not in known:
        yield (
            REFUSED,
            f"The model has no adapter {model.task}: choose one of {', '.join(map(str, known))}.",
        )
    else:
        yield (
            FIXED,
            f"model-fetch merges the adapter {model.task} and writes a model that TEI serves as "
            "nomic_bert.",
        )


_READS = "TEI router/src/lib.rs:114-152, core/src/download.rs:7-15, candle/src/lib.rs:170-218"

_FILES = Rule(
    "files",
    "config.json and tokenizer.json are there.",
    _READS,
    _files,
)

RULES: tuple[Rule, ...] = (
    _FILES,
    Rule(
        "weights",
        "The weights are in a form that TEI reads.",
        "TEI backends/candle/src/lib.rs:170-215",
        _weights,
    ),
    Rule(
        "config",
        "config.json says what it is.",
        "TEI router/src/lib.rs:468-483",
        _config,
        lambda model: bool(model.config),
    ),
    Rule(
        "architecture",
        "TEI implements the architecture.",
        "TEI backends/candle/src/lib.rs:126-154; classifiers: router/src/lib.rs:412-432",
        _architecture,
        lambda model: isinstance(model.config.get("model_type"), str),
    ),
    Rule(
        "jina-v2",
        "config.json names Jina's own code, by which TEI knows the model.",
        "TEI backends/candle/src/lib.rs:83-121, #306",
        _jina_v2,
        lambda model: contract.is_jina_v2(model.config),
    ),
    Rule(
        "keys",
        "config.json says what TEI requires, and nothing that it computes otherwise.",
        "extensions/data/contract.json",
        _keys,
    ),
    Rule(
        "code",
        "The model's class is one that TEI has.",
        "TEI backends/candle/src/lib.rs:126-154, models/qwen2.rs:22",
        _code,
    ),
    Rule(
        "window",
        "The window is the one that the model was trained with.",
        "huggingface/transformers #47940; TEI models/gemma3.rs:268-273",
        _window,
        lambda model: model.model_type == "gemma3_text",
    ),
    Rule(
        "nomic-config",
        "config.json is in the form that every TEI parses.",
        "#876 (fixed after 1.9.3); TEI backends/candle/src/models/nomic.rs:12-45, :713-727",
        _nomic,
        lambda model: model.model_type == "nomic_bert",
    ),
    Rule(
        "tensors",
        "TEI finds the weights by their names.",
        "extensions/data/contract.json",
        _tensors,
    ),
    Rule(
        "hardware",
        "TEI serves the architecture there.",
        "TEI backends/candle/src/lib.rs:290-580",
        _hardware,
    ),
    Rule(
        "activation",
        "TEI computes the activation there.",
        "TEI backends/candle/src/layers/cublaslt.rs:20-100 (read, not run)",
        _fused,
    ),
    Rule(
        "pooling",
        "The pooling is known.",
        "TEI router/src/lib.rs:441-508; sentence-transformers #3554 (≥ 5.4 writes another schema)",
        module_rules.pooling,
    ),
    Rule(
        "length",
        "The longest input is known.",
        "TEI router/src/lib.rs:195-233; sentence-transformers #3554 (≥ 5.4 writes no max_seq_length)",
        module_rules.length,
    ),
    Rule(
        "alibi",
        "TEI's table of positions is as long as the longest input.",
        "TEI backends/candle/src/alibi.rs, models/jina.rs:409-421",
        _alibi,
        lambda model: contract.is_jina_v2(model.config),
    ),
    Rule(
        "one-vector",
        "The model gives one vector per text.",
        "sentence-transformers 6.2 base/model.py:1510-1554",
        module_rules.one_vector,
    ),
    Rule(
        "transformer",
        "TEI takes what the model's own pipeline takes of its layers.",
        "sentence-transformers 6.2 base/modules/transformer.py",
        module_rules.transformer,
    ),
    Rule(
        "modules",
        "TEI applies every module of the model.",
        "TEI backends/src/lib.rs:524-552 and :818-826, candle/src/layers/dense.rs; #701",
        module_rules.modules,
    ),
    Rule(
        "vector-length",
        "The model's vectors have length 1, as those of /v1/embeddings.",
        "TEI router/src/http/server.rs, /v1/embeddings",
        module_rules.vector_length,
    ),
    Rule(
        "prompts",
        "TEI can read the prompts.",
        "TEI router/src/lib.rs:242-248",
        module_rules.prompts,
    ),
    Rule(
        "tokenizer",
        "tokenizer.json says what tokenizer_config.json says.",
        "TEI router/src/lib.rs:149-153; transformers, the tokenizers' classes",
        tokenizer_rules.settings,
    ),
    Rule(
        "lower-case",
        "The tokenizer lowers texts where they are to be lowered.",
        "TEI router/src/lib.rs:510-513 (max_seq_length alone is read)",
        tokenizer_rules.lower_case,
    ),
    Rule(
        "special-tokens",
        "The tokenizer adds the tokens that texts begin and end with.",
        "TEI router/src/lib.rs:149-182",
        tokenizer_rules.special_tokens,
    ),
    Rule(
        "mask",
        "Every batch is masked.",
        "#882, #883 (open); extensions/data/contract.json",
        _mask,
    ),
    Rule(
        "overflow",
        "The model runs in a type that holds its values.",
        "#644, #845",
        _overflow,
        lambda model: bool(model.architecture and model.architecture.bfloat16),
    ),
)
"""For every model but jina-embeddings-v3, in the order in which their findings are shown."""

JINA_V3_RULES: tuple[Rule, ...] = (
    _FILES,
    Rule(
        "weights",
        "The weights are in a form that the conversion reads.",
        "model_fetch/tensors.py",
        _safetensors,
    ),
    Rule(
        "conversion",
        "",
        "#418, #571 (open)",
        _conversion,
    ),
)
"""For jina-embeddings-v3: everything else is what the conversion writes."""
