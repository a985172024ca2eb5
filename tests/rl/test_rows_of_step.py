"""Which rows a step trains on."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sparsity_forcing.data.schema import Row
from sparsity_forcing.rl.batches import rows_of_step


def rows(count: int) -> list[Row]:
    return [Row(str(i), "train", "read", "which?", "1", []) for i in range(count)]


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_asks_every_row_at_most_once_and_nearly_all_of_them(count, per_step, seed):
    count = max(count, per_step)
    steps = count // per_step
    asked = Counter(row.id for step in range(steps) for row in rows_of_step(rows(count), step, per_step, seed))
    assert set(asked.values()) == {1}
    assert len(asked) == steps * per_step > count - per_step


def test_a_step_is_a_function_of_its_number():
    first, again = (rows_of_step(rows(20), 7, 4, seed=1) for _ in range(2))
    assert [row.id for row in first] == [row.id for row in again]


def test_epochs_and_seeds_are_in_other_orders():
    epoch = lambda start, seed: [r.id for step in range(5) for r in rows_of_step(rows(20), start + step, 4, seed)]  # noqa: E731
    assert epoch(0, 1) != epoch(5, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert sorted(epoch(0, 1)) == sorted(epoch(5, 1))
