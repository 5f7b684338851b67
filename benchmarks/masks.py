"""What the masks that the built TEI adds cost on a CPU: time of a batch, CPU time, most memory.

Serves Qwen3 models with random weights by TEI with and without the edits, and sends each in turn one
request of four texts (TEI's batch on a CPU): equally long, where the edit adds the mask, and mixed, where
TEI has it by itself. Prints medians as Markdown. With --mkl, also that program, and the worst cosine
between its vectors and those of --edited.

    python benchmarks/masks.py --plain PROGRAM --edited PROGRAM [--mkl PROGRAM] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402

from tests import real_tei, tiny_models  # noqa: E402

SIZES = {
    "0.1 million, 2 layers": {"HIDDEN": 64, "INNER": 96, "HEADS": 4, "LAYERS": 2},
    # Qwen3-Embedding-0.6B's width and heads, with 8 of its 28 layers and 101 tokens.
    "109 million, 8 layers": {"HIDDEN": 1024, "INNER": 3072, "HEADS": 16, "LAYERS": 8},
}
LENGTHS = {
    "4 × 32": (32, 32, 32, 32),
    "4 × 128": (128, 128, 128, 128),
    "4 × 512": (512, 512, 512, 512),
    "32, 64, 128, 256": (32, 64, 128, 256),
}
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Seen:
    """What one program took for one kind of batch."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    most_mib: list[float] = field(default_factory=list)


def model(folder: Path, size: dict[str, int]) -> Path:
    """A Qwen3 model of this size."""
    head = size["HIDDEN"] // size["HEADS"]
    for name, value in (size | {"_HEAD": head}).items():
        setattr(tiny_models, name, value)
    return tiny_models.qwen3(folder, head_dim=head, num_key_value_heads=size["HEADS"])


def _cpu_seconds(pid: int) -> float:
    """User and system time so far (proc(5), stat 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _most_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(server: real_tei.Server, texts: list[str], seen: Seen) -> None:
    """One request; the most memory is counted from its start (proc(5), clear_refs 5)."""
    pid = server.process.pid
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    before, start = _cpu_seconds(pid), time.perf_counter()
    status, _ = server.request("/v1/embeddings", {"input": texts, "model": "any"}, timeout=900)
    assert status == 200
    seen.seconds.append(time.perf_counter() - start)
    seen.cpu_seconds.append(_cpu_seconds(pid) - before)
    seen.most_mib.append(_most_mib(pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--edited", type=Path, required=True)
    parser.add_argument("--mkl", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    print(
        "| parameters | tokens of the texts | TEI | ms | CPU ms | most MiB |\n|---|---|---|---|---|---|"
    )
    worst = 1.0
    for size_name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            made = model(Path(folder), size)
            programs = {"plain": asked.plain, "edited": asked.edited, "MKL": asked.mkl}
            servers = {
                name: stack.enter_context(
                    real_tei.serving(
                        made,
                        *("--dtype=float32", "--pooling=last-token"),
                        program=program,
                        environment={"KMP_BLOCKTIME": "0"},
                    )
                )
                for name, program in programs.items()
                if program
            }
            for lengths_name, lengths in LENGTHS.items():
                texts = [tiny_models.text(length, seed) for seed, length in enumerate(lengths)]
                seen: dict[str, Seen] = defaultdict(Seen)
                for number in range(asked.rounds + 1):
                    for name in list(servers)[:: (-1) ** number]:
                        measure(servers[name], texts, Seen() if number == 0 else seen[name])
                for name in servers:
                    cells = [
                        1000 * statistics.median(seen[name].seconds),
                        1000 * statistics.median(seen[name].cpu_seconds),
                        statistics.median(seen[name].most_mib),
                    ]
                    figures = " | ".join(f"{cell:.0f}" for cell in cells)
                    print(f"| {size_name} | {lengths_name} | {name} | {figures} |", flush=True)
                if asked.mkl:
                    ours, theirs = (
                        numpy.array(servers[name].embed(*texts)) for name in ("edited", "MKL")
                    )
                    worst = min(worst, float((ours * theirs).sum(axis=1).min()))
    if asked.mkl:
        print(f"\nworst cosine with and without MKL: {worst:.7f}")


if __name__ == "__main__":
    main()
