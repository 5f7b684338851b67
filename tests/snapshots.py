"""Small models for tests: the files of a Hugging Face snapshot, and how they get into MLflow."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from demo import registry

REVISION = "0123456789abcdef0123456789abcdef01234567"
"""Commit that the made-up mirror claims."""

LAYOUTS = ("mirror", "sentence-transformers", "checkpoint", "pipeline")
KINDS = ("run", "logged-model")

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "torch_dtype": "float32",
}


def safetensors(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    """A float32 safetensors file of zeros with these shapes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


def snapshot(folder: Path, sidecars: bool = True, **config: Any) -> Path:
    """Write a tiny BERT as the Hugging Face Hub has it, with much that TEI never reads."""
    files: dict[str, Any] = {
        "config.json": CONFIG | config,
        "tokenizer.json": {"version": "1.0", "model": {"type": "WordLevel", "vocab": {}}},
        "tokenizer_config.json": {"model_max_length": 64},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {
                "idx": 1,
                "name": "1",
                "path": "1_Pooling",
                "type": "sentence_transformers.models.Pooling",
            },
            {
                "idx": 2,
                "name": "2",
                "path": "2_Normalize",
                "type": "sentence_transformers.models.Normalize",
            },
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 8,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}},
    }
    for path, value in files.items():
        write(folder / path, json.dumps(value))
    write(folder / "model.safetensors", safetensors({"embeddings.weight": (30, 8), "bias": (8,)}))
    for path in ("onnx/model.onnx", "tf_model.h5", "pytorch_model.bin", "README.md", "vocab.txt"):
        write(folder / path, f"{path}: not for TEI")
    if sidecars:
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            name = path.relative_to(folder)
            metadata = folder / ".cache/huggingface/download" / f"{name}.metadata"
            write(metadata, f"{REVISION}\n{etag(path)}\n1760000000.0\n")
    return folder


def etag(path: Path) -> str:
    """What the Hub gives: SHA-256 of a large file, the SHA-1 of Git's blob of a small one."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def write(path: Path, content: str | bytes) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lay_out(source: Path, layout: str, folder: Path) -> Path:
    """Copy a snapshot into `folder` as one of MLflow's ways to register leaves it."""
    skipped = shutil.ignore_patterns(".cache", "onnx", "*.h5", "*.bin")
    if layout == "mirror":
        shutil.copytree(source, folder)
    elif layout == "sentence-transformers":
        # mlflow.sentence_transformers.log_model with sentence-transformers 5.4 or newer.
        inner = folder / "model.sentence_transformer"
        shutil.copytree(source, inner, ignore=skipped)
        write(inner / "sentence_bert_config.json", '{"transformer_task": "feature-extraction"}')
        pooling = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}
        write(inner / "1_Pooling/config.json", json.dumps(pooling))
    elif layout == "checkpoint":
        # mlflow.transformers.log_model of a folder: a whole copy, and the tokenizer once more.
        shutil.copytree(source, folder / "model", ignore=skipped)
        write(folder / "components/tokenizer/tokenizer.json", "{}")
    else:
        # mlflow.transformers.log_model of a pipeline: in parts, without Sentence Transformers' files.
        for name in ("config.json", "model.safetensors"):
            write(folder / "model" / name, (source / name).read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            write(folder / "components/tokenizer" / name, (source / name).read_bytes())
    write(folder / "MLmodel", "flavors:\n  transformers: {model_binary: model}\n")
    return folder


def register(uri: str, folder: Path, name: str, kind: str = "run", **params: str) -> str:
    """Register what is in `folder` as a run's artifacts or as a logged model; returns the version."""
    client = registry.connect(uri)
    experiment = registry.experiment_id(client, "tests")
    run_id = client.create_run(experiment).info.run_id
    for key, value in params.items():
        client.log_param(run_id, key, value)
    if kind == "run":
        registry.with_tracking(uri, client.log_artifacts, run_id, str(folder), "model")
        client.set_terminated(run_id)
        return registry.register(uri, name, f"runs:/{run_id}/model", run_id)
    model = client.create_logged_model(experiment, "model", source_run_id=run_id, params=params)
    registry.with_tracking(uri, client.log_model_artifacts, model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.set_terminated(run_id)
    source = f"models:/{model.model_id}"
    return registry.register(uri, name, source, run_id, model_id=model.model_id)
