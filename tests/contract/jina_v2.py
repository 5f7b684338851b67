"""jina-embeddings-v2, tiny: transformers has no such class without its makers' code.

BERT without positions, with ALiBi (Press et al., 2108.12409) in both directions, and GEGLU (Shazeer,
2002.05202) as the layers' second half; the names of the tensors are those of the published models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG: Mapping[str, Any] = {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {
        "AutoConfig": "jinaai/jina-bert-implementation--configuration_bert.JinaBertConfig"
    },
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
}


def build(folder: Path, said: Mapping[str, Any], fill: Any) -> None:
    """Write config.json and weights. fill(torch, name, tensor) sets their values."""
    import torch
    from safetensors.torch import save_file

    config = {**CONFIG, **said}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{n}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}.attention.{part}.weight"] = (hidden, hidden)
            shapes[f"{layer}.attention.{part}.bias"] = (hidden,)
        shapes[f"{layer}.mlp.gated_layers.weight"] = (2 * inner, hidden)
        shapes[f"{layer}.mlp.wo.weight"], shapes[f"{layer}.mlp.wo.bias"] = (
            (hidden, inner),
            (hidden,),
        )
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.mlp.layernorm"]
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        fill(torch, name, tensor)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def states(folder: Path, ids: Any) -> Any:
    """The last layer's output, one row per token."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional
    from transformers.activations import ACT2FN

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, tokens = config["num_attention_heads"], ids.shape[-1]

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        parts = (weights[f"{name}.weight"], weights[f"{name}.bias"])
        return functional.layer_norm(x, x.shape[-1:], *parts, eps=config["layer_norm_eps"])

    def split(x: Any) -> Any:
        return x.reshape(tokens, heads, -1).transpose(0, 1)

    slopes = torch.tensor([2 ** (-8 * (n + 1) / heads) for n in range(heads)])  # a power of two
    places = torch.arange(tokens)
    bias = -slopes[:, None, None] * (places[None, :] - places[:, None]).abs()
    embedded = weights["embeddings.word_embeddings.weight"][ids[0]]
    x = norm(
        embedded + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
    )
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{n}"
        names = (f"{layer}.attention.self.{part}" for part in ("query", "key", "value"))
        query, key, value = (split(linear(x, name)) for name in names)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + bias
        context = (scores.softmax(-1) @ value).transpose(0, 1).reshape(tokens, -1)
        attended = linear(context, f"{layer}.attention.output.dense")
        x = norm(attended + x, f"{layer}.attention.output.LayerNorm")
        gate, other = linear(x, f"{layer}.mlp.gated_layers").chunk(2, dim=-1)
        inner = ACT2FN[config["hidden_act"]](gate) * other
        x = norm(linear(inner, f"{layer}.mlp.wo") + x, f"{layer}.mlp.layernorm")
    return x
