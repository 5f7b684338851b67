"""Rules on the files of sentence-transformers: modules, pooling, lengths, prompts.

"TEI" with a file name is huggingface/text-embeddings-inference at
0d124dc9773be6ac5a9a57d8439aba9bbbf33273.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from . import contract
from .findings import FIXED, REFUSED, WARNED, Hardware, Model, Result

POOLING_MODES = MappingProxyType(
    {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
)
"""sentence-transformers' names of what TEI can do -> the ends of their keys in 1_Pooling/config.json."""

FIRST_POOLING = "1_Pooling"

_OWN = "sentence_transformers"
_TEI_TYPES = "sentence_transformers.models"
_KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
_NO_WORK = ("Dropout",)
"""Modules that do nothing when texts are embedded; TEI would leave out every Dense beside one."""

_TANH = "torch.nn.modules.activation.Tanh"
_ACTIVATIONS = (_TANH, "torch.nn.modules.linear.Identity", None)
_DENSE_DEFAULTS = MappingProxyType({"activation_function": _TANH, "bias": True})
_SENTENCE = "sentence_embedding"

# What the Transformer module must do: sentence-transformers' defaults (base/modules/transformer.py).
_TRANSFORMER = MappingProxyType(
    {
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "query_length": (None,),
        "document_length": (None,),
        "query_expansion": (None,),
        "tokenizer_name_or_path": (None,),
    }
)
_MODEL_ARGUMENTS = ("model_args", "config_args", "model_kwargs", "config_kwargs")
_TOKENIZER_ARGUMENTS = ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs")
_HARMLESS_ARGUMENTS = frozenset(
    {"trust_remote_code", "torch_dtype", "dtype", "attn_implementation", "revision", "token"}
    | {"cache_dir", "local_files_only", "device_map", "add_pooling_layer", "code_revision"}
)
_TOKENIZER_ARGUMENTS_HEEDED = frozenset(
    {"model_max_length", "truncation_side", "padding_side", "use_fast", "add_bos_token"}
    | {"add_eos_token", "clean_up_tokenization_spaces", "add_prefix_space"}
    | {"do_lower_case", "strip_accents", "tokenize_chinese_chars", "subfolder"}
)
"""By tokenizer_rules and contract.sequence_length, or harmless."""


