"""Rules on the tokenizer: what transformers reads of tokenizer_config.json, TEI must find in tokenizer.json.

TEI reads tokenizer.json alone (router/src/lib.rs:149-182). The settings below are those that change
the tokens; each was tried with the tokenizer classes of transformers 5.23 and is the same in 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import contract
from .findings import FIXED, REFUSED, WARNED, Hardware, Model, Result

PATH, CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of tokenizer_config.json and where tokenizer.json says the same."""

    key: str
    component: str
    """normalizer or pre_tokenizer."""

    type: str
    """Of the component that has it."""

    field: str
    classes: tuple[str, ...]
    """Tokenizer classes that heed it; each is also called so with Fast at its end."""

    default: object = None
    """What these classes take when the key is not there; ... for what tokenizer.json says."""


_BERT = ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer")
_BYTE_LEVEL = ("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "GPT2Tokenizer")

SETTINGS = (
    Setting("do_lower_case", "normalizer", "BertNormalizer", "lowercase", _BERT, True),
    Setting("strip_accents", "normalizer", "BertNormalizer", "strip_accents", _BERT, None),
    Setting(
        "tokenize_chinese_chars",
        "normalizer",
        "BertNormalizer",
        "handle_chinese_chars",
        _BERT,
        True,
    ),
    Setting(
        "add_prefix_space", "pre_tokenizer", "ByteLevel", "add_prefix_space", _BYTE_LEVEL, False
    ),
    Setting(
        "add_prefix_space",
        "pre_tokenizer",
        "ByteLevel",
        "add_prefix_space",
        ("Qwen2Tokenizer",),
        ...,
    ),
)

# transformers 5 builds the tokenizer of these from their settings, 4 takes tokenizer.json.
_DIFFERENT_SINCE_5: tuple[tuple[str, tuple[str, ...], object], ...] = (
    ("do_lower_case", ("DebertaV2Tokenizer",), False),
    ("split_by_punct", ("DebertaV2Tokenizer",), False),
    ("add_prefix_space", ("XLMRobertaTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer"), True),
    ("add_prefix_space", ("LlamaTokenizer",), None),
)

_BY_MODEL_TYPE = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "nomic_bert": "BertTokenizer",
}
"""What AutoTokenizer takes where tokenizer_config.json names no class."""


