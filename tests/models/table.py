"""The table of models and accelerators, from the rules and from what fits.

python -m tests.models.table          prints it
python -m tests.models.table --write  puts it into README.md, between its two marks
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from extensions import accelerator, catalog, compatibility, sizing
from extensions.compatibility import FIXED, REFUSED, WARNED
from tests.models.folders import JINA_V3, MODEL_IDS, files

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- make models: begin -->", "<!-- make models: end -->"


def remarks(model_id: str, name: str) -> tuple[str, list[str]]:
    """served, served with remark or refused, on one accelerator; and why, in sentences."""
    hardware = accelerator.for_name(name)
    task = "retrieval.passage" if model_id == JINA_V3 else None
    findings = compatibility.check(files(model_id), hardware, task=task)
    if refused := [f.message for f in findings if f.outcome == REFUSED]:
        return "refused", refused
    answers = {"accelerator": name, "components": [], "replicas": "1"}
    if problem := sizing.problem(catalog.resolve(model_id, "latest"), answers):
        return "refused", [str(problem)]
    said = [f.message for f in findings if f.outcome in (FIXED, WARNED)]
    return ("served with remark" if said else "served"), said


def markdown() -> str:
    """One row per model, one column per accelerator, and the remarks below."""
    names = accelerator.names()
    notes: dict[str, int] = {}
    rows = []
    for model_id in MODEL_IDS:
        cells = []
        for name in names:
            outcome, said = remarks(model_id, name)
            said = [
                sentence.replace("retrieval.passage", "of the chosen task") for sentence in said
            ]
            numbers = [notes.setdefault(sentence, len(notes) + 1) for sentence in said]
            sign = "no" if outcome == "refused" else "yes"
            cells.append(" ".join([sign, *(f"[{number}]" for number in numbers)]))
        rows.append(f"| {model_id} | {' | '.join(cells)} |")
    head = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*head, *rows, "", *(f"[{n}] {sentence}  " for sentence, n in notes.items())])


def places() -> list[Path]:
    """The documents that show the table."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in documents if path.exists() and BEGIN in path.read_text()]


def filled(text: str) -> str:
    """A document with the table as it is now.

    Raises: ValueError when only one of its marks is there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no place for the table: {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{markdown()}\n{END}", text)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for place in places():
            place.write_text(filled(place.read_text()))
    else:
        print(markdown())
