"""The generator of combinations covers what it says it covers."""

from __future__ import annotations

from itertools import combinations, product

from tests.pairwise import rows

AXES = {"a": (1, 2, 3), "b": ("x", "y"), "c": (True, False), "d": (10, 20, 30, 40)}


def test_every_two_values_meet() -> None:
    found = rows(AXES, lambda row: True)
    for one, other in combinations(AXES, 2):
        met = {(row[one], row[other]) for row in found}
        assert met == set(product(AXES[one], AXES[other]))
    assert len(found) < 20


def test_no_row_is_refused_and_every_possible_pair_is_there() -> None:
    def allowed(row: dict[str, object]) -> bool:
        return not (row["a"] == 3 and row["b"] == "y")

    found = rows(AXES, allowed)
    assert all(allowed(row) for row in found)
    assert {(row["a"], row["b"]) for row in found} == {
        (1, "x"),
        (1, "y"),
        (2, "x"),
        (2, "y"),
        (3, "x"),
    }


def test_the_rows_are_the_same_each_time() -> None:
    assert rows(AXES, lambda row: True) == rows(AXES, lambda row: True)
