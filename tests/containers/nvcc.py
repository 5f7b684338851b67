"""NVIDIA's compiler from PyPI, for tests: 100 MB, kept between runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .engine import CACHE

PARTS = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-crt==13.0.88"),
    "nvidia-cuda-runtime==13.0.96",
)
"""Parts of one release, since ptxas refuses what a newer cicc writes."""

VERSION = PARTS[0].rpartition("=")[2]


def toolkit() -> Path:
    """Folder with bin/nvcc, nvvm and include, as in /usr/local/cuda."""
    folder = CACHE / f"nvcc-{VERSION}"
    if not folder.exists():
        shutil.rmtree(part := folder.with_name(f"{folder.name}.part"), ignore_errors=True)
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part]
        done = subprocess.run([*words, *PARTS], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-1000:]
        part.rename(folder)
    return folder / "nvidia/cu13"