def module_list(files: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """modules.json; [] where it is none."""
    modules = files.get("modules.json")
    fits = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    return list(modules) if fits and isinstance(modules, list) else []


def kind_of(module: Mapping[str, Any]) -> str:
    """The class of a module: of sentence-transformers by its name alone, of others in full."""
    name = str(module.get("type", ""))
    return name.rpartition(".")[2] if name.split(".")[0] == _OWN else name


def folder_of(module: Mapping[str, Any]) -> str | None:
    """Where a module has its files; None where that is no folder of the model."""
    path = module.get("path")
    fits = isinstance(path, str) and re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", path)
    return path if fits and isinstance(path, str) else None


def pooling_folder(files: Mapping[str, Any]) -> str:
    """Where the pooling is described: as modules.json says, the last one counts."""
    folders = [folder_of(m) for m in module_list(files) if kind_of(m) == "Pooling"]
    return next((folder for folder in reversed(folders) if folder), FIRST_POOLING)


def pooling_modes(config: Mapping[str, Any]) -> list[str]:
    """By sentence-transformers' names, in both schemas."""
    if "pooling_mode" in config:  # sentence-transformers ≥ 5.4
        said = config["pooling_mode"]
        return [str(mode) for mode in (said if isinstance(said, list) else [said])]
    prefix = "pooling_mode_"
    on = [k.removeprefix(prefix) for k, v in config.items() if k.startswith(prefix) and v is True]
    return [next((m for m, end in POOLING_MODES.items() if end == mode), mode) for mode in on]


def pooling_problem(model_type: str, mode: str) -> str | None:
    """Why TEI does not pool an architecture so, in one sentence; None when it does.

    Args: mode: cls, mean or last-token.
    """
    row = contract.architectures().get(model_type)
    if row is None or mode.replace("-", "") not in POOLING_MODES:
        return None
    if mode.replace("-", "") in row.pooling:
        return None
    works = " or ".join(m.replace("lasttoken", "last-token") for m in row.pooling)
    return (
        f"TEI does not pool {model_type} by {mode}, only by {works}: it stops or fails in batches."
    )


def modules(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """TEI can do Transformer, Pooling, any number of Dense, and Normalize, in this order."""
    listed = module_list(model.files)
    if not listed:
        if model.files.get("modules.json") not in (None, []):
            yield (
                FIXED,
                "modules.json is no list of modules and was left out.",
                {"modules.json": None},
            )
        return
    row = model.architecture
    built_in = row.modules if row else ()
    kinds = [kind_of(module) for module in listed]
    kept = [
        (module, kind)
        for module, kind in zip(listed, kinds, strict=True)
        if kind not in _NO_WORK and kind.rpartition(".")[2] not in built_in
    ]
    if unknown := [kind for _, kind in kept if kind not in _KINDS]:
        yield (
            REFUSED,
            f"modules.json lists {unknown[0]}, which TEI does not compute (it would leave out every "
            "Dense module too): its vectors would not be the model's.",
        )
        return
    if problem := _order(model, kept):
        yield REFUSED, problem
        return
    known: list[Mapping[str, Any]] = [
        {"idx": i, "name": str(i), **module, "type": f"{_TEI_TYPES}.{kind}"}
        for i, (module, kind) in enumerate(kept)
    ]
    for i, module in enumerate(known):
        if contract.count(module["idx"]) is None or not isinstance(module["name"], str):
            known[i] = {**module, "idx": i, "name": str(i)}
    if known != listed:
        yield (
            FIXED,
            "modules.json: the modules were written as TEI reads them.",
            {"modules.json": known},
        )
    for module, kind in kept:
        if kind == "Dense":
            yield from _dense(model, module)


_MODEL_TYPES = (None, "SentenceTransformer")


def one_vector(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """Models that give something else than one dense vector say so in one of three places."""
    kind = model.json("config_sentence_transformers.json").get("model_type")
    if kind not in _MODEL_TYPES:
        yield (
            REFUSED,
            f"The model is a {str(kind)[:60]}, which gives no single dense vector per text.",
        )
    elif names := [n for n in model.class_names if re.search("(?i)colbert|splade", n)]:
        yield REFUSED, f"{names[0]} gives no single dense vector per text."


def _order(model: Model, kept: list[tuple[Mapping[str, Any], str]]) -> str | None:
    kinds = [kind for _, kind in kept]
    if kinds[:1] != ["Transformer"]:
        return "modules.json does not begin with a Transformer, and TEI always does."
    if kept[0][0].get("path") not in (None, "", ".", "./"):
        return (
            f"modules.json has its Transformer in {str(kept[0][0]['path'])[:60]}, and TEI takes the one "
            "beside modules.json: save the model again with a current sentence-transformers."
        )
    if kinds.count("Transformer") > 1 or kinds.count("Pooling") > 1:
        twice = next(kind for kind in ("Transformer", "Pooling") if kinds.count(kind) > 1)
        return (
            f"modules.json lists more than one {twice}, and TEI has one: it pools all texts in the same "
            "way."
        )
    if "Pooling" not in kinds:
        return (
            "modules.json has no Pooling, so the model gives a vector per token (late interaction), and "
            "TEI gives one per text."
        )
    if early := kinds[1 : kinds.index("Pooling")]:
        return (
            f"modules.json has a {early[0]} module before the Pooling, and TEI applies it after it."
        )
    if "Normalize" in kinds:
        later = [m for m, kind in kept[kinds.index("Normalize") :] if kind == "Dense"]
        for module in later:
            config = model.json(f"{module.get('path')}/config.json")
            linear = config.get("activation_function", _TANH) in _ACTIVATIONS[1:]
            if config.get("bias", True) is not False or not linear:
                return (
                    f"modules.json normalizes before {module.get('path')}, and TEI after all modules: "
                    "with a bias or an activation the vectors would be others."
                )
    return None


def _dense(model: Model, module: Mapping[str, Any]) -> Iterator[Result]:
    folder = folder_of(module)
    path = f"{folder}/config.json"
    config = model.json(path)
    weights = {f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"}
    if folder is None or not config or not weights & set(model.files):
        yield (
            REFUSED,
            f"The Dense module {module.get('path')} lacks its config.json or its weights.",
        )
        return
    for key in ("module_input_name", "module_output_name"):
        if (place := config.get(key)) not in (None, _SENTENCE):
            yield REFUSED, f"The Dense module {folder} works on {place}, and TEI's on {_SENTENCE}."
            return
    if config.get("use_residual"):
        yield REFUSED, f"The Dense module {folder} adds its input (use_residual), and TEI does not."
    activation = config.get("activation_function", _TANH)
    if activation not in _ACTIVATIONS:
        yield (
            REFUSED,
            f"The Dense module {folder} ends with {activation}; TEI knows Tanh and Identity alone and "
            "does not start.",
        )
    elif defaults := {k: v for k, v in _DENSE_DEFAULTS.items() if k not in config}:
        yield (
            FIXED,
            f"{path}: {' and '.join(defaults)} as sentence-transformers takes it was written, where "
            "TEI takes another.",
            {path: {**config, **defaults}},
        )


def vector_length(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    listed = module_list(model.files)
    if not listed or any(kind_of(module) == "Normalize" for module in listed):
        return
    similarity = model.json("config_sentence_transformers.json").get("similarity_fn_name")
    compares = f" and compares by {similarity}" if similarity not in (None, "cosine") else ""
    yield (
        WARNED,
        f"The model does not normalize its vectors{compares}, and /v1/embeddings always does: where "
        "their length counts, ask /embed with normalize=false.",
    )


def pooling(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    folder = pooling_folder(model.files)
    path, first = f"{folder}/config.json", f"{FIRST_POOLING}/config.json"
    config = model.json(path)
    told = (model.pooling or "").replace("-", "")
    if not config:
        if model.pooling is None:
            guess = "silently takes the first token" if "bert" in model.model_type else "stops"
            yield (
                REFUSED,
                f"There is no {path}, without which TEI {guess}: register the model with its "
                "sentence-transformers files, or say how it pools.",
            )
        elif problem := pooling_problem(_row_name(model), model.pooling):
            yield REFUSED, problem
        return
    modes = pooling_modes(config)
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        yield (
            REFUSED,
            f"The model pools by {' and '.join(modes) or 'nothing'}, and TEI only by cls, mean or "
            "lasttoken.",
        )
        return
    served = told if told in POOLING_MODES else modes[0]
    if problem := pooling_problem(_row_name(model), served.replace("lasttoken", "last-token")):
        yield REFUSED, problem
        return
    if served != modes[0]:
        yield (
            WARNED,
            f"The model's files say that it pools by {modes[0]}, but TEI is told {model.pooling}.",
        )
    required = ("pooling_mode_cls_token", "pooling_mode_mean_tokens")
    if (
        path != first
        or "pooling_mode" in config
        or any(not isinstance(config.get(key), bool) for key in required)
    ):
        dimension = config.get("word_embedding_dimension", config.get("embedding_dimension"))
        on = {f"pooling_mode_{end}": modes[0] == m for m, end in POOLING_MODES.items()}
        yield (
            FIXED,
            f"{first}: the pooling ({modes[0]}) was written as TEI reads it.",
            {first: {"word_embedding_dimension": dimension, **on}},
        )
    if served != "mean" and model.files.get("modules.json") is None:
        yield (
            WARNED,
            f"There is no modules.json, without which sentence-transformers pools by mean, and {path} says "
            f"{modes[0]}: register the model with all its sentence-transformers files.",
        )
    if config.get("include_prompt") is False:
        yield (
            WARNED,
            "The model pools without its prompt's tokens, and TEI with them: compare vectors before "
            "use.",
        )


def _row_name(model: Model) -> str:
    return model.architecture.name if model.architecture else model.model_type


def transformer(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """What sentence_bert_config.json asks of the Transformer module."""
    path = contract.sentence_config(model.files)
    config = model.json(path) if path else {}
    for key, harmless in _TRANSFORMER.items():
        if key in config and config[key] not in harmless:
            yield (
                REFUSED,
                f"{path} says {key}: {str(config[key])[:60]}, and TEI embeds the tokens of the last "
                "layer alone.",
            )
    modality = config.get("modality_config")
    text = modality.get("text") if isinstance(modality, dict) else None
    if isinstance(text, dict):
        output, method = text.get("method_output_name"), text.get("method", "forward")
        if output not in (None, "last_hidden_state", ["last_hidden_state"]) or method != "forward":
            yield (
                REFUSED,
                f"{path} takes {str(output)[:60]} of the model's {str(method)[:40]}, and TEI the last "
                "layer's output alone.",
            )
    if isinstance(modality, dict) and not isinstance(text, dict):
        yield REFUSED, f"{path} takes no plain texts (modality_config), and TEI takes nothing else."
    groups = (
        (_MODEL_ARGUMENTS, _HARMLESS_ARGUMENTS, "config.json"),
        (
            _TOKENIZER_ARGUMENTS,
            _HARMLESS_ARGUMENTS | _TOKENIZER_ARGUMENTS_HEEDED,
            "the tokenizer's files",
        ),
    )
    for keys, heeded, place in groups:
        for key in keys:
            arguments = config.get(key)
            if isinstance(arguments, dict) and (more := sorted(set(arguments) - heeded)):
                yield (
                    REFUSED,
                    f"{path} loads the model with {key}.{more[0]}, which TEI does not read: write it into "
                    f"{place} and register that.",
                )
    processing = config.get("processing_kwargs")
    for kind in ("common", "text", "chat_template"):
        if isinstance(processing, dict) and (given := processing.get(kind)):
            yield (
                REFUSED,
                f"{path} tokenizes texts with {kind} {str(given)[:60]} (processing_kwargs), and TEI does "
                "not: write it into the tokenizer's files and register that.",
            )


def length(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """The length that texts are cut at, where TEI reads it."""
    path = contract.sentence_config(model.files)
    config = model.json(path) if path else {}
    wanted = contract.sequence_length(model.files)
    said = contract.count(config.get("max_seq_length")) or None
    if wanted is None:
        if path and said is None:
            yield FIXED, f"{path} has no max_seq_length and was left out.", {path: None}
        return
    if model.longest:
        wanted = min(wanted, model.longest)
    target = path or contract.SENTENCE_CONFIGS[0]
    if path and said is None:
        yield (
            FIXED,
            f"{path}: max_seq_length {wanted} was added, without which TEI does not start.",
            {
                path: {
                    "max_seq_length": wanted,
                    "do_lower_case": config.get("do_lower_case") is True,
                    # What the rules on the tokenizer look at next.
                    **{key: config[key] for key in _TOKENIZER_ARGUMENTS if key in config},
                }
            },
        )
    elif path and said is not None and said > wanted:
        what = (
            f"the {wanted} that are served"
            if wanted == model.longest
            else f"the model's {wanted} positions"
        )
        yield (
            FIXED,
            f"{path}: max_seq_length {said} was lowered to {what}.",
            {path: {**config, "max_seq_length": wanted}},
        )
    elif not path and wanted != _taken_by_tei(model):
        yield (
            FIXED,
            f"{target}: max_seq_length {wanted} was written, where TEI would take every position.",
            {target: {"max_seq_length": wanted, "do_lower_case": False}},
        )


def _taken_by_tei(model: Model) -> int | None:
    """Without a Sentence Transformers config (router/src/lib.rs:205-216)."""
    config = model.config
    keys = ("max_position_embeddings", "max_trained_positions")
    number = next((n for key in keys if (n := contract.count(config.get(key))) is not None), None)
    row = model.architecture
    if number is None or row is None or not isinstance(row.position_offset, str):
        return number
    return number - contract.offset(row, config)


def prompts(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    path = "config_sentence_transformers.json"
    config = model.json(path)
    said = config.get("prompts")
    if said is not None:
        kept = (
            {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}
        )
        if kept != said:
            yield (
                FIXED,
                "config_sentence_transformers.json: prompts that are not texts were left out.",
                {path: {**config, "prompts": kept}},
            )
    name = config.get("default_prompt_name")
    if name and not (isinstance(said, dict) and isinstance(name, str) and name in said):
        yield (
            REFUSED,
            f"config_sentence_transformers.json names {str(name)[:60]} as the prompt of every text, and "
            "has no such prompt: write one, or take the name out.",
        )
    if (dimensions := contract.count(config.get("truncate_dim"))) is not None:
        yield (
            WARNED,
            f"The model cuts its vectors to {dimensions} numbers, and TEI does not by itself: clients "
            f"ask for dimensions={dimensions}.",
        )


def default_prompt(files: Mapping[str, Any]) -> str | None:
    """Name of the prompt that stands before every text, where it has a text; None: there is none."""
    config = files.get("config_sentence_transformers.json")
    if not isinstance(config, dict):
        return None
    name, said = config.get("default_prompt_name"), config.get("prompts")
    known = isinstance(name, str) and isinstance(said, dict) and isinstance(said.get(name), str)
    return name if known and isinstance(name, str) else None
