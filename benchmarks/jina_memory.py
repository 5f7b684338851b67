"""Memory and time of converting a full-size jina-embeddings-v3, with random weights.

    python benchmarks/jina_memory.py [--folder DIR] [--limit-megabytes 1500]

Writes a checkpoint of the published size and layout (572,310,396 parameters in bfloat16, five
adapters; 1.14 GB) in rows, converts it in a process of its own, and prints that process's peak
memory. Needs numpy and 2.4 GB of disk; exits with 1 above the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

MODEL_FETCH = Path(__file__).resolve().parents[1] / "template/images/model-fetch"
TASKS = ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
VOCABULARY, HIDDEN, INNER, LAYERS, RANK = 250002, 1024, 4096, 24, 4

CONFIG = {
    "architectures": ["XLMRobertaLoRA"],
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "vocab_size": VOCABULARY,
    "type_vocab_size": 1,
    "max_position_embeddings": 8194,
    "position_embedding_type": "rotary",
    "rotary_emb_base": 20000.0,
    "layer_norm_eps": 1e-05,
    "pad_token_id": 1,
    "lora_adaptations": TASKS,
    "lora_rank": RANK,
    "lora_alpha": 1,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """The published checkpoint's 492 tensors."""
    matrices = {
        "embeddings.word_embeddings": (VOCABULARY, HIDDEN),
        "embeddings.token_type_embeddings": (1, HIDDEN),
        "pooler.dense": (HIDDEN, HIDDEN),
    }
    vectors = {"emb_ln.weight": (HIDDEN,), "emb_ln.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        name = f"encoder.layers.{layer}"
        matrices |= {
            f"{name}.mixer.Wqkv": (3 * HIDDEN, HIDDEN),
            f"{name}.mixer.out_proj": (HIDDEN, HIDDEN),
            f"{name}.mlp.fc1": (INNER, HIDDEN),
            f"{name}.mlp.fc2": (HIDDEN, INNER),
        }
        vectors |= {
            f"{name}.{norm}.{kind}": (HIDDEN,)
            for norm in ("norm1", "norm2")
            for kind in ("weight", "bias")
        }
    stored: dict[str, tuple[int, ...]] = {f"roberta.{k}": shape for k, shape in vectors.items()}
    for name, (rows, columns) in matrices.items():
        left, right = (len(TASKS), rows, RANK), (len(TASKS), RANK, columns)
        embedding = name.startswith("embeddings.")
        prefix = f"roberta.{name}.parametrizations.weight"
        stored[f"{prefix}.original"] = (rows, columns)
        stored[f"{prefix}.0.lora_A"] = left if embedding else right
        stored[f"{prefix}.0.lora_B"] = right if embedding else left
        if not embedding:
            stored[f"roberta.{name}.bias"] = (rows,)
    return stored


def write_checkpoint(folder: Path) -> int:
    """Write the checkpoint; returns its number of parameters."""
    header, end = {}, 0
    for name, shape in shapes().items():
        first, end = end, end + 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    encoded = json.dumps(header).encode()
    random = numpy.random.default_rng(3)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for first in range(0, end // 2, 1 << 22):
            count = min(1 << 22, end // 2 - first)
            values = 0.05 * random.standard_normal(count, "f4")
            file.write((values.view("<u4") >> 16).astype("<u2").tobytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    # As large as the real one (17 MB), and with as many tokens.
    vocabulary = [[f"piece-{i:012d}-{'x' * 40}", -float(i)] for i in range(VOCABULARY)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return end // 2


def peak_memory() -> float:
    """This process's largest resident size so far, in MiB.

    Not getrusage's ru_maxrss, which on Linux starts at the parent's own size.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def convert(source: str, destination: str, dtype: str) -> None:
    """Convert in this process, and print its peak memory."""
    sys.path.insert(0, str(MODEL_FETCH))
    from model_fetch import jina

    before = peak_memory()
    start = time.perf_counter()
    record = jina.convert(Path(source), TASKS[1], Path(destination), dtype=dtype)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak_memory(), "before": before, **record}))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--limit-megabytes", type=float, default=1500)
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source = Path(name) / "source"
        source.mkdir()
        parameters = write_checkpoint(source)
        size = (source / "model.safetensors").stat().st_size
        print(f"checkpoint: {parameters:,} parameters, {size:,} bytes of bfloat16")
        print(f"largest tensor as float32: {VOCABULARY * HIDDEN * 4 / 2**20:,.0f} MiB")
        for dtype in ("float16", "float32"):
            destination = Path(name) / dtype
            command = [sys.executable, __file__, "--convert", str(source), str(destination), dtype]
            answer = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(answer.stdout)
            written = (destination / "model.safetensors").stat().st_size
            print(
                f"to {dtype}: {result['parameters']:,} parameters, {written:,} bytes;"
                f" peak memory {result['peak']:,.0f} MiB (before it began"
                f" {result['before']:,.0f} MiB), {result['seconds']:.1f} s"
            )
            worst = max(worst, result["peak"] * 2**20 / 1e6)
            (destination / "model.safetensors").unlink()
    print(f"worst peak: {worst:,.0f} MB, limit {arguments.limit_megabytes:,.0f} MB")
    return 0 if worst <= arguments.limit_megabytes else 1


if __name__ == "__main__":
    raise SystemExit(main())
