"""How jina-embeddings-v3 is stored: one base model, and low-rank adapters for five tasks.

Three ways are known. Published: each weight with the factors of all adapters beside it
(parametrizations). `-hf`: a base model under the original names, and one PEFT adapter folder per task.
Saved again by transformers: the same under its own names, with q, k and v apart. Whatever the names,
everything is told under the names that TEI uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tensors
from .errors import UnsuitableModelError
from .tensors import StoredTensor

if TYPE_CHECKING:
    import numpy

POOLER = "pooler.dense"
"""Of the first token; mean pooling has no use for it, so it is left out."""

PARAMETRIZED = re.compile(r"(.+)\.parametrizations\.weight\.(original|0\.lora_A|0\.lora_B)")
_PEFT_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

_RENAMED = (
    (re.compile(r"^(base_model\.model\.)?(roberta\.)?"), ""),
    (re.compile(r"^layers\."), "encoder.layers."),
    (re.compile(r"^embeddings\.LayerNorm$"), "emb_ln"),
    (re.compile(r"\.(mixer|self_attn)\."), ".attn."),
    (re.compile(r"\.o_proj$"), ".out_proj"),
    (re.compile(r"\.post_attention_layernorm$"), ".norm1"),
    (re.compile(r"\.post_mlp_layernorm$"), ".norm2"),
)
"""From every spelling seen (Jina's, transformers', PEFT's, and mixtures of them: the adapters of
jinaai/jina-embeddings-v3-hf say `self_attn.q_proj` beside `mixer.out_proj`) to TEI's."""

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one weight: `left @ right * scaling`."""

    left: numpy.ndarray
    """float32, of shape (rows of the weight, rank)."""
    right: numpy.ndarray
    """float32, of shape (rank, columns of the weight)."""
    scaling: float


Base = dict[str, dict[str, tuple[StoredTensor, ...]]]
"""TEI's module name -> `weight` or `bias` -> the stored tensors that make it up."""


def _module_name(name: str) -> tuple[str, int | None]:
    """TEI's name of a module, and which third of Wqkv it is (None: the whole)."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name, count=1)
    head, _, last = name.rpartition(".")
    return (f"{head}.Wqkv", _QKV.index(last)) if last in _QKV else (name, None)


def parametrized(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], task: str
) -> tuple[Base, dict[str, Delta]]:
    """The published layout: each weight with the factors of all adapters beside it."""
    adapters: Any = config.get("lora_adaptations")
    rank: Any = config.get("lora_rank")
    alpha: Any = config.get("lora_alpha")
    if not isinstance(adapters, list) or not _is_positive(rank, int) or not _is_positive(alpha):
        raise UnsuitableModelError(
            "config.json lacks lora_adaptations, lora_rank or lora_alpha, so the adapters in the"
            " weights cannot be told apart."
        )
    if task not in adapters:
        raise _no_adapter(task, adapters)
    index = adapters.index(task)
    plain: dict[str, StoredTensor] = {}
    factors: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        match = PARAMETRIZED.fullmatch(name)
        if match is None:
            _add(plain, name, tensor)
        elif match[2] == "original":
            _add(plain, f"{match[1]}.weight", tensor)
        else:
            _add(factors.setdefault(_module_name(match[1])[0], {}), match[2][-1], tensor)
    deltas = {}
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise lacking([f"{module}'s lora_{'B' if 'A' in pair else 'A'}"])
        for tensor in pair.values():
            if len(tensor.shape) != 3 or tensor.shape[0] != len(adapters):
                raise UnsuitableModelError(
                    f"The tensor {tensor.name} has the shape {list(tensor.shape)}, which does not"
                    f" hold the {len(adapters)} adapters of config.json."
                )
        # An embedding's rows are tokens, which A has; a linear layer's are outputs, which B has.
        left, right = ("A", "B") if module.startswith("embeddings.") else ("B", "A")
        deltas[module] = Delta(
            _factor(pair[left], index, (None, rank)),
            _factor(pair[right], index, (rank, None)),
            alpha / rank,
        )
    return base_model(plain)[0], deltas


def _factor(
    tensor: StoredTensor, index: int, wanted: tuple[int | None, int | None]
) -> numpy.ndarray:
    """One adapter's factor out of those stored together, as a matrix."""
    rows, columns = tensor.shape[1:]
    if wanted[0] not in (None, rows) or wanted[1] not in (None, columns):
        raise UnsuitableModelError(
            f"The tensor {tensor.name} has the shape {list(tensor.shape)}, which is not one of rank"
            f" {wanted[0] or wanted[1]}."
        )
    return _finite(tensor, tensor.read(index, index + 1).reshape(rows, columns))


def base_model(stored: Mapping[str, StoredTensor]) -> tuple[Base, str]:
    """The base model of the `-hf` layout, and whether its names are original or native."""
    parts: dict[str, dict[str, dict[int | None, StoredTensor]]] = {}
    native = False
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        module, part = _module_name(module)
        native |= part is not None
        _add(parts.setdefault(module, {}).setdefault(kind, {}), part, tensor)
    base: Base = {}
    for module, kinds in parts.items():
        for kind, found in kinds.items():
            if None in found and len(found) == 1:
                base.setdefault(module, {})[kind] = (found[None],)
            elif set(found) == {0, 1, 2}:
                base.setdefault(module, {})[kind] = (found[0], found[1], found[2])
            elif None in found:
                raise UnsuitableModelError(f"{module}.{kind} is stored twice, whole and in parts.")
            else:
                raise lacking(
                    [f"{module}'s {name}.{kind}" for i, name in enumerate(_QKV) if i not in found]
                )
    return base, "native" if native else "original"


