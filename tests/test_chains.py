"""Whole chains on the real TEI: MLflow, copier, model-fetch, the rendered flags, smoke and parity.

A tiny seeded model of each architecture that a CPU serves, as sentence-transformers saves it today.
`make chains` runs all of them and writes what came into docs/models.md, beside what came before; a test
run takes two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from demo.demo import rendered_flags
from demo.registry import register_snapshot
from tests import real_tei
from tests.contract import tiny

ROOT = Path(__file__).parent.parent
RESULT, DOCUMENT = ROOT / "tests/contract/chains.json", ROOT / "docs/models.md"
BEGIN, END = "<!-- make chains: begin -->", "<!-- make chains: end -->"

LIBRARY = tuple(name for name in tiny.MODELS if name not in (*tiny.STANDS_FOR, "jina-v2"))
"""Those that sentence-transformers loads without code of their makers."""

ALL = os.environ.get("CHAINS") in ("all", "write")
CHAINS = LIBRARY if ALL else ("modernbert", "gemma3_text")
"""Without CHAINS: one that is repaired, and one that needs an edit of TEI."""

POOLING = {"qwen3": "last-token"}
PROMPTS = {"modernbert": "search_document: "}
"""Before every text, by sentence-transformers and by the rendered flag of TEI."""

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(real_tei.router(edited=True) is None, reason=real_tei.LEFT_OUT),
    pytest.mark.skipif(
        importlib.util.find_spec("sentence_transformers") is None,
        reason="sentence-transformers is not installed: make .venv/.reference",
    ),
]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, dict[str, Any]]]:
    """What came, by architecture; noted when `make chains` asks for it, beside what came before."""
    found: dict[str, dict[str, Any]] = {}
    yield found
    if os.environ.get("CHAINS") == "write" and found:
        noted = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        earlier = noted.get("rows", {}) if noted.get("commit") == real_tei.commit() else {}
        rows = dict(sorted((earlier | found).items()))
        note = {"commit": real_tei.commit(), "date": date.today().isoformat(), "rows": rows}
        tiny.write(RESULT, note)
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}")


def markdown() -> str:
    """The table of docs/models.md."""
    noted = json.loads(RESULT.read_text())
    lines = [
        "| architecture | pooling | repaired | smoke | parity, worst cosine |",
        "|---|---|--:|---|--:|",
    ]
    for name, row in noted["rows"].items():
        counts = f"{row['repairs']} | {row['smoke']} checks"
        lines.append(f"| {name} | {row['pooling']} | {counts} | {row['worst']:.7f} |")
    return "\n".join([*lines, "", f"TEI {noted['commit'][:12]} with our edits, {noted['date']}."])


def ran(*command: object, cwd: Path, **variables: str) -> str:
    """Output of a program that must end well."""
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | quiet | variables, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", CHAINS)
def test_a_model_goes_through_the_whole_chain(
    name: str,
    results: dict[str, dict[str, Any]],
    mlflow_proxied: str,
    render: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pooling = POOLING.get(name, "mean")
    saved = tiny.saved_today(name, tmp_path / "first", tmp_path / "saved", pooling)
    if name in PROMPTS:
        path = saved / "config_sentence_transformers.json"
        prompts = {"prompts": {"document": PROMPTS[name]}, "default_prompt_name": "document"}
        tiny.write(path, json.loads(path.read_text()) | prompts)
    register_snapshot(mlflow_proxied, saved, f"tiny/{name}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_proxied)
    repository = render(model_id=f"tiny/{name}", accelerator="cpu")
    link = tmp_path / "model/current"
    fetched = ran(
        *(sys.executable, "-m", "model_fetch", "--pin", repository / "k8s/base/pin.json"),
        *("--cache", tmp_path / "cache", "--link", link, "--no-sync"),
        cwd=repository / "images/model-fetch",
    )
    # From the files as they were registered: what model-fetch repaired is part of what is compared.
    reference = repository / "parity/reference.json"
    ran(
        *(sys.executable, repository / "parity/reference.py", saved, "--output", reference),
        cwd=repository,
    )
    flags, program = rendered_flags(repository), real_tei.router(edited=True)
    with real_tei.serving(link, *flags, program=program) as server:
        smoke, parity = (
            ran(sys.executable, "-B", f"smoke/{check}.py", "--url", server.url, cwd=repository)
            for check in ("smoke", "parity")
        )
    assert ("texts begin with" in parity) == (name in PROMPTS), parity
    cosines = re.findall(r"cosine ([\d.]+) to the reference", parity)
    assert len(cosines) == 5, parity
    results[name] = {
        "pooling": pooling,
        "repairs": fetched.count("prepared for TEI: "),
        "smoke": len(re.findall(r"^  ok  ", smoke, re.M)),
        "worst": min(map(float, cosines)),
    }
    assert results[name]["worst"] >= 0.9999


def test_the_document_shows_what_was_measured() -> None:
    noted = json.loads(RESULT.read_text())
    assert set(CHAINS if not ALL else ()) <= noted["rows"].keys() <= set(LIBRARY)
    assert noted["commit"] == real_tei.commit()
    assert f"{BEGIN}\n{markdown()}\n{END}" in DOCUMENT.read_text()
