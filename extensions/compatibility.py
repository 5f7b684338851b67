"""Whether TEI serves a model as it is, after small repairs, or not at all: one set of rules.

The rules look at the parsed configuration files of a model folder and at nothing else, so the same
ones run when a repository is rendered and when the init container has fetched the model. Each rule
says where it is from. "TEI" with a file name is huggingface/text-embeddings-inference at
0d124dc9773be6ac5a9a57d8439aba9bbbf33273; "#" with a number is an issue or pull request there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from .embedding_model import SENTENCE_CONFIGS

OK, FIXED, WARNED, REFUSED = "ok", "fixed", "warned", "refused"
OUTCOMES = (OK, FIXED, WARNED, REFUSED)
"""From best to worst: served as it is; after a repair that changes no weight; served, with something
to know; not served."""

Files = Mapping[str, object]
"""Path in TEI's folder -> the parsed JSON, or None for a file that is there and is not JSON (weights) or
was not read (tokenizer.json)."""


class Hardware(Protocol):
    """What the rules ask of an accelerator (accelerator.Accelerator has it)."""

    @property
    def title(self) -> str: ...
    @property
    def is_gpu(self) -> bool: ...
    @property
    def flash_attention(self) -> bool: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says about one model."""

    rule: str
    outcome: str
    """One of OUTCOMES."""

    message: str
    """One sentence for the user."""

    source: str
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of a repair: path -> the file's new content, or None when it is to be left out."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How TEI's Candle backend supports one `model_type`."""

    cpu: bool = True
    gpu: bool = True
    """On a GPU without flash attention."""

    flash: bool = True
    """On a GPU with flash attention; where that has no implementation of its own, it takes the other."""

    dtypes: tuple[str, ...] = ("float16", "float32")


_ENCODER, _FLASH_ONLY = Architecture(), Architecture(cpu=False, gpu=False)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "bert": _ENCODER,
        "camembert": _ENCODER,
        "roberta": _ENCODER,
        "xlm-roberta": _ENCODER,
        "deberta-v2": _ENCODER,
        "distilbert": _ENCODER,
        "mpnet": _ENCODER,
        "modernbert": _ENCODER,
        "nomic_bert": _ENCODER,
        "gte": _ENCODER,
        "new": _ENCODER,
        "qwen3": _ENCODER,
        "gemma3_text": Architecture(dtypes=("float32",)),
        "bidirectional_pplx_qwen3": Architecture(dtypes=("float32",)),
        "qwen2": _FLASH_ONLY,
        "mistral": _FLASH_ONLY,
        "llama": _FLASH_ONLY,
        "llama_bidirec": _FLASH_ONLY,
    }
)
"""By `model_type` (TEI backends/candle/src/lib.rs:126-154 and the dispatch below it)."""

JINA_V2_CODE = ("jinaai/jina-bert-implementation", "jinaai/jina-bert-v2-qk-post-norm")
"""The names by which TEI tells Jina's BERT from BERT (TEI candle/src/lib.rs:83-121)."""

JINA_V3_TASKS = (
    "retrieval.query",
    "retrieval.passage",
    "separation",
    "classification",
    "text-matching",
)
"""The adapters of jina-embeddings-v3."""

