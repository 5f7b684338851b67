"""The monitoring dashboard with what a service really tells Prometheus.

Every panel's own queries are asked of a Prometheus that scraped TEI. Grafana draws them in its own style.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.registry import free_port

SCRAPE = "1s"
RATE = "10s"
"""What takes the place of Grafana's $__rate_interval: at least four scrapes."""

UNITS = {
    "percentunit": ("%", 100),
    "reqps": ("requests/s", 1),
    "s": ("s", 1),
    "cps": ("per s", 1),
    "short": ("", 1),
}
"""Grafana's unit -> how it is written, and times what."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a panel: its legend, its bucket where it is one, and (time, value) in seconds."""

    legend: str
    bucket: float | None
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """One that runs."""

    url: str

    def series(self, target: dict[str, Any], start: float, end: float) -> list[Series]:
        """What a panel's target shows between two moments; a pod is any pod."""
        query = target["expr"].replace("$__rate_interval", RATE).replace("$pod", ".+")
        asked = {"query": query, "start": start, "end": end, "step": 1}
        found = self._ask(f"query_range?{urllib.parse.urlencode(asked)}")["result"]
        rows = []
        for row in found:
            legend = target["legendFormat"]
            for label, value in row["metric"].items():
                legend = legend.replace("{{" + label + "}}", value)
            bucket = float(row["metric"]["le"]) if target.get("format") == "heatmap" else None
            rows.append(Series(legend, bucket, [(float(t), float(v)) for t, v in row["values"]]))
        return rows

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(job: str, pods: dict[str, str]) -> Iterator[Prometheus]:
    """Scrape servers every second, as the PodMonitor has them scraped, until the block ends.

    Args:
        job: NAMESPACE/NAME, as PodMonitor writes it.
        pods: name of a pod -> host:port.
    """
    with tempfile.TemporaryDirectory() as temporary:
        port, folder = free_port(), Path(temporary)
        targets = [{"targets": [at], "labels": {"pod": pod}} for pod, at in pods.items()]
        scrape = {"job_name": job, "static_configs": targets}
        config = {"global": {"scrape_interval": SCRAPE}, "scrape_configs": [scrape]}
        (folder / "prometheus.json").write_text(json.dumps(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.json"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, stderr=log, env={"PATH": os.environ["PATH"]})
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > end:
                        raise RuntimeError((folder / "log").read_text()[-500:]) from None
                    time.sleep(0.1)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()
            server.wait()


def draw(dashboard: dict[str, Any], source: Prometheus, start: float, end: float, to: Path) -> None:
    """A PNG of all panels, each where the dashboard has it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    figure = pyplot.figure(figsize=(14, rows * 0.36), facecolor="#f4f5f5")
    grid = figure.add_gridspec(
        rows, 24, left=0.045, right=0.985, top=0.965, bottom=0.012, hspace=2.2, wspace=3
    )
    figure.suptitle(dashboard["title"], x=0.045, y=0.985, ha="left", fontsize=14, weight="bold")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        last = place["y"] + place["h"] - (1 if place["h"] > 5 else 0)  # its own labels below
        cell = grid[place["y"] : last, place["x"] : place["x"] + place["w"]]
        axes = figure.add_subplot(cell)
        axes.set_title(panel["title"], loc="left", fontsize=9, weight="bold")
        axes.tick_params(labelsize=7)
        word, times = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        found = [row for target in panel["targets"] for row in source.series(target, start, end)]
        DRAWN[panel["type"]](axes, found, start, word, times)
    figure.savefig(to, dpi=80)
    pyplot.close(figure)


def _stat(axes: Any, found: list[Series], start: float, word: str, times: int) -> None:
    value = found[0].points[-1][1] * times
    axes.text(0.5, 0.5, f"{value:.4g} {word}", ha="center", va="center", fontsize=20)
    axes.set_xticks([])
    axes.set_yticks([])


def _lines(axes: Any, found: list[Series], start: float, word: str, times: int) -> None:
    for row in found:
        moments, values = zip(*row.points, strict=True)
        axes.plot([t - start for t in moments], [v * times for v in values], label=row.legend)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(word, fontsize=7)
    axes.grid(color="#d5d9e0")
    axes.legend(fontsize=7, loc="upper left")


def _heatmap(axes: Any, found: list[Series], start: float, word: str, times: int) -> None:
    """Prometheus' buckets hold all below them: each takes away the one before."""
    rows = sorted(found, key=lambda row: row.bucket or 0)
    used = [row for row in rows if row.bucket not in (None, float("inf"))]
    moments = [t for t, _ in used[-1].points]
    below = [dict(row.points) for row in used]
    cells = [
        [row.get(t, 0) - (below[i - 1].get(t, 0) if i else 0) for t in moments]
        for i, row in enumerate(below)
    ]
    edges = [0.0, *(row.bucket or 0 for row in used)]
    sides = [t - start for t in moments] + [moments[-1] - start + 1]
    axes.pcolormesh(sides, edges, cells, cmap="Blues")
    axes.set_yscale("symlog", linthresh=0.005)
    axes.set_ylabel(word, fontsize=7)
    top = max(i for i, row in enumerate(cells) if any(v > 0 for v in row))
    axes.set_ylim(edges[max(0, top - 12)], edges[top + 1])


DRAWN = {"stat": _stat, "timeseries": _lines, "heatmap": _heatmap}
