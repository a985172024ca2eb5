"""The selection rules against brute force in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from brute_force import brute_force_selection
from hypothesis import example, given
from hypothesis import strategies as st

from sparsity_forcing.selection import select

RULES, RANKS = ("top_p", "top_k", "threshold"), ("normalized", "raw")
# Multiples of 1/64 with many ties and zeros: float sums are exact, so brute force and the fast version must agree.
values = st.sampled_from([0.0, 1 / 64, 1 / 64, 0.25, 0.25, 0.5, 21 / 64, 1.0])
binary_budgets = st.integers(1, 256).map(lambda units: units / 256)
tokens = st.lists(st.tuples(values, st.sampled_from([0, 1, 2, 4, 8]), st.booleans()), min_size=1, max_size=20)


def run(mass, seen_by, droppable, p, rule="top_p", rank_by="normalized") -> list[bool]:
    row = lambda entries, kind: torch.tensor([entries], dtype=kind)  # noqa: E731
    budget = torch.tensor([p], dtype=torch.float32)
    return select(
        row(mass, torch.float32), row(seen_by, torch.int64), row(droppable, torch.bool), budget, rule, rank_by
    )[0].tolist()


@pytest.mark.parametrize("rank_by", RANKS)
@pytest.mark.parametrize("rule", RULES)
@given(tokens=tokens, p=binary_budgets)
@example(tokens=[(0.0, 0, True)], p=1 / 256)
@example(tokens=[(0.0, 1, True)] * 5, p=0.5)
@example(tokens=[(0.25, 1, True)] * 8, p=0.5)
@example(tokens=[(1.0, 1, False)] * 3, p=0.5)
def test_kept_sets_are_those_of_brute_force(rule, rank_by, tokens, p):
    mass, seen_by, droppable = map(list, zip(*tokens, strict=True))
    assert run(mass, seen_by, droppable, p, rule, rank_by) == brute_force_selection(
        mass, seen_by, droppable, p, rule, rank_by
    )


@given(tokens, binary_budgets)
def test_the_kept_mass_reaches_the_budget_and_not_without_its_smallest_member(tokens, p):
    mass, seen_by, droppable = map(list, zip(*tokens, strict=True))
    kept = run(mass, seen_by, droppable, p, rank_by="raw")
    total = sum(Fraction(m) for m, may_drop in zip(mass, droppable, strict=True) if may_drop)
    members = [Fraction(m) for m, stays in zip(mass, kept, strict=True) if stays]
    assert sum(members) >= Fraction(p) * total
    if len(members) > 1 and p < 1:
        assert sum(members) - min(members) < Fraction(p) * total


@pytest.mark.parametrize("rank_by", RANKS)
@pytest.mark.parametrize("rule", RULES)
@given(tokens=tokens, budgets=st.tuples(binary_budgets, binary_budgets))
def test_kept_sets_are_nested_in_the_budget(rule, rank_by, tokens, budgets):
    mass, seen_by, droppable = map(list, zip(*tokens, strict=True))
    small, large = (run(mass, seen_by, droppable, p, rule, rank_by) for p in sorted(budgets))
    assert all(in_large or not in_small for in_small, in_large in zip(small, large, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_full_budget_keeps_all_that_may_be_dropped_and_nothing_else(rule):
    droppable = [True, False, True, True]
    assert run([0.0, 1.0, 1e-45, 0.5], [0, 1, 1, 1], droppable, 1.0, rule) == droppable


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", [1e-30, 2**-24])
def test_a_vanishing_budget_keeps_the_one_highest_token(rule, p):
    assert run([0.25, 0.5, 0.125], [1, 1, 1], [True] * 3, p, rule) == [False, True, False]


def test_one_token_stays_whatever_the_budget():
    assert all(
        run([mass], [1], [True], p, rule) == [True] for mass in (0.0, 0.3) for p in (1e-9, 1.0) for rule in RULES
    )


def test_equal_masses_go_to_the_lower_index():
    assert run([0.5] * 6, [1] * 6, [False, True, True, True, True, True], 0.375) == [False, True, True] + [False] * 3


def test_the_count_comes_from_raw_masses_and_the_rank_from_normalized_ones():
    mass, seen_by = [0.5, 0.375, 0.125], [4, 2, 1]  # normalized: 0.125, 0.1875, 0.125
    assert run(mass, seen_by, [True] * 3, 0.5, rank_by="raw") == [True, False, False]
    assert run(mass, seen_by, [True] * 3, 0.5) == [False, True, False]


@pytest.mark.parametrize("p, count", [(0.1, 10_000), (0.7, 100), (0.07, 100), (0.35, 20), (0.975, 16_384)])
def test_top_k_does_not_count_the_rounding_of_the_budget(p, count):
    """0.1 is a little more than one tenth in float32, and a tenth of 10,000 tokens is still 1,000."""
    expected = -(-round(p * 1000) * count // 1000)
    assert sum(run([1.0] * count, [1] * count, [True] * count, p, "top_k")) == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank_by", RANKS)
def test_rows_of_a_batch_do_not_touch_each_other(rule, rank_by):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(8, 40, generator=generator)
    seen_by = torch.randint(1, 9, (8, 40), generator=generator)
    droppable = torch.rand(8, 40, generator=generator) < 0.8
    p = torch.linspace(0.2, 1.0, 8)
    together = select(mass, seen_by, droppable, p, rule, rank_by)
    for row in range(8):
        one = slice(row, row + 1)
        assert torch.equal(together[one], select(mass[one], seen_by[one], droppable[one], p[one], rule, rank_by))


@pytest.mark.parametrize("p", [0.0, -0.5, 1.0001, torch.nan, torch.inf])
def test_a_budget_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match=r"budget p must be in \(0, 1\], got \["):
        run([1.0], [1], [True], p)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_a_mass_that_is_no_number_is_refused_where_it_matters(bad, rule):
    with pytest.raises(ValueError, match="attention mass is not finite"):
        run([1.0, bad], [1, 1], [True, True], 0.5, rule)
    assert run([1.0, bad], [1, 1], [True, False], 0.5, rule) == [True, False]
