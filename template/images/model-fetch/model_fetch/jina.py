"""jina-embeddings-v3, converted into a model that TEI serves as `nomic_bert`.

TEI has no implementation of it (TEI #418, #571). Its encoder is what TEI calls nomic_bert, though:
post-norm layers, rotary positions over whole heads, a plain GELU MLP, biases everywhere. One task's
LoRA adapter is merged into the weights, the tensors are renamed, and a new config.json says so.

Sources: Jina's modeling_lora.py (how an adapter is applied), PEFT's LoRA layers (the same for
adapter folders), TEI backends/candle/src/models/nomic.rs at 0d124dc (names, config, checks).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tensors, volume
from .errors import ConfigurationError, UnsuitableModelError
from .jina_layouts import (
    PARAMETRIZED,
    POOLER,
    Base,
    Delta,
    adapter_folder,
    base_model,
    lacking,
    misshapen,
    parametrized,
    peft_adapter,
    read_json,
    unfamiliar,
)
from .pin import JINA_V3
from .tensors import StoredTensor

if TYPE_CHECKING:
    import numpy

KIND = JINA_V3
"""The name of this conversion in a pin."""

TASK_INSTRUCTIONS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}
"""The published adapters, in their published order, and what is put before each text
(`lora_adaptations` and `task_instructions` of the model's config.json)."""

LICENSE = "cc-by-nc-4.0"
"""Of the published weights, and so of a merged copy."""

STORED_TYPES = {"float16": "F16", "float32": "F32"}
"""What the converted weights may be. bfloat16 would round most of an adapter's change away."""

FLOAT16_MAX = 65504.0


def convert(
    source: Path, task: str, destination: Path, *, dtype: str = "float16"
) -> dict[str, Any]:
    """Write what TEI needs to serve `source` with the adapter of `task`.

    Args:
        source: folder with the checkpoint: parametrized weights as published, or a base model with
            one PEFT adapter folder per task. Never written to.
        task: the adapter's name, such as retrieval.passage.
        destination: an empty or absent folder of the caller's own. Its model.safetensors appears
            last and whole.
        dtype: float16 or float32, of the written weights.

    Returns: what was done, fit for JSON.
    Raises: UnsuitableModelError, one sentence, when the checkpoint is not exactly what is expected;
        ConfigurationError for a wrong `dtype`.
    """
    if dtype not in STORED_TYPES:
        raise ConfigurationError(f"The conversion writes float16 or float32, not {dtype}.")
    if destination.exists() and any(destination.iterdir()):
        raise ConfigurationError(
            f"The folder for the converted model, {destination}, is not empty."
        )
    config = read_json(source / "config.json")
    architecture = Architecture.from_config(config)
    stored = tensors.read_headers(source)
    if architecture.layers > len(stored):
        raise lacking([f"encoder.layers.{architecture.layers - 1}"])
    if any(PARAMETRIZED.fullmatch(name) for name in stored):
        layout = "adapters as parametrizations of the weights"
        base, deltas = parametrized(stored, config, task)
    else:
        folder = adapter_folder(source, task)
        base, names = base_model(stored)
        layout = f"a base model with {names} names and the adapter folder {folder.name}"
        deltas = peft_adapter(folder, architecture.hidden_size)
    weights = _weights(architecture, base, deltas)

    destination.mkdir(parents=True, exist_ok=True)
    prompt = _instruction(source, config, task)
    _copy_tokenizer(source, destination, architecture)
    for name, content in _small_files(architecture, task, prompt, dtype).items():
        (destination / name).parent.mkdir(exist_ok=True)
        volume.write_whole(destination / name, f"{json.dumps(content, indent=2)}\n".encode())
    tensors.write(
        destination / "model.safetensors",
        {weight.name: weight.shape for weight in weights},
        (block for weight in weights for block in weight.blocks(dtype)),
        STORED_TYPES[dtype],
    )
    return {
        "kind": KIND,
        "task": task,
        "prompt": prompt,
        "layout": layout,
        "dtype": dtype,
        "scaling": next(iter(deltas.values())).scaling,
        "tensors_read": len(stored),
        "tensors_written": len(weights),
        "weights_changed": sum(weight.delta is not None for weight in weights),
        "parameters": sum(math.prod(weight.shape) for weight in weights),
        "left_out": sorted(f"{POOLER}.{kind}" for kind in base.get(POOLER, {})),
        "license": LICENSE,
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that fix the shape of every tensor."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    token_types: int
    positions: int
    """Tokens that can be told apart: the longest input."""
    rotary_base: float
    layer_norm_epsilon: float
    special_tokens: Mapping[str, int]
    """pad_token_id, bos_token_id, eos_token_id, as far as config.json has them."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read config.json of either layout.

        Raises: UnsuitableModelError when it is another model, or a number is missing: a guess
            would give wrong vectors, not an error.
        """
        names = config.get("architectures")
        jina = (
            config.get("model_type") == "jina_embeddings_v3"
            or (isinstance(names, list) and "XLMRobertaLoRA" in names)
            or bool(config.get("lora_adaptations"))
        )
        if not jina:
            raise UnsuitableModelError(
                "config.json is not jina-embeddings-v3's: it names neither XLMRobertaLoRA nor"
                " jina_embeddings_v3 nor any lora_adaptations."
            )
        positions = config.get("position_embedding_type", "rotary")
        if positions != "rotary" and config.get("model_type") != "jina_embeddings_v3":
            raise UnsuitableModelError(
                f"config.json says position_embedding_type {positions}; jina-embeddings-v3 has rotary."
            )
        if config.get("hidden_act", "gelu") != "gelu":
            raise UnsuitableModelError(
                f"config.json says hidden_act {config['hidden_act']}; jina-embeddings-v3 has gelu."
            )
        architecture = cls(
            layers=_whole_number(config, "num_hidden_layers"),
            hidden_size=_whole_number(config, "hidden_size"),
            heads=_whole_number(config, "num_attention_heads"),
            intermediate_size=_whole_number(config, "intermediate_size"),
            vocab_size=_whole_number(config, "vocab_size"),
            token_types=_whole_number(config, "type_vocab_size"),
            # XLM-RoBERTa sets pad_token_id + 1 positions aside; rotary ones start at 0.
            positions=_whole_number(config, "max_position_embeddings")
            - _whole_number(config, "pad_token_id")
            - 1,
            rotary_base=_rotary_base(config),
            layer_norm_epsilon=_number(config, "layer_norm_eps"),
            special_tokens={
                key: config[key]
                for key in ("pad_token_id", "bos_token_id", "eos_token_id")
                if isinstance(config.get(key), int)
            },
        )
        heads = architecture.heads
        if not heads or architecture.hidden_size % (2 * heads):
            raise UnsuitableModelError(
                f"config.json says hidden_size {architecture.hidden_size} and {heads} heads, which do"
                " not go together."
            )
        return architecture

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that TEI reads, with its shape, in the order in which they are written."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "embeddings.token_type_embeddings.weight": (self.token_types, hidden),
            "emb_ln.weight": (hidden,),
            "emb_ln.bias": (hidden,),
        }
        for layer in range(self.layers):
            for module, rows, columns in (
                ("attn.Wqkv", 3 * hidden, hidden),
                ("attn.out_proj", hidden, hidden),
                ("mlp.fc1", inner, hidden),
                ("mlp.fc2", hidden, inner),
            ):
                shapes[f"encoder.layers.{layer}.{module}.weight"] = (rows, columns)
                shapes[f"encoder.layers.{layer}.{module}.bias"] = (rows,)
            for norm in ("norm1", "norm2"):
                shapes[f"encoder.layers.{layer}.{norm}.weight"] = (hidden,)
                shapes[f"encoder.layers.{layer}.{norm}.bias"] = (hidden,)
        return shapes

    def tei_config(self, dtype: str) -> dict[str, Any]:
        """config.json for TEI's nomic_bert (nomic.rs:12-45: every key but the last few is required)."""
        return {
            "architectures": ["NomicBertModel"],
            "model_type": "nomic_bert",
            "prenorm": False,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_base": self.rotary_base,
            "rotary_emb_interleaved": False,
            "rotary_scaling_factor": None,
            "qkv_proj_bias": True,
            "mlp_fc1_bias": True,
            "mlp_fc2_bias": True,
            "activation_function": "gelu",
            "n_embd": self.hidden_size,
            "n_head": self.heads,
            "n_inner": self.intermediate_size,
            "n_layer": self.layers,
            "n_positions": self.positions,
            "max_position_embeddings": self.positions,
            "vocab_size": self.vocab_size,
            "type_vocab_size": self.token_types,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            **self.special_tokens,
            "torch_dtype": dtype,
        }


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor to write: stored tensors below each other, plus an adapter's change."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    """One, or q, k and v, which TEI wants as one."""
    delta: Delta | None

    def blocks(self, dtype: str) -> Iterator[numpy.ndarray]:
        """Blocks of rows, merged in float32 and then rounded to `dtype`.

        Raises: UnsuitableModelError for NaN, infinity, or a value that float16 cannot hold.
        """
        import numpy

        first_of_part = 0
        for part in self.parts:
            for first, last in tensors.row_blocks(part.shape):
                block = part.read(first, last)
                if self.delta is not None:
                    rows = slice(first_of_part + first, first_of_part + last)
                    block += self.delta.left[rows] @ self.delta.right * self.delta.scaling
                largest = float(numpy.abs(block).max(initial=0.0))
                if not math.isfinite(largest):
                    raise UnsuitableModelError(
                        f"The weight {part.name} holds NaN or infinity: the checkpoint is damaged."
                    )
                if dtype == "float16" and largest > FLOAT16_MAX:
                    raise UnsuitableModelError(
                        f"The weight {part.name} holds {largest:.4g}, beyond float16's"
                        f" {FLOAT16_MAX:.0f}: convert it to float32 and serve it on a CPU."
                    )
                yield block.astype("<f2" if dtype == "float16" else "<f4", copy=False)
            first_of_part += part.rows


def _weights(architecture: Architecture, base: Base, deltas: Mapping[str, Delta]) -> list[Weight]:
    """Match what is stored with what TEI reads, to the last tensor.

    Raises: UnsuitableModelError that names what is missing, unknown or of the wrong shape.
    """
    shapes = architecture.shapes()
    found = {f"{module}.{kind}" for module, kinds in base.items() for kind in kinds}
    if unknown := [name for name in found - set(shapes) if not name.startswith(f"{POOLER}.")]:
        raise unfamiliar(unknown)
    if missing := set(shapes) - found:
        raise lacking(missing)
    adapted = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    if unadapted := adapted - set(deltas):
        raise lacking(f"the adapter of {module}" for module in unadapted)
    if unexpected := set(deltas) - adapted - {POOLER}:
        raise unfamiliar(f"the adapter of {module}" for module in unexpected)
    weights = []
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        parts = base[module][kind]
        for part in parts:
            wanted = (shape[0] // len(parts), *shape[1:])
            if part.shape != wanted:
                raise misshapen(part.name, part.shape, wanted)
        delta = deltas[module] if kind == "weight" and len(shape) == 2 else None
        if delta is not None and (delta.left.shape[0], delta.right.shape[1]) != shape:
            changed = (delta.left.shape[0], delta.right.shape[1])
            raise misshapen(f"the adapter of {module}", changed, shape)
        weights.append(Weight(name, shape, parts, delta))
    return weights


def _number(config: Mapping[str, Any], key: str) -> float:
    """A number of config.json; never a default, which could be wrong without anyone noticing."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UnsuitableModelError(f"config.json must give {key} as a number, not {value!r:.40}.")
    return float(value)


def _whole_number(config: Mapping[str, Any], key: str) -> int:
    number = _number(config, key)
    if not number.is_integer() or number < 0:
        raise UnsuitableModelError(f"config.json must give {key} as a count, not {number}.")
    return int(number)


def _rotary_base(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, 20000 in the published model.

    Raises: UnsuitableModelError when config.json leaves it open: libraries' defaults differ (Jina's
        code 10000, transformers' nomic_bert 1000), and a wrong one only shows in the vectors.
    """
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}
    if rope.get("rope_type", "default") != "default":
        raise UnsuitableModelError(
            f"config.json asks for {rope['rope_type']} rotary positions, which this conversion"
            " does not carry over."
        )
    said = {
        _number(place, key)
        for place, key in ((rope, "rope_theta"), (config, "rotary_emb_base"))
        if place.get(key) is not None
    }
    if len(said) != 1:
        raise UnsuitableModelError(
            "config.json must say one base of the rotary positions (rotary_emb_base or"
            f" rope_parameters.rope_theta), but says {sorted(said) or 'none'}."
        )
    return said.pop()


def _instruction(source: Path, config: Mapping[str, Any], task: str) -> str:
    """What is put before each text for this task, as the checkpoint says or else as published."""
    said = config.get("task_instructions")
    if not isinstance(said, dict) and (source / "config_sentence_transformers.json").is_file():
        said = read_json(source / "config_sentence_transformers.json").get("prompts")
    if not isinstance(said, dict) or not isinstance(said.get(task), str):
        said = TASK_INSTRUCTIONS
    return str(said.get(task, ""))


def _small_files(
    architecture: Architecture, task: str, prompt: str, dtype: str
) -> dict[str, dict[str, Any]]:
    """The JSON files of the converted folder, by path. There is no modules.json: no Dense module."""
    return {
        "config.json": architecture.tei_config(dtype),
        "1_Pooling/config.json": {
            "word_embedding_dimension": architecture.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {
            "max_seq_length": architecture.positions,
            "do_lower_case": False,
        },
        # Only the merged task's: another one's prefix would meet the wrong weights.
        "config_sentence_transformers.json": {"prompts": {task: prompt} if prompt else {}},
    }


def _copy_tokenizer(source: Path, destination: Path, architecture: Architecture) -> None:
    """Copy tokenizer.json, unchanged, if its ids fit the embedding tables."""
    path = source / "tokenizer.json"
    if not path.is_file():
        raise UnsuitableModelError(
            "There is no tokenizer.json beside the weights, and TEI reads no other tokenizer:"
            " register the model with it."
        )
    tokenizer = read_json(path)
    model, processor = tokenizer.get("model"), tokenizer.get("post_processor")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, (dict, list)) or not vocabulary:
        raise UnsuitableModelError("tokenizer.json has no vocabulary: register the model again.")
    if len(vocabulary) > architecture.vocab_size:
        raise UnsuitableModelError(
            f"tokenizer.json has {len(vocabulary)} tokens, the model's table only"
            f" {architecture.vocab_size}: they do not belong together."
        )
    single = processor.get("single") if isinstance(processor, dict) else None
    pieces = [
        piece
        for step in (single if isinstance(single, list) else [])
        for piece in (step.values() if isinstance(step, dict) else [])
    ]
    types = [piece.get("type_id", 0) for piece in pieces if isinstance(piece, dict)]
    types = [type_id for type_id in types if isinstance(type_id, int)]
    if max(types, default=0) >= architecture.token_types:
        raise UnsuitableModelError(
            f"tokenizer.json gives the token type {max(types)}, but the model has only"
            f" {architecture.token_types}."
        )
    volume.write_whole(destination / "tokenizer.json", path.read_bytes())
