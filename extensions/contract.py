"""TEI's contract: what it computes rightly, by architecture. The table is data/contract.json.

A row of the table is an architecture by `model_type` (jina-embeddings-v2, which calls itself bert, is
a row of its own). Its fields:

    like          a row that it takes everything else from
    paths         cpu, gpu (without flash attention), flash -> how that is known; a path that is not
                  there has no implementation, or one that is wrong (`refusals` then says why)
    dtypes        what TEI computes it in
    mask          what goes wrong in batches where TEI lacks one of our edits (see Mask)
    pooling       modes that work
    prefixes      of the tensors' names, all that TEI tries; `tensors`: names that must be there;
                  `layer`: what those of the first layer begin with, by who wrote them
    unread        pattern of tensors that the model needs and TEI never reads
    position_offset  positions that no token takes: a number, or pad_token_id for that one plus 1
    positions     keys with the number of positions, first that is there
    trained_positions  positions beyond which `when`, a key, changes the vectors of a whole batch
    within        key with the tokens within which the attention's window cuts nothing off; beyond, TEI's
                  window is another than transformers'
    table         TEI builds a table of heads x positions x positions without flash attention
    rope, scalings   where the rotary base stands; scalings of positions that TEI computes
    modules       modules of sentence-transformers that TEI has built in
    own_code      its models come with their makers' code, which is what TEI implements
    classes       pattern of transformers' own classes, where others may attend otherwise
    keys          of config.json, see below
    known         keys that both heed, or that change nothing when texts are embedded

A key either has a `type`: TEI needs it and stops without it. What is missing comes `from` another key
(translated by `map`), else from `default`, which is the architecture's own in transformers (`when`:
only beside that key). `replace`: so does what TEI cannot parse, because nothing is computed from it.
`absent` and `null`: what transformers' class takes where the key is not there, or null, and TEI takes
something else: a value, or the name of the key that has it. `never_null`: TEI takes a missing key, and
no null.
`values` are what TEI computes rightly. Or it has `only`: values that change nothing; TEI never reads
the key, so every other is refused, or repaired by what `repair` writes. `quotient` and `all` are such
values too: one number divided by another, and a list of nothing else.

`source` is *run* (on TEI's CPU program at `commit`, tests/contract) or *read* (from TEI's code).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

JINA_V2 = "jina-v2"
JINA_V2_CODE = ("jinaai/jina-bert-implementation", "jinaai/jina-bert-v2-qk-post-norm")
"""The names by which TEI tells Jina's BERT from BERT (TEI candle/src/lib.rs:83-121)."""

SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""TEI reads the first that is there for the longest input (core/src/download.rs)."""

_NO_LENGTH = 10_000_000
"""model_max_length above means none: transformers writes 10^30."""

_POSITIONS = ("max_position_embeddings", "max_trained_positions")

_TABLE = Path(__file__).parent / "data" / "contract.json"


@dataclass(frozen=True, slots=True)
class Mask:
    """What TEI gets wrong in a batch without one of our edits."""

    edit: str
    """Name of the edit in images/tei."""

    when: str
    """always, or causal: only while the model attends to what stands before."""

    paths: tuple[str, ...]
    harm: str
    source: str
    limit: str | None = None
    """window: texts of at most half the attention's window + 1 are right all the same."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How TEI's Candle backend supports one architecture; the fields are those of the table."""

    name: str
    paths: Mapping[str, str]
    pooling: tuple[str, ...]
    prefixes: tuple[str, ...]
    tensors: tuple[str, ...]
    keys: Mapping[str, Mapping[str, Any]]
    known: frozenset[str]
    dtypes: tuple[str, ...] = ("float16", "float32")
    refusals: Mapping[str, str] = field(default_factory=dict)
    mask: Mask | None = None
    layer: tuple[str, ...] = ()
    unread: str | None = None
    position_offset: int | str = 0
    positions: tuple[str, ...] = _POSITIONS
    trained_positions: Mapping[str, Any] | None = None
    within: str | None = None
    table: bool = False
    rope: str | None = None
    scalings: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    own_code: bool = False
    classes: str | None = None
    fused_activation: bool = False
    bfloat16: bool = False


def path_of(architecture: Architecture, *, is_gpu: bool, flash: bool, dtype: str) -> str:
    """cpu, gpu or flash: which of TEI's implementations runs (backends/candle/src/lib.rs)."""
    if not is_gpu:
        return "cpu"
    # What has no implementation of its own for flash attention takes the other.
    own = "flash" in architecture.paths
    return "flash" if flash and own and dtype == "float16" else "gpu"


