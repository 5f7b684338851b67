"""Renders examples/shapes.yaml into this folder: what a change of the template does is seen in its diff.

Files that are copied as they are, are left out: their diff is in template/. Run it as `make examples`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import copier
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import pinned  # noqa: E402 (needs the path above)

COPIED = shutil.ignore_patterns("__pycache__", ".*_cache", "model_fetch")
"""model-fetch's program is the same in each."""


def render(into: Path) -> list[str]:
    """Write one folder per shape; returns their names."""
    shapes = yaml.safe_load((HERE / "shapes.yaml").read_text())
    with TemporaryDirectory() as temporary:
        # A plain folder: no commit and no address get into the answers.
        template = Path(temporary, "template")
        for name in ("extensions", "template"):
            shutil.copytree(ROOT / name, template / name, ignore=COPIED)
        for name in ("copier.yml", "manifest.yaml"):
            shutil.copy(ROOT / name, template)
        as_it_is = {p.read_bytes() for p in (template / "template").rglob("*") if p.is_file()}
        for name, shape in shapes.items():
            data = {"model_id": shape["model"], "pin": pinned(shape["model"]), **shape["answers"]}
            made = Path(temporary, name)
            copier.run_copy(str(template), made, data=data, defaults=True, unsafe=True, quiet=True)
            keep(made, into / name, as_it_is)
    return list(shapes)


def keep(made: Path, into: Path, as_it_is: set[bytes]) -> None:
    """Take over what was rendered, not what was copied."""
    shutil.rmtree(into, ignore_errors=True)
    for path in sorted(made.rglob("*")):
        if not path.is_file() or (data := path.read_bytes()) in as_it_is:
            continue
        if path.name == ".copier-answers.yml":  # where the template was on this machine
            lines = data.decode().splitlines(keepends=True)
            data = "".join(ln for ln in lines if not ln.startswith("_src_path:")).encode()
        target = into / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


if __name__ == "__main__":
    print(f"Rendered {', '.join(render(HERE))}: read `git diff examples`.")
