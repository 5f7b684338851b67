"""Tiny models with random weights that the real TEI loads, to compare its batches with its single texts.

A text is words w0 to w99, a token each; white space alone is no token, since the tokenizer adds none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy

HIDDEN, INNER, HEADS, LAYERS, POSITIONS, VOCABULARY = 64, 96, 4, 2, 512, 101
_HEAD = HIDDEN // HEADS

Shapes = dict[str, tuple[int, ...]]


def text(length: int, seed: int = 0) -> str:
    """A text of so many tokens."""
    words = numpy.random.default_rng([seed, length]).integers(0, 100, length)
    return " ".join(f"w{word}" for word in words)


def _decoder(norms: tuple[str, ...]) -> Shapes:
    """The layers that Qwen3 and Gemma 3 have in common."""
    shapes: Shapes = {"embed_tokens.weight": (VOCABULARY, HIDDEN), "norm.weight": (HIDDEN,)}
    for layer in (f"layers.{number}" for number in range(LAYERS)):
        shapes |= {f"{layer}.{norm}.weight": (HIDDEN,) for norm in norms}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (_HEAD,) for name in "qk"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INNER)
    return shapes


def _encoder(norms: tuple[str, ...], linears: Mapping[str, tuple[int, int]]) -> Shapes:
    shapes: Shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {f"{name}.{part}": (HIDDEN,) for name in norms for part in ("weight", "bias")}
    return shapes


_DECODER: dict[str, Any] = {
    "attention_bias": False,
    "head_dim": _HEAD,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "eos_token_id": 100,
    "pad_token_id": 0,
}


def qwen3(folder: Path, **config: Any) -> Path:
    """Qwen3: a token sees those before it."""
    shapes = _decoder(("input_layernorm", "post_attention_layernorm"))
    own = {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}
    return _model(folder, "qwen3", shapes, _DECODER | own | config)


def gemma3(folder: Path, **config: Any) -> Path:
    """Gemma 3 as EmbeddingGemma has it: both ways, in most layers within a sliding window."""
    around = ("attention", "feedforward")
    norms = [f"{when}_{what}_layernorm" for what in around for when in ("pre", "post")]
    shapes = _decoder(("input_layernorm", *norms[1:]))
    own = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _HEAD,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 16,
        "_sliding_window_pattern": 6,
        "use_bidirectional_attention": True,
    }
    return _model(folder, "gemma3_text", shapes, _DECODER | own | config)


def deberta(folder: Path, **config: Any) -> Path:
    """DeBERTa-v2; `conv_kernel_size` gives it a convolution."""
    linears: dict[str, tuple[int, int]] = {}
    norms = ["embeddings.LayerNorm", "encoder.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(LAYERS)):
        for name in ("query", "key", "value"):
            linears[f"{layer}.attention.self.{name}_proj"] = (HIDDEN, HIDDEN)
        linears[f"{layer}.attention.output.dense"] = (HIDDEN, HIDDEN)
        linears[f"{layer}.intermediate.dense"] = (INNER, HIDDEN)
        linears[f"{layer}.output.dense"] = (HIDDEN, INNER)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes = _encoder(tuple(norms), linears)
    shapes["embeddings.word_embeddings.weight"] = (VOCABULARY, HIDDEN)
    shapes["encoder.rel_embeddings.weight"] = (64, HIDDEN)
    if kernel := config.get("conv_kernel_size"):
        shapes |= _encoder(("encoder.conv.LayerNorm",), {})
        shapes |= {"encoder.conv.conv.weight": (HIDDEN, HIDDEN, kernel)}
        shapes |= {"encoder.conv.conv.bias": (HIDDEN,)}
    own = {
        "hidden_act": "gelu",
        "type_vocab_size": 0,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-7,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 32,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_act": "gelu",
    }
    return _model(folder, "deberta-v2", shapes, own | config)


Builder = Callable[..., Path]


def _model(folder: Path, model_type: str, shapes: Shapes, config: Mapping[str, Any]) -> Path:
    """Write config, tokenizer and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "architectures": ["Model"],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
    }
    vocabulary = {"[UNK]": 100} | {f"w{number}": number for number in range(100)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (folder / "config.json").write_text(json.dumps(common | dict(config)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model.safetensors").write_bytes(_safetensors(shapes))
    return folder


def _safetensors(shapes: Shapes) -> bytes:
    """float32; norms near one, biases near zero, everything else so large that attention is sharp."""
    random = numpy.random.default_rng(7)
    header, data = {}, b""
    for name, shape in shapes.items():
        norm = "norm" in name.lower()
        values = random.normal(float(norm and name.endswith("weight")), 0.1, shape)
        if not norm and name.endswith("weight"):
            values = random.normal(0, 2 / shape[-1] ** 0.5, shape)
        raw = values.astype("<f4").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
        data += raw
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data