def settings(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """What both files say, and how texts are cut."""
    config, tokenizer = contract.tokenizer_config(model.files), model.json(PATH)
    truncation = tokenizer.get("truncation")
    direction = truncation.get("direction") if isinstance(truncation, dict) else None
    if config.get("truncation_side", str(direction).lower()) == "left":
        yield (
            WARNED,
            "The model keeps the end of a too long text (truncation_side: left), and TEI its beginning: "
            "clients of /embed ask for truncation_direction=left, /v1/embeddings cannot.",
        )
    if not tokenizer:
        return
    name = _class(model)
    yield from _unsettled(config, tokenizer, name)
    changed, said = copy.deepcopy(dict(tokenizer)), []
    for setting in SETTINGS:
        if name not in setting.classes:
            continue
        wanted = config.get(setting.key, setting.default)
        if wanted is ... or not (wanted is None or isinstance(wanted, bool)):
            continue
        for part in _parts(changed.get(setting.component), setting.type):
            if part.get(setting.field) is not wanted:
                part[setting.field] = wanted
                said.append(setting.key)
    if (tokens := _found_otherwise(config, changed)) is not None:
        changed["added_tokens"] = tokens
        said.append("added_tokens_decoder")
    if said:
        yield (
            FIXED,
            f"{PATH}: {' and '.join(dict.fromkeys(said))} was written as {_said_by(model)}, which TEI does "
            "not read.",
            {PATH: changed},
        )
    for key, classes, usual in _DIFFERENT_SINCE_5:
        if name in classes and key in config and config[key] not in (usual, None):
            yield (
                WARNED,
                f"{CONFIG} says {key}: {config[key]}, which transformers 5 heeds and 4 and TEI do not: "
                "compare vectors with those of the version that the model was made with.",
            )


def _unsettled(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], name: str
) -> Iterator[Result]:
    """What some version of transformers takes from the config, and no rule can write."""
    if isinstance(code := config.get("auto_map"), dict) and code.get("AutoTokenizer"):
        yield (
            WARNED,
            f"The tokenizer comes with code of its own ({CONFIG}, auto_map), and TEI reads {PATH} alone: "
            "compare vectors.",
        )
    # transformers 4.46 and newer write it into any tokenizer, 5 into those of SETTINGS.
    prefix, known = config.get("add_prefix_space"), {c for s in SETTINGS for c in s.classes}
    parts = _parts(tokenizer.get("pre_tokenizer"), "ByteLevel")
    asked = isinstance(prefix, bool) and name not in known and name not in _OWN_PREFIX
    if asked and any(part.get("add_prefix_space") is not prefix for part in parts):
        yield (
            WARNED,
            f"{CONFIG} says add_prefix_space: {str(prefix).lower()}, which only some versions of "
            f"transformers heed, and {PATH} the other: compare vectors.",
        )
    if name in _PYTHON:
        yield (
            WARNED,
            f"The tokenizer's class {name} is Python code that {PATH} cannot hold, and TEI reads {PATH} "
            "alone: compare vectors.",
        )
    listed = (config.get(key) for key in _ADDED)
    tokens = [t for said in listed if isinstance(said, dict | list) for t in _values(said)]
    if lost := [c for t in tokens if (c := _text(t)) and _number(tokenizer, c) is None]:
        yield (
            WARNED,
            f"{CONFIG} has tokens that {PATH} lacks ({len(lost)}, first {lost[0][:40]}), which transformers "
            "adds and TEI splits: save the tokenizer again if your texts hold them.",
        )

    if config.get("split_special_tokens") is True:
        yield (
            WARNED,
            f"{CONFIG} says split_special_tokens, so transformers takes special tokens in texts for plain "
            "ones, and TEI does not.",
        )
    if name in _REBUILT and (differs := _differing(config, tokenizer)):
        yield (
            WARNED,
            f"{CONFIG} says {differs}, and {PATH} another, which transformers 5 replaces and 4 and TEI "
            "keep: compare vectors.",
        )
    normalizer = tokenizer.get("normalizer")
    if (
        name in _BERT
        and isinstance(normalizer, dict)
        and normalizer.get("type") != "BertNormalizer"
    ):
        yield (
            WARNED,
            f"{PATH} normalizes texts by more than a BertNormalizer, which transformers 5 replaces and 4 "
            "and TEI keep: compare vectors.",
        )


