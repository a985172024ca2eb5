"""Top-p: budgets to counts, counts to kept sets, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import torch
from brute_force import top_p_size
from hypothesis import given
from hypothesis import strategies as st
from sparsity_kernels import keep_highest, top_p_count

budgets = st.one_of(
    st.floats(2**-126, 1.0, width=32), st.sampled_from([2**-126, 0.5, 0.94, 0.975, 1 - 2**-24, 1.0])
).map(lambda p: float(torch.tensor(p, dtype=torch.float32)))
# Sums of up to 24 such masses are exact in 40 fraction bits, so the answer is one and not a matter of rounding.
masses = st.lists(st.integers(0, 64).map(lambda units: units / 64), min_size=1, max_size=24)


@given(masses, budgets, st.integers(-100, 80), st.randoms())
def test_count_is_the_smallest_that_reaches_the_budget(values, p, exponent, random):
    droppable = [random.random() < 0.8 for _ in values]
    scaled = [value * 2.0**exponent for value in values]
    mass = torch.tensor([scaled], dtype=torch.float32)
    count = int(top_p_count(mass, torch.tensor([droppable]), torch.tensor([p])))
    members = sorted((Fraction(v) for v, may_drop in zip(scaled, droppable, strict=True) if may_drop), reverse=True)
    if not members:
        assert count == 0
        return
    assert count == top_p_size(members, Fraction(p))
    assert sum(members[:count]) >= Fraction(p) * sum(members)
    if count > 1 and p < 1:
        assert sum(members[: count - 1]) < Fraction(p) * sum(members)


@given(masses, st.lists(budgets, min_size=2, max_size=6))
def test_counts_grow_with_the_budget(values, several):
    several.sort()
    mass = torch.tensor([values]).expand(len(several), -1)
    counts = top_p_count(mass, torch.ones_like(mass, dtype=torch.bool), torch.tensor(several)).tolist()
    assert counts == sorted(counts)


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), budgets, st.randoms())
def test_count_does_not_depend_on_the_order_of_the_tokens(values, p, random):
    mass = torch.tensor([values, random.sample(values, len(values))])
    first, second = top_p_count(mass, torch.ones_like(mass, dtype=torch.bool), torch.tensor([p, p])).tolist()
    assert first == second


def test_long_rows_of_real_masses_reach_the_budget_to_the_last_token():
    mass = torch.rand(4, 12_000, generator=torch.Generator().manual_seed(0)).pow(8)
    p = torch.tensor([1e-6, 0.5, 0.975, 1 - 2**-24])
    for row, count in enumerate(top_p_count(mass, torch.ones_like(mass, dtype=torch.bool), p).tolist()):
        members = sorted((Fraction(value) for value in mass[row].tolist()), reverse=True)
        slack = Fraction(len(members), 2**40)  # every mass is rounded to 2^-40 of the largest
        target = Fraction(float(p[row])) * sum(members)
        assert sum(members[:count]) >= target - slack
        assert sum(members[: count - 1]) < target + slack


def test_a_full_budget_counts_tokens_without_mass():
    mass = torch.tensor([[1.0, 0.0, 1e-45, 0.0]])
    assert top_p_count(mass, torch.ones(1, 4, dtype=torch.bool), torch.tensor([1.0])).tolist() == [4]
    assert top_p_count(mass, torch.ones(1, 4, dtype=torch.bool), torch.tensor([1 - 2**-24])).tolist() == [1]


def test_masses_that_cannot_be_dropped_are_not_looked_at():
    mass = torch.tensor([[torch.nan, 3.0, 1.0, torch.inf]])
    droppable = torch.tensor([[False, True, True, False]])
    assert top_p_count(mass, droppable, torch.tensor([0.75])).tolist() == [1]
    assert top_p_count(mass, droppable, torch.tensor([0.76])).tolist() == [2]


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=16), st.integers(0, 20), st.randoms())
def test_the_highest_stay_and_ties_go_to_the_lower_index(values, count, random):
    droppable = [random.random() < 0.8 for _ in values]
    kept = keep_highest(torch.tensor([values]), torch.tensor([droppable]), torch.tensor([count]))[0].tolist()
    members = [index for index, may_drop in enumerate(droppable) if may_drop]
    expected = sorted(members, key=lambda index: (-values[index], index))[:count]
    assert [index for index, stays in enumerate(kept) if stays] == sorted(expected)
