"""Few rows in which every two values of different axes meet at least once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, int]]


def rows(axes: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[Row]:
    """The same rows at every call.

    A pair that `allowed` refuses whatever the other axes say is left out; so the first value of each
    axis should go with everything.
    """
    wanted = [
        frozenset({(a, i), (b, j)})
        for a, b in combinations(axes, 2)
        for i, j in product(range(len(axes[a])), range(len(axes[b])))
    ]
    missing = dict.fromkeys(wanted)
    found: list[Row] = []
    while missing:
        pair = next(iter(missing))
        del missing[pair]
        chosen = dict(pair)
        row = _filled(axes, chosen, {})
        if not allowed(row):
            continue
        for axis in axes:
            if axis in chosen:
                continue
            best, gain = 0, -1
            for index in range(len(axes[axis])):
                new = sum(frozenset({(axis, index), item}) in missing for item in chosen.items())
                if new > gain and allowed(_filled(axes, chosen, {axis: index})):
                    best, gain = index, new
            chosen[axis] = best
        for a, b in combinations(chosen.items(), 2):
            missing.pop(frozenset({a, b}), None)
        found.append(_filled(axes, chosen, {}))
    return found


def _filled(
    axes: Mapping[str, Sequence[Any]], chosen: Mapping[str, int], more: Mapping[str, int]
) -> Row:
    indices = {**chosen, **more}
    return {axis: values[indices.get(axis, 0)] for axis, values in axes.items()}
