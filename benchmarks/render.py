"""How long `copier copy` of this template takes, against an empty template with the same loader.

Runs the real command with what a user has installed (Copier, the loader, mlflow-skinny), all cases in
turn in one run, and prints medians: wall seconds, and CPU seconds of the command and its children.

    python benchmarks/render.py [rounds]
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.registry import serve  # noqa: E402
from tests.conftest import environment  # noqa: E402
from tests.snapshots import register, snapshot  # noqa: E402

EMPTY = """\
_subdirectory: template
_jinja_extensions:
  - copier_template_extensions.TemplateExtensionLoader
  - extensions/entry.py:Empty
name: {type: str, default: x}
"""
ENTRY = "from jinja2.ext import Extension\n\n\nclass Empty(Extension):\n    pass\n"


def git_template(folder: Path) -> Path:
    """Make a folder a Git repository with one commit and a tag."""
    git = ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.com"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "bench"], ["tag", "v1.0.0"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def empty_template(folder: Path) -> Path:
    for path, text in {
        "copier.yml": EMPTY,
        "extensions/entry.py": ENTRY,
        "template/README.md.jinja": "{{ name }}\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return git_template(folder)


def this_template(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "node_modules", ".*_cache")
    for name in ("extensions", "template"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("copier.yml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return git_template(folder)


def timed(command: list[str], target: Path, variables: dict[str, str]) -> tuple[float, float]:
    """(wall, CPU) seconds of one run into a new folder."""
    shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([*command, str(target)], env=variables, check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch) / "mlflow") as uri:
        folder = Path(scratch)
        register(uri, snapshot(folder / "snapshot"), "acme-bench", model_id="acme/bench")
        copier = [str(environment("user").parent / "copier"), "copy", "--trust", "--defaults"]
        variables = {"PATH": os.environ["PATH"], "HOME": scratch}
        ours, empty = this_template(folder / "ours"), empty_template(folder / "empty")
        live = {**variables, "MLFLOW_TRACKING_URI": uri}
        asked = ["-d", "model_id=acme/bench", "-d", "accelerator=cpu"]
        timed([*copier, *asked, str(ours)], folder / "first", live)
        replay = ["--data-file", str(folder / "first/.copier-answers.yml")]
        cases = {
            "empty template": ([*copier, str(empty)], variables),
            "replay of a pin": ([*copier, *replay, str(ours)], variables),
            "no registry": ([*copier, str(ours)], variables),
            "live lookup": ([*copier, *asked, str(ours)], live),
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for turn in range(rounds + 1):
            for name, (command, environ) in cases.items():
                measured = timed(command, folder / "target", environ)
                if turn:  # the first round warms up
                    results[name].append(measured)
        files = sum(p.is_file() for p in (folder / "first").rglob("*"))

    base_wall, base_cpu = (
        statistics.median(v) for v in zip(*results["empty template"], strict=True)
    )
    print(f"{rounds} rounds, interleaved; medians. This template renders {files} files.\n")
    heads = ("wall s", "min s", "CPU s", "wall ratio", "CPU ratio", "wall + s")
    widths = (8, 8, 8, 12, 11, 10)
    print(f"{'case':18}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for name, runs in results.items():
        walls, cpus = zip(*runs, strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(
            f"{name:18}{wall:8.2f}{min(walls):8.2f}{cpu:8.2f}"
            f"{wall / base_wall:12.2f}{cpu / base_cpu:11.2f}{wall - base_wall:+10.2f}"
        )


if __name__ == "__main__":
    main()
