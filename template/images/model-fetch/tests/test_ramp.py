"""How many connections are open, by what they bring."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from model_fetch.ramp import FIRST, Ramp


def opened(limit: int, rate: Callable[[int], float], seconds: int) -> list[int]:
    """Connections at each second of a transfer whose rate depends on their number."""
    ramp, received, found = Ramp(limit), 0.0, []
    for second in range(seconds):
        found.append(ramp.connections(int(received), float(second)))
        received += rate(found[-1])
    return found


def test_a_store_that_is_slow_for_each_connection_gets_all_of_them_soon() -> None:
    assert opened(8, lambda n: n * 40e6, 5) == [2, 4, 8, 8, 8]


def test_a_store_that_two_connections_saturate_is_tried_with_more_now_and_then() -> None:
    assert opened(16, lambda n: 1e9, 12) == [2, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8, 16]


def test_looks_in_between_change_nothing() -> None:
    ramp = Ramp(8)
    assert {ramp.connections(n * 1_000_000, 0.001 * n) for n in range(900)} == {FIRST}


@given(
    limit=st.integers(1, 64),
    looks=st.lists(st.tuples(st.integers(0, 1 << 32), st.floats(0, 20)), max_size=50),
)
def test_connections_only_grow_and_never_beyond_the_limit(
    limit: int, looks: list[tuple[int, float]]
) -> None:
    ramp, received, now, before = Ramp(limit), 0, 0.0, 1
    for more, later in looks:
        received, now = received + more, now + later
        count = ramp.connections(received, now)
        assert before <= count <= limit
        before = count
