"""The table of models and accelerators says what the rules say, and the documents show it."""

from __future__ import annotations

import pytest

from extensions import accelerator, compatibility
from tests.models import table
from tests.models.folders import JINA_V3, MODEL_IDS, files


def test_a_row_for_each_model_and_a_column_for_each_accelerator():
    lines = table.markdown().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == list(accelerator.names())
    rows = [line for line in lines[2:] if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == list(MODEL_IDS)
    for row in rows:
        for cell in row.split("|")[2:-1]:
            for number in cell.split()[1:]:
                assert sum(line.startswith(f"{number} ") for line in lines) == 1


@pytest.mark.parametrize("name", accelerator.names())
@pytest.mark.parametrize("model_id", MODEL_IDS)
def test_nothing_that_the_rules_refuse_is_called_served(model_id, name):
    task = "separation" if model_id == JINA_V3 else None
    findings = compatibility.check(files(model_id), accelerator.for_name(name), task=task)
    outcome, said = table.remarks(model_id, name)
    if compatibility.refusal(findings):
        assert outcome == "refused"
    assert bool(said) == (outcome != "served")


def test_the_home_target_serves_all_eight():
    assert "refused" not in {table.remarks(model_id, "gb10")[0] for model_id in MODEL_IDS}


def test_the_table_replaces_what_stands_between_its_marks():
    text = f"# Title\n{table.BEGIN}\nold\n{table.END}\nmore\n"
    assert table.filled(text) == f"# Title\n{table.BEGIN}\n{table.markdown()}\n{table.END}\nmore\n"
    with pytest.raises(ValueError, match="no place for the table"):
        table.filled("# Title\n")


def test_the_documents_show_the_table_as_it_is():
    places = table.places()
    if not places:
        pytest.skip(f"no document has a place for the table yet: {table.BEGIN} … {table.END}")
    for place in places:
        text = place.read_text()
        assert text == table.filled(text), "run: python -m tests.models.table --write"