def adapter_folder(source: Path, task: str) -> Path:
    """The folder of the task's PEFT adapter; `-hf` calls retrieval.query retrieval_query."""
    folders = {
        path.parent.name: path.parent for path in sorted(source.glob("*/adapter_config.json"))
    }
    if not folders:
        raise UnsuitableModelError(
            "The checkpoint has neither adapters in its weights (parametrizations) nor adapter"
            " folders (adapter_config.json): register jinaai/jina-embeddings-v3 or"
            " jinaai/jina-embeddings-v3-hf with all its files."
        )
    for name in (task, re.sub(r"[^a-z0-9]", "_", task)):
        if name in folders:
            return folders[name]
    raise _no_adapter(task, list(folders))


def peft_adapter(folder: Path, hidden_size: int) -> dict[str, Delta]:
    """The changes that one PEFT adapter makes."""
    import numpy

    config = read_json(folder / "adapter_config.json")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    unknown = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern",
               "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication")
               if config.get(key)]  # fmt: skip
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    plain = config.get("peft_type") == "LORA" and _is_positive(rank, int) and _is_positive(alpha)
    if not plain or unknown:
        raise UnsuitableModelError(
            f"{folder.name}/adapter_config.json is not a plain LoRA with r and lora_alpha"
            + (f" ({', '.join(unknown)})." if unknown else ".")
        )
    stored = tensors.read_headers(folder, "adapter_model")
    pairs: dict[tuple[str, int | None], dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in stored.items():
        match = _PEFT_FACTOR.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            _add(pairs.setdefault(_module_name(match[1]), {}), match[2], tensor)
    if unknown:
        raise unfamiliar(unknown)
    deltas, thirds = {}, {}
    for (module, part), pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise lacking([f"{folder.name}: {module}'s lora_{'B' if 'A' in pair else 'A'}"])
        for factor, dimension in (("A", 0), ("B", 1)):
            shape = pair[factor].shape
            if len(shape) != 2 or shape[dimension] != rank:
                raise UnsuitableModelError(
                    f"The tensor {pair[factor].name} has the shape {list(shape)}, which is not one"
                    f" of rank {rank}."
                )
        a, b = (_finite(pair[factor], pair[factor].read()) for factor in "AB")
        if module.startswith("embeddings."):
            a, b = b.T, a.T  # PEFT stores an embedding's factors transposed
        if part is None:
            deltas[module] = Delta(b, a, alpha / rank)
        else:
            thirds[module, part] = (b, a)
    for module in dict.fromkeys(module for module, _ in thirds):
        if module in deltas or any((module, part) not in thirds for part in range(3)):
            raise lacking([f"{folder.name}: {module}'s q_proj, k_proj and v_proj, all three"])
        left = numpy.zeros((3 * hidden_size, 3 * rank), "<f4")
        for part in range(3):
            b = thirds[module, part][0]
            if b.shape[0] != hidden_size:
                raise misshapen(f"{module}'s lora_B", b.shape, (hidden_size, rank))
            left[part * hidden_size : (part + 1) * hidden_size, part * rank : (part + 1) * rank] = b
        right = numpy.concatenate([thirds[module, part][1] for part in range(3)])
        deltas[module] = Delta(left, right, alpha / rank)
    return deltas


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsuitableModelError(f"There is no {path.name} beside the weights.") from None
    except ValueError:
        raise UnsuitableModelError(f"{path.name} is not JSON: register the model again.") from None
    if not isinstance(content, dict):
        raise UnsuitableModelError(f"{path.name} is not a JSON object.")
    return content


def _finite(tensor: StoredTensor, values: numpy.ndarray) -> numpy.ndarray:
    import numpy

    if not numpy.isfinite(values).all():
        raise UnsuitableModelError(
            f"The tensor {tensor.name} holds NaN or infinity: the checkpoint is damaged."
        )
    return values


def _no_adapter(task: str, adapters: list[Any]) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"The checkpoint has no adapter {task}; it has {', '.join(map(str, adapters)) or 'none'}."
    )


def _is_positive(value: object, kind: type | tuple[type, ...] = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < float("inf")  # type: ignore[operator]


def _add(found: dict[Any, StoredTensor], key: Any, tensor: StoredTensor) -> None:
    """Keep a tensor under its key, unless another one says the same in other words."""
    if key in found:
        raise UnsuitableModelError(
            f"The tensors {found[key].name} and {tensor.name} are the same weight twice."
        )
    found[key] = tensor


def _named(names: Iterable[str]) -> str:
    """Up to three names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def lacking(names: Iterable[str]) -> UnsuitableModelError:
    return UnsuitableModelError(f"The checkpoint lacks {_named(names)}.")


def unfamiliar(names: Iterable[str]) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"The checkpoint holds {_named(names)}, which jina-embeddings-v3 does not have."
    )


def misshapen(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{name} has the shape {list(shape)}; config.json makes it {list(wanted)}."
    )
