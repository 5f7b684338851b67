"""Small models that are made up, with the files that a real one has."""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
PIECE = 64 << 20

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 5000,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
POOLING = {
    "word_embedding_dimension": 384,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": True,
}


def safetensors(data_bytes: int, seed: int = 1) -> bytes:
    """A valid safetensors file with one tensor of so many bytes (a multiple of 4) of noise."""
    entry = {"dtype": "F32", "shape": [data_bytes // 4], "data_offsets": [0, data_bytes]}
    header = json.dumps({"embeddings.word_embeddings.weight": entry}).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    generator, pieces = (
        random.Random(seed),
        range(0, data_bytes, PIECE),
    )  # randbytes ends at 256 MiB
    noise = (generator.randbytes(min(PIECE, data_bytes - at)) for at in pieces)
    return b"".join((struct.pack("<Q", len(header)), header, *noise))


LARGE = 1_701_900_000 // 8 * 8  # bytes of weights: the size class of most models of 2025


def large_model(folder: Path, size: int = LARGE) -> PinnedModel:
    """A model whose weights are a mapped file; no two of its MiB are alike, and none is zeros."""
    if shutil.disk_usage(folder).free < 6 * size:
        pytest.skip(f"there is no room for a model of {size / 1e9:.1f} GB here")
    entry = {"dtype": "F32", "shape": [(size - 136) // 4], "data_offsets": [0, size - 136]}
    header = json.dumps({"embeddings.word_embeddings.weight": entry}).encode().ljust(128)
    noise = random.Random(1).randbytes(1 << 20)
    path = folder / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        while (left := size - file.tell()) > 0:
            file.write((struct.pack("<Q", file.tell()) + noise)[: min(left, 1 << 20)])
    with path.open("rb") as file:
        weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    files = embedding_model(weights=4096) | {"model.safetensors": weights}
    return PinnedModel(files, "mlflow-artifacts:/model")


def embedding_model(weights: int = 3000 * KIB, seed: int = 1) -> dict[str, bytes]:
    """The files of a model, by path."""
    return {
        "model.safetensors": safetensors(weights, seed),
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": json.dumps({"vocab": list(range(5000 + seed))}).encode(),
        "1_Pooling/config.json": json.dumps(POOLING).encode(),
        "modules.json": b"[]",
    }


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    """Puts the files into a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@dataclass
class PinnedModel:
    """A model with the pin that describes it; fields may be changed before the pin is used."""

    files: Mapping[str, bytes]
    artifact_uri: str
    version: str | None = "3"
    sha256: bool = False
    """Whether the pin carries the digests of weights, as a mirrored snapshot's does."""

    more: dict[str, Any] = field(default_factory=dict)

    def pin(self) -> dict[str, Any]:
        return {
            "model_id": "acme/tiny",
            "registered_model": "acme-tiny",
            "selector": self.version or "latest",
            "version": self.version,
            "run_id": None,
            "logged_model_id": None,
            "artifact_uri": self.artifact_uri,
            "revision": None,
            "files": [self._file(path, content) for path, content in self.files.items()],
            "facts": {"architecture": "bert"},
            **self.more,
        }

    def _file(self, path: str, content: bytes) -> dict[str, Any]:
        file: dict[str, Any] = {"path": path, "from": path, "size": len(content)}
        if self.sha256 and path.endswith(".safetensors"):
            file["sha256"] = hashlib.sha256(content).hexdigest()
        elif self.sha256:
            blob = f"blob {len(content)}\0".encode() + content
            file["blob_sha1"] = hashlib.sha1(blob).hexdigest()
        return file


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder as they are, without the marker."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".model-fetch.json"
    }
