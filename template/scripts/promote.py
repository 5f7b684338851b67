"""Moves a model version from one environment to the next: a file, and the line that names it.

    python3 scripts/promote.py OBJECTS ENVIRONMENTS TO    to TO, from the one before it: `make promote`
    python3 scripts/promote.py --check OBJECTS ONE        ends with 1 where its version needs other flags

OBJECTS holds what all environments share; the first one serves its base/pin.json.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^    files: \[(?:pin\.json=)?(?P<file>[\w.-]+)\]$", re.MULTILINE)


def stop(text: str) -> None:
    sys.exit(text)


def pin_of(objects: str, environment: str) -> tuple[Path, dict[str, Any]]:
    """The pin that an environment serves, and its file."""
    folder = ROOT / "overlays" / environment
    if not folder.is_dir():
        stop(
            f"{environment or 'TO'} is none of the environments: there is no overlays/{environment}"
        )
    path = ROOT / objects / "base/pin.json"
    if (folder / "pin").is_dir():
        found = LINE.search((folder / "pin/kustomization.yaml").read_text())
        if not found:
            stop(
                f"overlays/{environment}/pin/kustomization.yaml names no pin: `files: [pin.json=….json]`"
            )
        else:
            path = folder / "pin" / found["file"]
    try:
        pin: dict[str, Any] = json.loads(path.read_text())
        return path, pin
    except (OSError, ValueError) as error:
        stop(f"{path.relative_to(ROOT)} is no pin ({type(error).__name__})")
        raise


def flags(pin: dict[str, Any]) -> dict[str, Any]:
    """What the Deployment's flags follow from."""
    return {key: pin.get(key) for key in ("model_id", "facts", "conversion", "remarks")}


def promote(objects: str, source: str, target: str) -> None:
    folder = ROOT / "overlays" / target / "pin"
    before_path, before = pin_of(objects, target)
    if not folder.is_dir():
        stop(f"{target} serves what is pinned: `make update-model` moves that")
    path, pin = pin_of(objects, source)
    text = path.read_text()
    if before_path.read_text() == text:
        stop(f"{target} serves version {pin['version']} of {pin['registered_model']} already")
    name = f"{pin['registered_model']}-{pin['version']}"
    name = re.sub(r"[^\w.-]", "-", name) + ".json"
    kustomization = folder / "kustomization.yaml"
    (folder / name).write_text(text)
    lines = LINE.sub(f"    files: [pin.json={name}]", kustomization.read_text())
    kustomization.write_text(lines)
    print(f"{target}: version {before['version']} becomes {pin['version']}, as {source} serves it")
    for key in ("model_id", "dimensions", "pooling"):
        old, new = ({**one, **one["facts"]}.get(key) for one in (before, pin))
        if old != new:
            print(
                f"RE-INDEX: {key} {old} becomes {new}: what was embedded before must be embedded again"
            )
    print(f"Read the diff, commit, then: make deploy ENV={target}")


def check(objects: str, environment: str) -> None:
    _, pin = pin_of(objects, environment)
    path = ROOT / objects / "base/pin.json"
    if flags(pin) != flags(json.loads(path.read_text())):
        stop(
            f"{environment} serves version {pin['version']}, but TEI's flags are for another model or "
            f"other facts ({path.relative_to(ROOT)}): make promote TO={environment}, or deploy it from the "
            "commit before"
        )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--check"] and len(arguments) == 3:
        check(*arguments[1:])
        return
    if len(arguments) < 3:
        stop("usage: make promote TO=ENVIRONMENT")
    objects, *environments, target = arguments
    if target not in environments[1:]:
        stop(f"Say which environment it moves to: TO={' or TO='.join(environments[1:])}")
    promote(objects, environments[environments.index(target) - 1], target)


if __name__ == "__main__":
    main(sys.argv[1:])