@cache
def table() -> Mapping[str, Any]:
    """The whole file."""
    content: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return MappingProxyType(content)


@cache
def architectures() -> Mapping[str, Architecture]:
    """The rows by name."""
    rows = table()["architectures"]
    return MappingProxyType({name: _architecture(name, _whole(rows, name)) for name in rows})


def of(config: Mapping[str, Any]) -> Architecture | None:
    """The row of a config.json."""
    name = JINA_V2 if is_jina_v2(config) else config.get("model_type")
    return architectures().get(name) if isinstance(name, str) else None


def is_jina_v2(config: Mapping[str, Any]) -> bool:
    """Jina's own BERT with ALiBi, whether or not TEI would know it as that."""
    names = config.get("architectures")
    return config.get("model_type") == "bert" and (
        config.get("position_embedding_type") == "alibi"
        or names_jina_v2(config)
        or (isinstance(names, list) and any(str(n).startswith("JinaBert") for n in names))
    )


def names_jina_v2(config: Mapping[str, Any]) -> bool:
    """Whether TEI knows it as Jina's BERT."""
    auto_map = config.get("auto_map")
    code = str(auto_map.get("AutoConfig")) if isinstance(auto_map, dict) else ""
    return config.get("_name_or_path") in JINA_V2_CODE or any(n in code for n in JINA_V2_CODE)


