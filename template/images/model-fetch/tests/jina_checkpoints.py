"""Small random jina-embeddings-v3 checkpoints, in the layouts in which the model is published.

Weights are kept under TEI's module names and written under each layout's own. Needs numpy only.

Layouts: `original` is jinaai/jina-embeddings-v3 (parametrizations, all adapters in one file);
`hf` is jinaai/jina-embeddings-v3-hf at d18862d, whose adapters mix native and original names and
have no `base_model.model.` in front (sndcds/uranus-research-encoder, scripts/audit_onnx.py, compares
them name by name); `native` is what transformers and PEFT call everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
FOLDER_NAMES = str.maketrans(".-", "__")
"""From a task's name to its adapter folder's in `hf`."""
LAYOUTS = ("original", "hf", "native")
RANK, ALPHA = 4, 1
STD = 0.3
"""Of the weights and factors: with 0.02 attention is nearly uniform and a wrong rotary base hides."""

CONFIG: dict[str, Any] = {
    "architectures": ["XLMRobertaLoRA"],
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "type_vocab_size": 1,
    "max_position_embeddings": 130,
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20000.0,
    "layer_norm_eps": 1e-05,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "lora_adaptations": list(TASKS),
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
    "torch_dtype": "bfloat16",
    "task_instructions": {
        "retrieval.query": "Represent the query for retrieving evidence documents: ",
        "retrieval.passage": "Represent the document for retrieval: ",
        "separation": "",
        "classification": "",
        "text-matching": "",
    },
}

Array = numpy.ndarray
Tensors = dict[str, Array]


@dataclass
class Checkpoint:
    """A model's numbers, and what its config.json says."""

    config: dict[str, Any]
    tensors: Tensors
    """By TEI's names, the pooler included; float32."""
    adapters: dict[str, dict[str, tuple[Array, Array]]] = field(default_factory=dict)
    """By task and module: (left, right), so that `left @ right * alpha / rank` is added."""


def random_checkpoint(seed: int = 7, **changes: Any) -> Checkpoint:
    """A checkpoint of normally distributed weights, exactly representable in bfloat16."""
    config = CONFIG | changes
    random = numpy.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def normal(*shape: int, mean: float = 0.0) -> Array:
        return bfloat16(mean + STD * random.standard_normal(shape, "f4"))

    matrices = {
        "embeddings.word_embeddings": (config["vocab_size"], hidden),
        "embeddings.token_type_embeddings": (config["type_vocab_size"], hidden),
        "pooler.dense": (hidden, hidden),
    }
    norms = ["emb_ln"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}"
        matrices |= {
            f"{prefix}.attn.Wqkv": (3 * hidden, hidden),
            f"{prefix}.attn.out_proj": (hidden, hidden),
            f"{prefix}.mlp.fc1": (inner, hidden),
            f"{prefix}.mlp.fc2": (hidden, inner),
        }
        norms += [f"{prefix}.norm1", f"{prefix}.norm2"]
    tensors = {f"{name}.weight": normal(*shape) for name, shape in matrices.items()}
    tensors |= {
        f"{name}.bias": normal(shape[0])
        for name, shape in matrices.items()
        if not name.startswith("embeddings.")
    }
    for name in norms:
        tensors |= {f"{name}.weight": normal(hidden, mean=1.0), f"{name}.bias": normal(hidden)}
    adapters = {
        task: {
            name: (normal(shape[0], RANK), normal(RANK, shape[1]))
            for name, shape in matrices.items()
        }
        for task in config["lora_adaptations"]
    }
    return Checkpoint(dict(config), tensors, adapters)


