"""examples/ is what the template renders now."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import program

ROOT = Path(__file__).parent.parent


def tree(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def test_examples_are_what_is_rendered(tmp_path: Path) -> None:
    names = program(ROOT / "examples/render.py").render(tmp_path)
    assert len(names) == 3
    for name in names:
        kept, made = tree(ROOT / "examples" / name), tree(tmp_path / name)
        stale = sorted(k for k in {*kept, *made} if kept.get(k) != made.get(k))
        assert not stale, f"examples/{name}: run `make examples` and read the diff of {stale}"
        assert len(made) > 10