def _whole(rows: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row with what it takes from the one that it is `like`."""
    row = dict(rows[name])
    if base := row.pop("like", None):
        parent = _whole(rows, base)
        keys = parent["keys"] | row.get("keys", {})
        known = [*parent["known"], *row.get("known", [])]
        row = parent | row | {"keys": keys, "known": known}
    return row


def _architecture(name: str, row: dict[str, Any]) -> Architecture:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    if isinstance(mask := values.get("mask"), dict):
        values["mask"] = Mask(**(mask | {"paths": tuple(mask["paths"])}))
    values["keys"] = table()["keys"] | row["keys"]
    values["known"] = frozenset(row["known"]) | frozenset(table()["known"])
    return Architecture(name=name, **values)


# Numbers


def count(value: object) -> int | None:
    """A whole number from 0, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def offset(architecture: Architecture | None, config: Mapping[str, Any]) -> int:
    """Positions that no token takes."""
    said = architecture.position_offset if architecture else 0
    return (count(config.get(said)) or 0) + 1 if isinstance(said, str) else said


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that TEI can tell apart and computes rightly."""
    architecture = of(config)
    keys = architecture.positions if architecture else _POSITIONS
    numbers = (count(config.get(key)) for key in keys)
    number = next((n for n in numbers if n is not None), None)
    if number is None:
        return None
    trained = architecture.trained_positions if architecture else None
    if trained and config.get(trained["when"]) is not None:
        found = (count(config.get(key)) for key in trained["keys"])
        number = min(number, next((n for n in found if n is not None), trained["default"]))
    if architecture and (key := architecture.within):
        window = count(config.get(key, architecture.keys[key].get("absent")))
        number = number if window is None else min(number, window)
    return max(0, number - offset(architecture, config))


def sequence_length(files: Mapping[str, Any]) -> int | None:
    """Tokens that sentence-transformers cuts at, and never more than there are positions.

    From the Sentence Transformers config, else the smaller of tokenizer_config.json's
    model_max_length and the positions (sentence-transformers, Transformer.max_seq_length).
    """
    config, tokenizer = _object(files, "config.json"), tokenizer_config(files)
    path = sentence_config(files)
    said = _length(_object(files, path).get("max_seq_length")) if path else None
    told = _length(tokenizer.get("model_max_length"))
    said = told if said is None else said
    lengths = [n for n in (said, positions(config)) if n]
    return min(lengths) if lengths else None


def _length(value: object) -> int | None:
    """A number of tokens, also one with a point; None for none and for `no limit`."""
    number = int(value) if isinstance(value, float) and value.is_integer() else count(value)
    return number if number is not None and 0 < number < _NO_LENGTH else None


def tokenizer_config(files: Mapping[str, Any]) -> Mapping[str, Any]:
    """tokenizer_config.json, and over it what else transformers and sentence-transformers load it with.

    The two other files count where transformers before 4.34 saved the tokenizer: without
    added_tokens_decoder (transformers 5.23, tokenization_utils_base.py:1890-1930).
    """
    path = sentence_config(files)
    said = _object(files, path) if path else {}
    given = (said.get(key) for key in ("tokenizer_args", "tokenizer_kwargs", "processor_kwargs"))
    merged = dict(_object(files, "tokenizer_config.json"))
    if "added_tokens_decoder" not in merged:
        merged |= _object(files, "special_tokens_map.json")
        merged |= {"added_tokens": list(_object(files, "added_tokens.json"))}
    for arguments in given:
        merged |= arguments if isinstance(arguments, dict) else {}
    return merged


def sentence_config(files: Mapping[str, Any]) -> str | None:
    """The Sentence Transformers config that TEI reads."""
    return next((name for name in SENTENCE_CONFIGS if name in files), None)


def _object(files: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    content = files.get(path)
    return content if isinstance(content, dict) else {}


# Keys of config.json


@dataclass(slots=True)
class Judgement:
    """What the table says of one config.json."""

    written: dict[str, Any] = field(default_factory=dict)
    """Keys to write."""

    dropped: set[str] = field(default_factory=set)
    """Keys to leave out."""

    refused: list[str] = field(default_factory=list)
    """Why it is not served, one sentence each."""

    unknown: dict[str, Any] = field(default_factory=dict)
    """What the table does not know."""


def judge(architecture: Architecture, config: Mapping[str, Any]) -> Judgement:
    """Compare a config.json with its row."""
    result = Judgement()
    _rope(architecture, config, result)
    for key, row in architecture.keys.items():
        wrong = _key(key, row, config, result)
        if wrong:
            result.refused.append(wrong)
    heeded = {*architecture.keys, *architecture.known, "rope_scaling", "rope_parameters"}
    result.unknown = {
        key: value
        for key, value in config.items()
        if key not in heeded and value not in (None, False, "", 0) and value != [] and value != {}
    }
    return result


def _key(
    key: str, row: Mapping[str, Any], config: Mapping[str, Any], result: Judgement
) -> str | None:
    value = config.get(key)
    if "type" in row:
        return _required(key, row, config, result)
    if value is None:
        return None
    why = row.get("why", "")
    if "values" in row:
        return None if _among(value, row["values"]) else _says(key, value, why)
    if "quotient" in row:
        over, under = (count(config.get(name)) for name in row["quotient"])
        if over and under and value != over // under:
            return _says(key, value, f"TEI takes {row['quotient'][0]} / {row['quotient'][1]}")
        return None
    if "all" in row:
        fits = isinstance(value, list) and all(item == row["all"] for item in value)
        return None if fits else _says(key, "other layers", why)
    if _among(value, row["only"]) or (row.get("unless") and config.get(row["unless"]) is True):
        return None
    if "repair" in row:
        result.written |= {k: v for k, v in row["repair"].items() if config.get(k) is not v}
        return None
    return _says(key, value, f"{why}")


def _required(
    key: str, row: Mapping[str, Any], config: Mapping[str, Any], result: Judgement
) -> str | None:
    value, kind = config.get(key), row["type"]
    elsewhere = [v for v in _elsewhere(row, config) if _fits(v, kind)]
    said = row.get("null" if key in config else "absent")
    if value is None and said is not None and not elsewhere:
        value = config.get(said) if isinstance(said, str) else said
        if value is not None:
            result.written[key] = value
    if kind == "activation" and isinstance(value, str):
        same = table()["activations"]["same"].get(value)
        if same is not None:
            result.written[key] = value = same
    if value is None or (row.get("replace") and not _fits(value, kind)):
        code = row.get("code", {}).get(remote_code(config))
        if value is None and row.get("optional") and code is None:
            result.dropped |= {key} if row.get("never_null") and key in config else set()
            return None
        first = value[0] if isinstance(value, list) and value else None
        candidates = [*elsewhere, first, code]
        if "when" not in row or config.get(row["when"]) is not None:
            candidates.append(row.get("default"))
        value = next((v for v in candidates if v is not None and _fits(v, kind)), None)
        if value is None:
            return (
                f"config.json lacks {key}, which TEI requires: register the model with its original "
                "config.json."
            )
        result.written[key] = value
    elif not _fits(value, kind):
        if kind == "activation":
            return _says(key, value, "TEI has no such function")
        return _says(key, value, f"TEI reads a {kind} there and does not start")
    elif elsewhere and elsewhere[0] != value and not row.get("differ"):
        if key.startswith("_"):  # derived from the layers, which are what transformers builds
            result.written[key] = value = elsewhere[0]
        else:
            return (
                f"config.json says {key} twice, {value} and {elsewhere[0]}, and TEI takes the first: "
                "register the model with its original config.json."
            )
    if "values" in row and not _among(value, row["values"]):
        return _says(key, value, row["why"])
    return None


def _elsewhere(row: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Any]:
    """What other keys say, translated."""
    paths = row.get("from", [])
    for path in [paths] if isinstance(paths, str) else paths:
        value: Any = config
        if path.startswith("layer_types:"):
            value = _period(config.get("layer_types"), path.endswith("first"))
        else:
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            yield row["map"].get(value, value) if "map" in row and _hashable(value) else value


def _period(layers: object, first: bool) -> int | None:
    """n where every n-th layer attends to everything, from the first or from the n-th on."""
    if not isinstance(layers, list) or not layers:
        return None
    full = [i for i, kind in enumerate(layers) if kind == "full_attention"]
    start = 0 if first else 1
    for n in range(1, len(layers) + 2):
        if full == [i for i in range(len(layers)) if (i + start) % n == 0]:
            return n
    return None


def _rope(architecture: Architecture, config: Mapping[str, Any], result: Judgement) -> None:
    """Scalings of rotary positions: only those that TEI computes."""
    if architecture.rope is None:
        return
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        inner = [group for group in parameters.values() if isinstance(group, dict)]
        if inner and architecture.rope != "nested":
            result.refused.append(
                "config.json says rope_parameters by the kind of layer, and TEI turns all layers alike."
            )
        for group in inner or [parameters]:
            kind = group.get("rope_type", group.get("type", "default"))
            if kind != "default" or "factor" in group:
                way_out = (
                    "register the revision whose config.json says rope_scaling"
                    if kind in architecture.scalings
                    else "choose another revision or model"
                )
                result.refused.append(
                    f"config.json scales its rotary positions ({kind}) in rope_parameters, where TEI "
                    f"ignores it without a word: {way_out}."
                )
                break
            if group.get("partial_rotary_factor", 1) != 1:
                result.refused.append(
                    "config.json turns only part of its dimensions (partial_rotary_factor), and TEI "
                    "all."
                )
                break
        fits = (
            isinstance(parameters.get("rope_type"), str)
            and parameters.get("rope_theta") is not None
        )
        if inner or not fits:
            result.dropped.add("rope_parameters")
    elif parameters is not None:
        result.dropped.add("rope_parameters")
    layers, allowed = config.get("layer_types"), ("full_attention", "sliding_attention")
    if isinstance(layers, list) and any(kind not in allowed for kind in layers):
        result.refused.append("config.json lists layers of a kind that TEI does not have.")
    elif (
        architecture.rope == "nested"
        and layers
        and _period(layers, first=architecture.name == "modernbert") is None
    ):
        result.refused.append(
            "The layers that attend to everything (layer_types) have no such period as TEI builds."
        )
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or not scaling:
        return
    kind = scaling.get("rope_type", scaling.get("type"))
    more = set(scaling) - {"rope_type", "type"}
    if kind == "default" and more:
        result.refused.append(
            f"config.json says {min(more)} in rope_scaling, where TEI ignores it without a word: write it "
            "beside rope_scaling, as the model's original config.json has it."
        )
    elif kind == "default":
        result.dropped.add("rope_scaling")
    elif kind in architecture.scalings:
        _scaling(kind, scaling, result)
    else:
        result.refused.append(
            f"The model scales its rotary positions ({kind}), which TEI does not do for "
            f"{architecture.name}."
        )


def _scaling(kind: str, said: Mapping[str, Any], result: Judgement) -> None:
    """One that TEI computes, as it reads it: a kind under one name, and a factor (layers/rotary.rs)."""
    more = [
        key for key in said if key not in ("rope_type", "type", "factor") and said[key] is not None
    ]
    if more:
        result.refused.append(
            f"The model scales its rotary positions ({kind}) with {more[0]}, which TEI does not know."
        )
    elif not _fits(said.get("factor"), "number"):
        result.refused.append(f"config.json scales its rotary positions ({kind}) by no number.")
    elif len(said) > 2:
        result.written["rope_scaling"] = {"type": kind, "factor": said["factor"]}


def remote_code(config: Mapping[str, Any]) -> str | None:
    """The class of the model's own code, without the repository that it is taken from."""
    auto_map = config.get("auto_map")
    value = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    return value.rpartition("--")[2] if isinstance(value, str) else None


def _fits(value: object, kind: str) -> bool:
    """Whether TEI parses it; serde takes a number with a point for no whole one."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind == "names":
        names = value.split("|") if isinstance(value, str) else value
        return isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {
        "count": whole and 0 <= int(str(value)) < 1 << 63 if whole else False,
        "positive": whole and int(str(value)) > 0 if whole else False,
        "integer": whole,
        "number": whole or isinstance(value, float),
        "flag": isinstance(value, bool),
        "text": isinstance(value, str),
        "activation": isinstance(value, str) and value in table()["activations"]["accepted"],
    }[kind]


def _hashable(value: object) -> bool:
    return isinstance(value, str | int | float)


def _among(value: object, allowed: list[Any]) -> bool:
    """Like `in`, but true is not 1 and a list is not its first."""
    return any(
        value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed
    )


def _says(key: str, value: object, why: str) -> str:
    shown = json.dumps(value) if not isinstance(value, str) else value
    return f"config.json says {key}: {shown[:60]}, and {why}: choose another revision or model."


# Tensors

_ADAPTER = r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_l)\."
"""In the names of tensors while PEFT's adapter stands beside them."""

_BUFFERS = ("position_ids", "token_type_ids", "num_batches_tracked", "inv_freq")
"""Tensors beside the weights that no model of the table computes with."""

_TENSORS_PER_LAYER = 4
"""No layer of any architecture has fewer; a header with fewer is not a whole model."""


def tensor_problem(
    architecture: Architecture, tensors: Mapping[str, str | None], layers: int
) -> str | None:
    """Why TEI cannot load these weights, or would load them wrongly; in one sentence.

    Args: layers: of the model.
    """
    dtypes = table()["weights"]["dtypes"]
    for name, dtype in tensors.items():
        part = name.rpartition(".")[2]
        if dtype is not None and dtype not in dtypes and part not in _BUFFERS:
            return (
                f"The tensor {name} is {dtype}, and TEI takes {', '.join(dtypes)}: register the model "
                "before it was quantized or converted."
            )
    if added := [name for name in tensors if re.search(_ADAPTER, name)]:
        return (
            f"The weights have {added[0]} of an adapter that was not merged, which TEI does not read: "
            "merge it (PEFT's merge_and_unload) and save the model again."
        )
    if architecture.unread and (lost := [n for n in tensors if re.search(architecture.unread, n)]):
        return f"The weights have {lost[0]}, which TEI does not read for {architecture.name}."
    wanted = architecture.tensors[0]
    alike = [name for name in tensors if name.endswith(wanted)]
    whole = len(tensors) >= _TENSORS_PER_LAYER * layers
    if {f"{prefix}{wanted}" for prefix in architecture.prefixes}.isdisjoint(tensors) and (
        alike or (tensors and whole)
    ):
        found = next(iter([*alike, *tensors]))
        looked = " or ".join(f"{prefix}{wanted}" for prefix in architecture.prefixes)
        return (
            f"TEI looks for the tensor {looked}, and the weights have {found}: save the model itself, "
            "not a module around it."
        )
    own = [p for p in architecture.prefixes if f"{p}{wanted}" in tensors]
    last = [layer.replace("0", str(layers - 1)) for layer in architecture.layer]
    if (
        whole
        and own
        and not any(n.startswith(f"{own[0]}{start}") for n in tensors for start in last)
    ):
        return (
            f"TEI looks for the tensors {own[0]}{last[0]}… of the last layer, and the weights have none: "
            "save the model again with transformers."
        )
    return None