def bfloat16(values: Array) -> Array:
    """The values cut to what bfloat16 can hold, as float32."""
    return (values.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")


def save(checkpoint: Checkpoint, folder: Path, layout: str, dtype: str = "BF16") -> Path:
    """Write a checkpoint in one of LAYOUTS; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(checkpoint.config)
    if layout == "original":
        write_safetensors(folder / "model.safetensors", original_tensors(checkpoint), dtype)
    else:
        config |= {"architectures": ["JinaEmbeddingsV3Model"], "model_type": "jina_embeddings_v3"}
        spelled = native_name if layout == "native" else original_name
        base: Tensors = {}
        for name, values in checkpoint.tensors.items():
            if layout == "native" and ".Wqkv." in name:
                for part, third in zip("qkv", numpy.split(values, 3), strict=True):
                    base[native_name(name).replace("qkv_proj", f"{part}_proj")] = third
            else:
                base[spelled(name)] = values
        write_safetensors(folder / "model.safetensors", base, dtype)
        for task, factors in checkpoint.adapters.items():
            save_peft_adapter(folder / task.translate(FOLDER_NAMES), factors, layout, dtype)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(config["vocab_size"])))
    return folder


def original_name(name: str) -> str:
    """Jina's name of a tensor (without `roberta.`)."""
    return name.replace(".attn.", ".mixer.")


def native_name(name: str) -> str:
    """transformers' name of a tensor; Wqkv, which it stores in three, becomes `qkv_proj`."""
    for ours, theirs in (
        ("emb_ln", "embeddings.LayerNorm"),
        ("encoder.layers", "layers"),
        ("attn.Wqkv", "self_attn.qkv_proj"),
        ("attn.out_proj", "self_attn.o_proj"),
        ("norm1", "post_attention_layernorm"),
        ("norm2", "post_mlp_layernorm"),
    ):
        name = name.replace(ours, theirs)
    return name


def original_tensors(checkpoint: Checkpoint) -> Tensors:
    """Every tensor of the published layout, by its published name."""
    tensors: Tensors = {}
    adapted = next(iter(checkpoint.adapters.values()))
    for name, values in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in adapted:
            tensors[f"roberta.{original_name(name)}"] = values
            continue
        prefix = f"roberta.{original_name(module)}.parametrizations.weight"
        left = numpy.stack([factors[module][0] for factors in checkpoint.adapters.values()])
        right = numpy.stack([factors[module][1] for factors in checkpoint.adapters.values()])
        a, b = (left, right) if module.startswith("embeddings.") else (right, left)
        tensors |= {f"{prefix}.original": values, f"{prefix}.0.lora_A": a, f"{prefix}.0.lora_B": b}
    return tensors


def save_peft_adapter(
    folder: Path, factors: Mapping[str, tuple[Array, Array]], layout: str, dtype: str = "BF16"
) -> None:
    """Write one adapter as PEFT does: a linear layer's A and B, an embedding's both transposed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    for module, (left, right) in factors.items():
        prefix = "base_model.model." if layout == "native" else ""
        name = prefix + (native_name if layout == "native" else original_name)(module)
        if module.startswith("embeddings."):
            tensors |= {f"{name}.lora_embedding_A": left.T, f"{name}.lora_embedding_B": right.T}
        elif module.endswith(".Wqkv"):
            name = name.replace("mixer.Wqkv", "self_attn.qkv_proj")
            for part, third in zip("qkv", numpy.split(left, 3), strict=True):
                split = name.replace("qkv_proj", f"{part}_proj")
                tensors |= {f"{split}.lora_A.weight": right, f"{split}.lora_B.weight": third}
        else:
            tensors |= {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    # jinaai/jina-embeddings-v3-hf's own adapter_config.json says no more than this.
    modules = ["word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj"]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": [*modules, "fc1", "fc2", "dense"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str = "F32") -> None:
    """Write a safetensors file of one type; independent of the code under test."""
    header, parts, end = {}, [], 0
    for name, values in tensors.items():
        values = numpy.ascontiguousarray(values, "<f4")
        if dtype == "BF16":
            content = (values.view("<u4") >> 16).astype("<u2").tobytes()
        else:
            content = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [end, end + len(content)],
        }
        parts.append(content)
        end += len(content)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(parts))


def read_safetensors(path: Path) -> Tensors:
    """All tensors of a float32 or float16 file, as float32; independent of the code under test."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        stored = numpy.frombuffer(content[first:last], {"F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        tensors[name] = stored.astype("<f4").reshape(entry["shape"])
    return tensors


def merged(checkpoint: Checkpoint, task: str) -> Tensors:
    """What the conversion must write, computed at once in float64."""
    tensors = {}
    for name, values in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if module == "pooler.dense":
            continue
        values = values.astype("f8")
        if kind == "weight" and module in checkpoint.adapters[task]:
            left, right = checkpoint.adapters[task][module]
            values = values + left.astype("f8") @ right.astype("f8") * ALPHA / RANK
        tensors[name] = values.astype("f4")
    return tensors


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A tokenizer.json of whole words w0, w1 …, framed as XLM-RoBERTa frames a text."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(vocab_size - 4))]
    special = [{"id": i, "content": words[i], "special": True, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False} for i in range(4)]  # fmt: skip
    frame = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "</s>", "type_id": 0}}]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": [*frame, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                name: {"id": name, "ids": [words.index(name)], "tokens": [name]}
                for name in ("<s>", "</s>")
            },
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
