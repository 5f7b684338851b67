"""Model folders as the Hugging Face Hub has them: real configuration, tiny random weights.

python -m tests.models.folders nomic-ai/nomic-embed-text-v1.5 /tmp/model
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL_FETCH_TESTS = HERE.parents[1] / "template/images/model-fetch/tests"

MODEL_IDS = (
    "nomic-ai/nomic-embed-text-v1.5",
    "BAAI/bge-base-en-v1.5",
    "BAAI/bge-large-en-v1.5",
    "Alibaba-NLP/gte-large-en-v1.5",
    "jinaai/jina-embeddings-v2-base-code",
    "jinaai/jina-embeddings-v3",
    "Qwen/Qwen3-Embedding-0.6B",
    "Qwen/Qwen3-Embedding-4B",
)
JINA_V3 = "jinaai/jina-embeddings-v3"
SHARDED = ("Qwen/Qwen3-Embedding-4B",)
"""Published as several files with an index."""

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}


def configs(model_id: str) -> dict[str, Any]:
    """The parsed JSON files of a model, by path."""
    folder = HERE / model_id.replace("/", "-")
    paths = sorted(path for path in folder.rglob("*.json"))
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in paths}


def files(model_id: str) -> dict[str, Any]:
    """What compatibility.check takes: the parsed files, and the others' names with None."""
    names = ["tokenizer.json"]
    if model_id in SHARDED:
        shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        index = {"weight_map": {"a": shards[0], "b": shards[1]}}
        return (
            configs(model_id)
            | {"model.safetensors.index.json": index}
            | dict.fromkeys([*names, *shards])
        )
    return configs(model_id) | dict.fromkeys([*names, "model.safetensors"])


def saved_by_sentence_transformers_5_4(model: dict[str, Any]) -> None:
    """Change the parsed files into what sentence-transformers ≥ 5.4 writes, with transformers ≥ 5.

    Seen with 6.2.0 and 5.23.0, on a BERT and a Qwen3.
    """
    config = model["config.json"]
    if config["model_type"] == "qwen3":
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
        del config["rope_scaling"]
        config |= {"architectures": ["Qwen3Model"], "dtype": config.pop("torch_dtype")}
    pooling = model["1_Pooling/config.json"]
    mode = next(
        key for key, on in pooling.items() if on is True and key.startswith("pooling_mode_")
    )
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}
    model["1_Pooling/config.json"] = {
        "embedding_dimension": pooling["word_embedding_dimension"],
        "pooling_mode": names[mode.removeprefix("pooling_mode_")],
        "include_prompt": True,
    }
    model["sentence_bert_config.json"] = {
        "transformer_task": "feature-extraction",
        "modality_config": {},
        "module_output_name": "token_embeddings",
    }
    model["tokenizer_config.json"] = {"model_max_length": 400}
    paths = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    for module in model["modules.json"]:
        module["type"] = paths[module["type"].rpartition(".")[2]]
    model["config_sentence_transformers.json"] = {"prompts": {"document": "", "query": ""}}


def write(model_id: str, folder: Path, *, saved_again: bool = False) -> Path:
    """Write the model's folder; returns it.

    Args: saved_again: the small files as sentence-transformers ≥ 5.4 writes them.

    The weights are a few numbers under each of the real tensor names. jina-embeddings-v3, which is
    converted, gets a small model whose shapes agree with its config.json (needs numpy).
    """
    content = configs(model_id)
    folder.mkdir(parents=True, exist_ok=True)
    if saved_again:
        saved_by_sentence_transformers_5_4(content)
    if model_id == JINA_V3:
        sys.path.insert(0, str(MODEL_FETCH_TESTS))
        import jina_checkpoints

        small = jina_checkpoints.random_checkpoint()
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "vocab_size", "max_position_embeddings")  # fmt: skip
        small.config = content["config.json"] | {key: small.config[key] for key in sizes}
        jina_checkpoints.save(small, folder, "original")
        content["config.json"] = small.config
    else:
        _write_json(folder / "tokenizer.json", TOKENIZER)
        names = list(tensor_names(model_id))
        if model_id in SHARDED:
            half = len(names) // 2
            shards = {
                "model-00001-of-00002.safetensors": names[:half],
                "model-00002-of-00002.safetensors": names[half:],
            }
            index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
            _write_json(folder / "model.safetensors.index.json", index)
        else:
            shards = {"model.safetensors": names}
        for shard, part in shards.items():
            (folder / shard).write_bytes(safetensors(part))
    for path, value in content.items():
        _write_json(folder / path, value)
    return folder


def tensor_names(model_id: str) -> Iterable[str]:
    """The names under which TEI looks for the model's weights (TEI backends/candle/src/models)."""
    config = configs(model_id)["config.json"]
    kind = config["model_type"] if config["architectures"][0] != "JinaBertForMaskedLM" else "jina"
    outer, layer, inner = _NAMES[kind]
    yield from outer
    for index in range(config.get("num_hidden_layers", config.get("n_layer"))):
        yield from (f"{layer}.{index}.{name}" for name in inner)


def _both(*modules: str) -> list[str]:
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _weights(*modules: str) -> list[str]:
    return [f"{module}.weight" for module in modules]


_ATTENTION = [f"attention.self.{name}" for name in ("query", "key", "value")]
_NAMES: dict[str, tuple[list[str], str, list[str]]] = {
    "nomic_bert": (
        _weights("embeddings.word_embeddings", "embeddings.token_type_embeddings")
        + _both("emb_ln"),
        "encoder.layers",
        _weights("attn.Wqkv", "attn.out_proj", "mlp.fc11", "mlp.fc12", "mlp.fc2")
        + _both("norm1", "norm2"),
    ),
    "bert": (
        _weights(*(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")))
        + _both("embeddings.LayerNorm", "pooler.dense"),
        "encoder.layer",
        _both(
            *_ATTENTION,
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "jina": (
        _weights("embeddings.word_embeddings", "embeddings.token_type_embeddings")
        + _both("embeddings.LayerNorm"),
        "encoder.layer",
        _both(
            *_ATTENTION,
            "attention.self.layer_norm_q",
            "attention.self.layer_norm_k",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "mlp.down_layer",
            "layer_norm_1",
            "layer_norm_2",
        )
        + _weights("mlp.up_gated_layer"),
    ),
    "new": (
        _weights("embeddings.word_embeddings", "embeddings.token_type_embeddings")
        + _both("embeddings.LayerNorm"),
        "encoder.layer",
        _both("attention.qkv_proj", "attention.o_proj", "mlp.down_proj", "attn_ln", "mlp_ln")
        + _weights("mlp.up_gate_proj"),
    ),
    "qwen3": (
        _weights("embed_tokens", "norm"),
        "layers",
        _weights(
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"self_attn.{name}" for name in ("q_norm", "k_norm")),
            *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
            "input_layernorm",
            "post_attention_layernorm",
        ),
    ),
}


def safetensors(names: Iterable[str]) -> bytes:
    """A safetensors file with two by two random float32 numbers under each name."""
    header, data, chance = {}, b"", random.Random(5)
    for name in names:
        numbers = struct.pack("<4f", *(chance.gauss(0, 1) for _ in range(4)))
        offsets = [len(data), len(data) + len(numbers)]
        header[name] = {"dtype": "F32", "shape": [2, 2], "data_offsets": offsets}
        data += numbers
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