def _found_otherwise(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Added tokens as added_tokens_decoder and its older forms have them: transformers adds them over
    the tokenizer's own, flags and all (tried with 5.23).

    Returns: all of them, as they are to be; None where nothing differs. Tokens that the tokenizer does
    not have at all are `_unsettled`.
    """
    listed = tokenizer.get("added_tokens")
    if not (listed is None or isinstance(listed, list)):
        return None
    tokens = [dict(token) for token in listed or [] if isinstance(token, dict)]
    before, known = [dict(token) for token in tokens], {_text(token): token for token in tokens}
    for key in _ADDED:
        for said in _values(found) if isinstance(found := config.get(key), dict | list) else []:
            if (content := _text(said)) is None:
                continue
            told = said if isinstance(said, dict) else {}
            flags = {flag: told[flag] for flag in _FLAGS if isinstance(told.get(flag), bool)}
            if content in known:
                known[content] |= flags if key == "added_tokens_decoder" else {}
            elif (number := _number(tokenizer, content)) is not None:
                special = flags.get("special", key in _SPECIAL)
                usual = dict.fromkeys(_FLAGS, False) | {
                    "special": special,
                    "normalized": not special,
                }
                known[content] = {"id": number, "content": content, **usual, **flags}
                tokens.append(known[content])
    return (
        sorted(tokens, key=lambda token: str(token.get("id")).zfill(9))
        if tokens != before
        else None
    )


def _said_by(model: Model) -> str:
    return f"{CONFIG} says it" if CONFIG in model.files else f"{_class(model)} takes it by default"


def _differing(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | None:
    """The first of the special tokens around a text that both files name, and differently."""
    model, processor = tokenizer.get("model"), tokenizer.get("post_processor")
    for key, place in (("cls_token", 0), ("sep_token", -1)):
        token, found = _text(config.get(key)), _ends(processor, place)
        if token and found and _number(tokenizer, token) not in found:
            return f"{key}: {token[:40]}"
    token = _text(config.get("unk_token"))
    said = model.get("unk_token") if isinstance(model, dict) else None
    return f"unk_token: {token[:40]}" if token and said and token != said else None


def _values(said: dict[str, Any] | list[Any]) -> list[Any]:
    return list(said.values()) if isinstance(said, dict) else said


_ADDED = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens",
)
"""Keys that list tokens, as texts or objects; added_tokens is the file of that name."""

_PYTHON = (
    "BartphoTokenizer",
    "BertJapaneseTokenizer",
    "BertweetTokenizer",
    "BioGptTokenizer",
    "BlenderbotSmallTokenizer",
    "ByT5Tokenizer",
    "CTRLTokenizer",
    "CanineTokenizer",
    "CpmAntTokenizer",
    "CpmTokenizer",
    "EsmTokenizer",
    "FSMTTokenizer",
    "FlaubertTokenizer",
    "GPTNeoXJapaneseTokenizer",
    "PhobertTokenizer",
    "ProphetNetTokenizer",
    "RoCBertTokenizer",
    "TapasTokenizer",
    "XLMTokenizer",
)
"""Classes for texts that have no other form (transformers 5.23, TOKENIZER_MAPPING_NAMES)."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How an added token is found in a text."""

_SPECIAL = ("additional_special_tokens", "extra_special_tokens")

_REBUILT = (*_BERT, *_BYTE_LEVEL, "XLMRobertaTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer")
"""Classes whose tokenizer transformers 5 builds from their own settings."""

_OWN_PREFIX = ("LlamaTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer", "DebertaV2Tokenizer")
"""Those of _DIFFERENT_SINCE_5, whose prefix is another component."""


def lower_case(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """sentence-transformers lowers texts itself where its config says so; TEI cannot be told."""
    wanted = next(
        (n for n in model.files if _lowers(model.json(n)) and n.startswith("sentence_")), ""
    )
    tokenizer = model.json(PATH)
    if not wanted or not tokenizer:
        return
    normalizer = tokenizer.get("normalizer")
    if any(_parts(normalizer, "Lowercase")) or any(
        part.get("lowercase") is True for part in _parts(normalizer, "BertNormalizer")
    ):
        return
    first = {"type": "Lowercase"}
    parts = [first, normalizer] if normalizer else [first]
    yield (
        FIXED,
        f"{PATH}: texts are lowered first, as {wanted} says, which TEI does not read.",
        {PATH: {**tokenizer, "normalizer": {"type": "Sequence", "normalizers": parts}}},
    )


def _lowers(config: Mapping[str, Any]) -> bool:
    return config.get("do_lower_case") is True


def special_tokens(model: Model, hardware: Hardware | None) -> Iterator[Result]:
    """add_bos_token and add_eos_token: transformers 4 heeded them, and models were made with it.

    transformers 5 drops both wherever tokenizer.json is there, so a comparison with it sees nothing.
    """
    config, tokenizer = contract.tokenizer_config(model.files), model.json(PATH)
    auto_map = model.config.get("auto_map")
    code = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    if not tokenizer or (model.model_type == "qwen2" and code == "modeling_qwen.Qwen2Model"):
        return  # the exception of TEI's own, which adds the end token (router/src/lib.rs:154-182)
    changed = copy.deepcopy(dict(tokenizer))
    added = []
    for key, name, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        token = _text(config.get(name))
        number = _number(tokenizer, token)
        if config.get(key) is False and number in _ends(tokenizer.get("post_processor"), place):
            yield (
                WARNED,
                f"{CONFIG} says {key}: false, which transformers 4 heeded, and {PATH} adds {token} all the "
                "same, as transformers 5 does: compare vectors with those of the version that the model "
                "was made with.",
            )
        if config.get(key) is not True:
            continue
        if token is None or number is None:
            yield (
                REFUSED,
                f"{CONFIG} asks for {key}, and {PATH} has no {name} to add: save the tokenizer again.",
            )
            return
        if number not in _ends(changed.get("post_processor"), place):
            changed["post_processor"] = _adding(changed.get("post_processor"), token, number, place)
            added.append(name)
    if added:
        yield (
            FIXED,
            f"{PATH}: {' and '.join(added)} is added to every text, as {CONFIG} says, which TEI does not "
            "read.",
            {PATH: changed},
        )


def _class(model: Model) -> str:
    said = (model.json(name).get("tokenizer_class") for name in (CONFIG, "config.json"))
    usual = _BY_MODEL_TYPE.get(model.model_type, "")
    name = next((name for name in said if isinstance(name, str)), usual)
    return name.removesuffix("Fast")


def _parts(component: object, kind: str) -> Iterator[dict[str, Any]]:
    """The component itself and those in a sequence, of one type."""
    if not isinstance(component, dict):
        return
    if component.get("type") == kind:
        yield component
    for key in ("normalizers", "pretokenizers", "processors"):
        inner = component.get(key)
        for part in inner if isinstance(inner, list) else []:
            yield from _parts(part, kind)


def _text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _number(tokenizer: Mapping[str, Any], token: str | None) -> int | None:
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token:
            number = entry.get("id")
            return number if isinstance(number, int) else None
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    number = vocabulary.get(token) if isinstance(vocabulary, dict) else None
    return number if isinstance(number, int) else None


def _ends(processor: object, place: int) -> set[int]:
    """Ids that a text begins (place 0) or ends (place -1) with."""
    found: set[int] = set()
    for template in _parts(processor, "TemplateProcessing"):
        single, known = template.get("single"), template.get("special_tokens")
        piece = single[place] if isinstance(single, list) and single else None
        special = piece.get("SpecialToken") if isinstance(piece, dict) else None
        name = special.get("id") if isinstance(special, dict) else None
        token = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
        ids = token.get("ids") if isinstance(token, dict) else None
        if isinstance(ids, list) and ids:
            found.add(ids[place])
    for kind in ("BertProcessing", "RobertaProcessing"):
        for part in _parts(processor, kind):
            pair = part.get("cls" if place == 0 else "sep")
            if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int):
                found.add(pair[1])
    return found


def _adding(processor: object, token: str, number: int, place: int) -> dict[str, Any]:
    """The post processor, and then one that adds a token."""
    piece: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}

    def around(*sequences: dict[str, Any]) -> list[dict[str, Any]]:
        return [piece, *sequences] if place == 0 else [*sequences, piece]

    template = next(iter(_parts(processor, "TemplateProcessing")), None)
    if template is not None and isinstance(template.get("single"), list):
        # Its own template, so that the parts of a pair stay as they were.
        template["single"] = around(*template["single"])
        template["special_tokens"] = {
            **(template.get("special_tokens") or {}),
            token: {"id": token, "ids": [number], "tokens": [token]},
        }
        return dict(processor) if isinstance(processor, dict) else template
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    new = {
        "type": "TemplateProcessing",
        "single": around(text),
        "pair": around(text, other),
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    if not isinstance(processor, dict):
        return new
    return {"type": "Sequence", "processors": [processor, new]}