POOLING_MODES = MappingProxyType(
    {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
)
"""sentence-transformers' names of what TEI can do -> the ends of their keys in 1_Pooling/config.json."""

_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_ACTIVATIONS = ("torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity")
_SENTENCE = "sentence_embedding"
_POSITION_OFFSET = ("xlm-roberta", "camembert", "roberta")
_ROPE_THETA = ("new", "gte", "qwen3", "qwen2", "mistral")


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder's configuration, as the rules look at it."""

    files: Files
    task: str | None = None
    """The adapter that jina-embeddings-v3 is converted with; None when no conversion was asked for."""

    pooling: str | None = None
    """What TEI is told as --pooling; None when nobody tells it."""

    def json(self, path: str) -> Mapping[str, Any]:
        """A JSON object of the folder; empty when there is none."""
        content = self.files.get(path)
        return content if isinstance(content, dict) else {}

    @property
    def config(self) -> Mapping[str, Any]:
        return self.json("config.json")

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def class_names(self) -> list[str]:
        names = self.config.get("architectures")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def is_jina_v3(self) -> bool:
        """Published (no model_type), re-saved (xlm-roberta) or transformers' own, never converted."""
        return (
            self.model_type == "jina_embeddings_v3"
            or "XLMRobertaLoRA" in self.class_names
            or bool(self.config.get("lora_adaptations"))
        )

    @property
    def positions(self) -> int | None:
        """Tokens that the model can tell apart."""
        keys = ("n_positions",) if self.model_type == "nomic_bert" else ()
        for key in (*keys, "max_position_embeddings", "max_trained_positions"):
            if (length := _count(self.config.get(key))) is not None:
                pad = _count(self.config.get("pad_token_id")) or 0
                return length - pad - 1 if self.model_type in _POSITION_OFFSET else length
        return None


_Result = tuple[str, str] | tuple[str, str, Mapping[str, object]]
"""Outcome, message, and the changes of a repair."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that must hold for TEI to serve a model correctly."""

    name: str
    holds: str
    """What is said when nothing is wrong."""

    source: str
    look: Callable[[Model, Hardware | None], Iterator[_Result]]
    """Yields what is wrong, nothing when all is well."""

    applies: Callable[[Model], bool] = lambda model: True


def check(
    files: Files,
    hardware: Hardware | None = None,
    *,
    task: str | None = None,
    pooling: str | None = None,
) -> list[Finding]:
    """Every rule that applies to the model, in order, with what it says.

    Args:
        files: what is in the folder; see Files.
        hardware: what TEI runs on; None leaves the rules about hardware out.
        task: the adapter of jina-embeddings-v3's conversion, when one is asked for.
        pooling: what TEI is told as --pooling; None when nobody tells it, so that it reads the
            folder.
    """
    model = Model(files, task, pooling)
    return _run(JINA_V3_RULES if model.is_jina_v3 else RULES, model, hardware)


def check_hardware(model_type: str, hardware: Hardware) -> list[Finding]:
    """The rules that need no more of a model than its `model_type`, for when its files are not at hand.

    Args: model_type: of config.json; nomic_bert for a converted jina-embeddings-v3.
    """
    config = {"model_type": model_type, "architectures": ["Model"]}
    rules = [rule for rule in RULES if rule.look in (_architecture, _causal, _overflow)]
    return _run(rules, Model({"config.json": config}), hardware)


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


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _files(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    if not model.config:
        yield REFUSED, "There is no readable config.json: register the model with its files."
    if "tokenizer.json" not in model.files:
        yield (
            REFUSED,
            "There is no tokenizer.json, and TEI reads only fast tokenizers: save the tokenizer with "
            "a current transformers and register that.",
        )


def _weights(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    names = set(model.files)
    if model.config.get("quantization_config"):
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
    else:
        yield (
            REFUSED,
            "There are no weights that TEI reads: register model.safetensors, or its index with all "
            "shards.",
        )


def _safetensors(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    for outcome, message, *_ in _weights(model, hardware):
        if outcome == WARNED:
            yield (
                REFUSED,
                "The weights are in pytorch_model.bin only, which the conversion never opens: "
                "register a revision with model.safetensors.",
            )
        else:
            yield outcome, message


def _config(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    config = model.config
    if not model.class_names or not isinstance(config.get("model_type"), str):
        yield (
            REFUSED,
            "config.json lacks architectures or model_type, which TEI requires: register the model "
            "with its original config.json.",
        )
        return
    keys = ("max_position_embeddings", "max_trained_positions")
    if all(_count(config.get(key)) is None for key in keys):
        yield REFUSED, f"config.json has neither {keys[0]} nor {keys[1]}, which TEI requires."
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


def _architecture(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    architecture = ARCHITECTURES.get(model.model_type)
    if architecture is None:
        yield (
            REFUSED,
            f"TEI has no implementation of {model.model_type}: choose a model of another "
            "architecture, or another server.",
        )
        return
    if any(name.endswith("Classification") for name in model.class_names):
        yield (
            REFUSED,
            f"{model.class_names[0]} is a classifier or reranker, which gives scores, not embeddings.",
        )
    if model.config.get("use_sliding_window"):
        yield REFUSED, "The model uses a sliding window, which TEI does not implement for it."
    if hardware is None:
        return
    if not hardware.is_gpu:
        supported, where = architecture.cpu, "on a CPU"
    elif not hardware.flash_attention:
        supported, where = architecture.gpu, "without flash attention"
    else:
        supported, where = architecture.flash, "with flash attention"
    if not supported:
        yield REFUSED, f"TEI does not serve {model.model_type} {where} ({hardware.title})."
    elif hardware.dtype not in architecture.dtypes:
        yield (
            REFUSED,
            f"TEI serves {model.model_type} in {architecture.dtypes[0]} only, and {hardware.title} "
            f"runs in {hardware.dtype}.",
        )


def _pooling_config(mode: str, dimensions: object) -> dict[str, object]:
    """1_Pooling/config.json as sentence-transformers ≤ 5.3 wrote it, which is what TEI parses."""
    modes = {f"pooling_mode_{end}": mode == m for m, end in POOLING_MODES.items()}
    return {"word_embedding_dimension": dimensions, **modes}


def _pooling(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    path = "1_Pooling/config.json"
    config = model.json(path)
    if not config:
        if model.pooling is None:
            guess = "silently takes the first token" if "bert" in model.model_type else "stops"
            yield (
                REFUSED,
                f"There is no {path}, without which TEI {guess}: register the model with its "
                "sentence-transformers files, or say how it pools.",
            )
        return
    if "pooling_mode" in config:  # sentence-transformers ≥ 5.4
        said = config["pooling_mode"]
        modes = [str(mode) for mode in (said if isinstance(said, list) else [said])]
    else:
        prefix = "pooling_mode_"
        modes = [
            key.removeprefix(prefix)
            for key, on in config.items()
            if key.startswith(prefix) and on is True
        ]
        modes = [
            next((m for m, end in POOLING_MODES.items() if end == mode), mode) for mode in modes
        ]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        yield (
            REFUSED,
            f"The model pools by {' and '.join(modes) or 'nothing'}, and TEI only by cls, mean or "
            "lasttoken.",
        )
        return
    told = (model.pooling or "").replace("-", "")
    if told in POOLING_MODES and told != modes[0]:
        yield (
            WARNED,
            f"The model's files say that it pools by {modes[0]}, but TEI is told {model.pooling}.",
        )
    required = ("pooling_mode_cls_token", "pooling_mode_mean_tokens")
    if "pooling_mode" in config or any(config.get(key) is None for key in required):
        dimension = config.get("word_embedding_dimension", config.get("embedding_dimension"))
        yield (
            FIXED,
            f"{path}: the pooling ({modes[0]}) was written as TEI reads it.",
            {path: _pooling_config(modes[0], dimension)},
        )
    if config.get("include_prompt") is False:
        yield (
            WARNED,
            "The model pools without its prompt's tokens, and TEI with them: compare vectors before "
            "use.",
        )


def _length(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    path = next((name for name in SENTENCE_CONFIGS if name in model.files), None)
    if path is None:
        return
    config = model.json(path)
    length, positions = _count(config.get("max_seq_length")), model.positions
    if length is None:
        told = _count(model.json("tokenizer_config.json").get("model_max_length"))
        lengths = [n for n in (told, positions) if n]
        if lengths:
            yield (
                FIXED,
                f"{path}: max_seq_length {min(lengths)} was added, without which TEI does not start.",
                {path: {"max_seq_length": min(lengths), "do_lower_case": False}},
            )
        else:
            yield (
                FIXED,
                f"{path} has no max_seq_length and was left out.",
                {path: None},
            )
    elif positions is not None and length > positions:
        yield (
            FIXED,
            f"{path}: max_seq_length {length} was lowered to the model's {positions} positions.",
            {path: {**config, "max_seq_length": positions}},
        )


def _modules(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    modules = model.files.get("modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        if modules is not None:
            yield (
                FIXED,
                "modules.json is no list of modules and was left out.",
                {"modules.json": None},
            )
        return
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if unknown := [name for name in names if name not in _MODULES]:
        yield (
            REFUSED,
            f"modules.json lists {unknown[0]}, which TEI would leave out without a word: its vectors "
            "would not be the model's.",
        )
        return
    known = [
        {**m, "type": f"sentence_transformers.models.{n}"}
        for m, n in zip(modules, names, strict=True)
    ]
    if known != modules:
        yield (
            FIXED,
            "modules.json: the modules' types were written as TEI reads them.",
            {"modules.json": known},
        )
    for module, name in zip(modules, names, strict=True):
        if name != "Dense":
            continue
        path = str(module.get("path", ""))
        config = model.json(f"{path}/config.json")
        weights = {f"{path}/model.safetensors", f"{path}/pytorch_model.bin"}
        if not config or not weights & set(model.files):
            yield REFUSED, f"The Dense module {path} lacks its config.json or its weights."
        elif (place := config.get("module_input_name", _SENTENCE)) != _SENTENCE:
            yield REFUSED, f"The Dense module {path} works on {place}, and TEI's on {_SENTENCE}."
        elif config.get("activation_function", _ACTIVATIONS[1]) not in _ACTIVATIONS:
            yield (
                REFUSED,
                f"The Dense module {path} ends with {config['activation_function']}, which TEI takes "
                "for no function at all.",
            )


def _prompts(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    path = "config_sentence_transformers.json"
    config = model.json(path)
    prompts = config.get("prompts")
    if prompts is not None:
        kept = (
            {k: v for k, v in prompts.items() if isinstance(v, str)}
            if isinstance(prompts, dict)
            else {}
        )
        if kept != prompts:
            yield (
                FIXED,
                "config_sentence_transformers.json: prompts that are not texts were left out.",
                {path: {**config, "prompts": kept}},
            )
    if name := config.get("default_prompt_name"):
        yield (
            WARNED,
            f"The model puts its prompt {name} before every text: TEI must be told by "
            "--default-prompt-name.",
        )


def _jina_v2(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    auto_map = model.config.get("auto_map")
    said = [str(model.config.get("_name_or_path"))]
    said.append(str(auto_map.get("AutoConfig")) if isinstance(auto_map, dict) else "")
    if said[0] not in JINA_V2_CODE and not any(name in said[1] for name in JINA_V2_CODE):
        yield (
            REFUSED,
            "This copy of a jina-embeddings-v2 model was saved again and no longer names Jina's code "
            "(auto_map or _name_or_path), so TEI would take it for plain BERT: register the original "
            "files.",
        )


def _rope(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    config = model.config
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default" or "factor" in parameters:
            yield (
                REFUSED,
                f"config.json scales its rotary positions ({kind}) in rope_parameters, where TEI "
                "ignores it without a word: register the revision whose config.json says "
                "rope_scaling.",
            )
        elif "rope_theta" not in config and "rope_theta" in parameters:
            yield (
                FIXED,
                "config.json: rope_theta was copied from rope_parameters to where TEI reads it.",
                {"config.json": {**config, "rope_theta": parameters["rope_theta"]}},
            )
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        kind = scaling.get("type", scaling.get("rope_type"))
        if model.model_type not in ("new", "gte") or kind != "ntk":
            yield (
                REFUSED,
                f"The model scales its rotary positions ({kind}), which TEI does not do for "
                f"{model.model_type}.",
            )


def _nomic(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    if {"n_positions", "max_position_embeddings"} <= set(model.config):
        yield (
            WARNED,
            "config.json has both n_positions and max_position_embeddings, which TEI 1.9.3 and older "
            "cannot parse: keep the TEI that this template builds.",
        )
    if not {"rotary_emb_base", "n_embd", "activation_function"} <= set(model.config):
        yield (
            REFUSED,
            "config.json is not nomic_bert's own (rotary_emb_base, n_embd, activation_function are "
            "missing): register the original config.json.",
        )


def _causal(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    if hardware is not None and not (hardware.is_gpu and hardware.flash_attention):
        yield (
            REFUSED,
            "Without flash attention TEI gives wrong vectors for texts of equal length in one batch of "
            "this model: choose a GPU that has it.",
        )


def _overflow(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
    if hardware is None or hardware.dtype == "float16":
        yield (
            WARNED,
            "The model was trained in bfloat16 and runs in float16, where large values can overflow: "
            "look for null in the vectors of your own texts.",
        )


def _conversion(model: Model, hardware: Hardware | None) -> Iterator[_Result]:
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
        "config.json has what TEI requires.",
        "TEI router/src/lib.rs:205-211 and :468-483",
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
        lambda model: (
            model.model_type == "bert"
            and (
                model.config.get("position_embedding_type") == "alibi"
                or any(name.startswith("JinaBert") for name in model.class_names)
            )
        ),
    ),
    Rule(
        "rotary-positions",
        "The rotary positions are written where TEI reads them.",
        "TEI backends/candle/src/layers/rotary.rs, models/gte.rs:15-35, models/qwen3.rs; "
        "transformers ≥ 5 writes rope_parameters",
        _rope,
        lambda model: model.model_type in _ROPE_THETA,
    ),
    Rule(
        "nomic-config",
        "config.json is nomic_bert's own, in the form that every TEI parses.",
        "#876 (fixed after 1.9.3); TEI backends/candle/src/models/nomic.rs:12-45",
        _nomic,
        lambda model: model.model_type == "nomic_bert",
    ),
    Rule(
        "pooling",
        "The pooling is known.",
        "TEI router/src/lib.rs:441-508; sentence-transformers #3554 (≥ 5.4 writes another schema)",
        _pooling,
    ),
    Rule(
        "length",
        "The longest input is known.",
        "TEI router/src/lib.rs:195-233; sentence-transformers #3554 (≥ 5.4 writes no max_seq_length)",
        _length,
    ),
    Rule(
        "modules",
        "TEI applies every module of the model.",
        "TEI backends/src/lib.rs:524-552 and :818-826, candle/src/layers/dense.rs; #701",
        _modules,
    ),
    Rule(
        "prompts",
        "TEI can read the prompts.",
        "TEI router/src/lib.rs:242-248",
        _prompts,
    ),
    Rule(
        "causal-mask",
        "Flash attention keeps the causal mask in every batch.",
        "#882, #883 (open): backends/candle/src/models/qwen3.rs skips the mask of unpadded batches",
        _causal,
        lambda model: model.model_type == "qwen3",
    ),
    Rule(
        "overflow",
        "The model runs in a type that holds its values.",
        "#644, #845",
        _overflow,
        lambda model: model.model_type == "qwen3",
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
