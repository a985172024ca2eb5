"""Top-p: budgets to counts, counts to kept sets, against exact fractions; Triton against eager to the last bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from brute_force import top_p_size
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tests import DEVICE, LargestTensor
from sparsity_kernels import keep_highest, top_p_count

budgets = st.one_of(
    st.floats(2**-126, 1.0, width=32), st.sampled_from([2**-126, 0.5, 0.94, 0.975, 1 - 2**-24, 1.0])
).map(lambda p: float(torch.tensor(p, dtype=torch.float32)))
# Sums of up to 24 such masses are exact in 40 fraction bits, so the answer is one and not a matter of rounding.
masses = st.lists(st.integers(0, 64).map(lambda units: units / 64), min_size=1, max_size=24)
# Any masses at all: few values, so that they tie, and up to 2^-41 apart, so that they are rounded.
any_masses = st.lists(
    st.one_of(
        st.floats(0, 2.0**127, width=32),
        st.sampled_from([0.0, 2**-149, 3 * 2**-149, 0.75, 0.5, 1.0]),
        st.integers(0, 16).map(lambda odd: (2 * odd + 1) * 2**-41),
    ),
    min_size=1,
    max_size=40,
)
any_ranks = st.lists(
    st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2**-149, -(2**-149), 3.4028234663852886e38, -3.4028234663852886e38]),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(params=["eager", "triton"], scope="module")
def impl(request) -> str:
    return request.param


def examples(impl: str):
    """Fewer examples where Triton's interpreter runs them."""
    return settings(max_examples=20 if impl == "triton" and DEVICE == "cpu" else 50)


def rows(values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def droppable_of(values, random) -> list[bool]:
    return [random.random() < 0.8 for _ in values]


def integer_count(members: list[float], p: float) -> int:
    """The count as README.md defines it, in Python's integers."""
    if p >= 1 or not members:
        return len(members)
    exponent = math.frexp(max(members))[1]
    units = sorted((round(Fraction(member) * Fraction(2) ** (40 - exponent)) for member in members), reverse=True)
    target, reached = p * float(sum(units)), 0
    for count, unit in enumerate(units, start=1):
        reached += unit
        if float(reached) >= target:
            return count
    raise AssertionError("the whole sum is less than p of itself")


def test_count_is_the_smallest_that_reaches_the_budget(impl):
    @given(masses, budgets, st.integers(-100, 80), st.randoms())
    @examples(impl)
    def check(values, p, exponent, random):
        droppable = droppable_of(values, random)
        scaled = [value * 2.0**exponent for value in values]
        count = int(top_p_count(rows([scaled]), rows([droppable], torch.bool), rows([p]), impl))
        members = sorted((Fraction(v) for v, may_drop in zip(scaled, droppable, strict=True) if may_drop), reverse=True)
        if not members:
            assert count == 0
            return
        assert count == top_p_size(members, Fraction(p))
        assert sum(members[:count]) >= Fraction(p) * sum(members)
        if count > 1 and p < 1:
            assert sum(members[: count - 1]) < Fraction(p) * sum(members)

    check()


def test_any_masses_are_counted_as_the_integers_that_the_readme_says(impl):
    @given(any_masses, st.lists(budgets, min_size=1, max_size=3), st.randoms())
    @examples(impl)
    def check(values, several, random):
        droppable = droppable_of(values, random)
        counts = top_p_count(rows([values]), rows([droppable], torch.bool), rows([several]), impl)[0].tolist()
        members = [value for value, may_drop in zip(values, droppable, strict=True) if may_drop]
        assert counts == [integer_count(members, p) for p in several]

    check()


def test_counts_grow_with_the_budget_and_kept_sets_are_nested(impl):
    @given(masses, st.lists(budgets, min_size=2, max_size=4), st.randoms())
    @examples(impl)
    def check(values, several, random):
        several.sort()
        mass, droppable = rows([values]), rows([droppable_of(values, random)], torch.bool)
        counts = top_p_count(mass, droppable, rows([several]), impl)
        assert counts[0].tolist() == sorted(counts[0].tolist())
        kept = keep_highest(rows([random.sample(values, len(values))]), droppable, counts, impl)[0]
        assert torch.equal(kept.sum(-1), counts[0])
        assert bool((kept[1:] | ~kept[:-1]).all())

    check()


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40), budgets, st.randoms())
def test_count_does_not_depend_on_the_order_of_the_tokens(values, p, random):
    mass = rows([values, random.sample(values, len(values))])
    first, second = top_p_count(mass, torch.ones_like(mass, dtype=torch.bool), rows([p, p]), "eager").tolist()
    assert first == second


def test_long_rows_of_real_masses_reach_the_budget_to_the_last_token(impl):
    mass = torch.rand(4, 12_000, generator=torch.Generator().manual_seed(0)).pow(8).to(DEVICE)
    p = rows([1e-6, 0.5, 0.975, 1 - 2**-24])
    for row, count in enumerate(top_p_count(mass, torch.ones_like(mass, dtype=torch.bool), p, impl).tolist()):
        members = sorted((Fraction(value) for value in mass[row].tolist()), reverse=True)
        slack = Fraction(len(members), 2**40)  # every mass is rounded to 2^-40 of the largest
        target = Fraction(float(p[row])) * sum(members)
        assert sum(members[:count]) >= target - slack
        assert sum(members[: count - 1]) < target + slack


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("length", [1, 63, 111, 2047, 20_001, 65_536])
def test_triton_finds_what_eager_finds_also_beyond_what_fits_into_registers(length):
    generator = torch.Generator().manual_seed(length)
    mass = torch.rand(3, length, generator=generator).pow(6)
    mass[1] = 0.7  # all equal: the sums of the longest row pass 2^53
    mass[2] = torch.randint(0, 3, (length,), generator=generator) * 2.0**-149
    droppable = torch.rand(3, length, generator=generator) < torch.tensor([[0.9], [2.0], [0.5]])
    sign = torch.where(torch.rand(3, length, generator=generator) < 0.5, -1.0, 1.0)
    mass, droppable, rank = (tensor.to(DEVICE) for tensor in (mass, droppable, mass * sign))
    p = rows([[0.3, 1 - 2**-24], [0.9, 0.123], [0.5, 0.999]] if length <= 2047 else [[0.975], [0.9], [0.5]])
    counts = top_p_count(mass, droppable, p, "triton")
    assert torch.equal(counts, top_p_count(mass, droppable, p, "eager"))
    kept = keep_highest(rank, droppable, counts, "triton")
    assert torch.equal(kept, keep_highest(rank, droppable, counts, "eager"))
    assert torch.equal(kept.sum(-1), counts)
    if length <= 2047:
        assert torch.equal(counts, top_p_count(mass, droppable, p, "triton"))
        assert torch.equal(kept, keep_highest(rank, droppable, counts, "triton"))


@pytest.mark.usefixtures("poisoned_memory")
def test_several_budgets_and_rows_give_what_each_gives_alone(impl):
    generator = torch.Generator().manual_seed(1)
    mass = torch.rand(3, 111, generator=generator).pow(4).to(DEVICE)
    droppable = (torch.rand(3, 111, generator=generator) < 0.7).to(DEVICE)
    droppable[1] = False  # a fully protected row
    p = rows([[0.9, 1.0, 0.5]]).expand(3, -1)
    counts = top_p_count(mass, droppable, p, impl)
    kept = keep_highest(mass, droppable, counts, impl)
    assert counts.dtype == torch.int64
    assert counts.shape == (3, 3)
    assert kept.shape == (3, 3, 111)
    assert not kept[1].any()
    for row in range(3):
        for budget in range(3):
            alone = slice(row, row + 1)
            count = top_p_count(mass[alone], droppable[alone], p[alone, budget], impl)
            assert count.tolist() == [counts[row, budget]]
            assert torch.equal(keep_highest(mass[alone], droppable[alone], count, impl)[0], kept[row, budget])


def test_rows_may_have_any_strides(impl):
    mass = torch.rand(6, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    droppable = (mass.t() > 0.2).t()
    for view in (slice(None), slice(None, None, 2)):
        p = rows([0.5]).expand(6)
        expected = top_p_count(mass[:, view].contiguous(), droppable[:, view].contiguous(), p.contiguous(), impl)
        counts = top_p_count(mass[:, view], droppable[:, view], p, impl)
        assert torch.equal(counts, expected)
        expected = keep_highest(mass[:, view].contiguous(), droppable[:, view].contiguous(), counts, impl)
        assert torch.equal(keep_highest(mass[:, view], droppable[:, view], counts, impl), expected)
    one_row = mass[:1].expand(3, -1)
    assert top_p_count(one_row, droppable[:1].expand(3, -1), rows([0.5] * 3), impl).unique().numel() == 1


def test_a_full_budget_counts_tokens_without_mass(impl):
    mass, all_of_them = rows([[1.0, 0.0, 1e-45, 0.0]]), torch.ones(1, 4, dtype=torch.bool, device=DEVICE)
    assert top_p_count(mass, all_of_them, rows([1.0]), impl).tolist() == [4]
    assert top_p_count(mass, all_of_them, rows([1 - 2**-24]), impl).tolist() == [1]
    assert top_p_count(mass * 0, all_of_them, rows([0.9]), impl).tolist() == [1]


def test_masses_that_cannot_be_dropped_are_not_looked_at(impl):
    mass = rows([[torch.nan, 3.0, 1.0, torch.inf]])
    droppable = rows([[False, True, True, False]], torch.bool)
    assert top_p_count(mass, droppable, rows([[0.75, 0.76]]), impl).tolist() == [[1, 2]]
    kept = keep_highest(mass, droppable, rows([[1, 2]], torch.int64), impl)
    assert kept.tolist() == [[[False, True, False, False], [False, True, True, False]]]


def test_the_highest_stay_and_ties_go_to_the_lower_index(impl):
    @given(
        st.one_of(any_ranks, st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=16)),
        st.lists(st.integers(-1, 45), min_size=1, max_size=3),
        st.randoms(),
    )
    @examples(impl)
    def check(values, counts, random):
        droppable = droppable_of(values, random)
        kept = keep_highest(rows([values]), rows([droppable], torch.bool), rows([counts], torch.int64), impl)[0]
        members = [index for index, may_drop in enumerate(droppable) if may_drop]
        ranked = sorted(members, key=lambda index: (-values[index], index))
        for budget, count in enumerate(counts):
            assert kept[budget].nonzero().flatten().tolist() == sorted(ranked[: max(0, count)])

    check()


def test_one_token_with_all_the_mass_is_enough(impl):
    mass = torch.zeros(1, 63, device=DEVICE)
    mass[0, 17] = 5.0
    all_of_them = torch.ones_like(mass, dtype=torch.bool)
    counts = top_p_count(mass, all_of_them, rows([[2**-126, 1 - 2**-24]]), impl)
    assert counts.tolist() == [[1, 1]]
    assert keep_highest(mass, all_of_them, counts, impl).nonzero()[:, 2].tolist() == [17, 17]


def test_memory_grows_with_the_length_and_not_with_its_square(impl):
    largest = []
    for length in (1024, 2048):
        mass, all_of_them = torch.rand(1, length, device=DEVICE), torch.ones(1, length, dtype=bool, device=DEVICE)
        with LargestTensor() as watched:
            counts = top_p_count(mass, all_of_them, rows([[0.5, 0.9]]), impl)
            keep_highest(mass, all_of_them, counts, impl)
        largest.append(watched.nbytes)
    assert largest[1] < 3 * largest[0]


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
@pytest.mark.parametrize("p, got", [(-1.0, r"-1.0 … 0.5"), (0.0, "0.0"), (1.5, "0.5 … 1.5"), (math.nan, "nan")])
def test_budgets_out_of_range_are_named(impl, p, got):
    mass = rows([[1.0, 2.0]])
    with pytest.raises(ValueError, match=rf"p must be in \(0, 1\], got {got}"):
        top_p_count(mass, mass > 0, rows([[0.5, p]]), impl)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU nobody looks")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_masses_and_ranks_that_are_none_are_named(impl, value):
    values, droppable = rows([[1.0, value, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"mass must be finite and at least 0 where droppable, got .*{value}"):
        top_p_count(values, droppable, rows([0.5]), impl)
    if value == -1:
        assert keep_highest(values, droppable, rows([2], torch.int64), impl).tolist() == [[True, False, True]]
        return
    with pytest.raises(ValueError, match=f"rank must be finite where droppable, got .*{value}"):
        keep_highest(values, droppable, rows([2], torch.int64), impl)


@pytest.mark.filterwarnings("error")
def test_masses_that_want_a_gradient_are_taken(impl):
    mass = rows([[1.0, 3.0]]).requires_grad_()
    assert top_p_count(mass, mass > 0, rows([0.5]), impl).tolist() == [1]
    kept = keep_highest(mass, mass > 0, rows([1], torch.int64), impl)
    assert kept.tolist() == [[False, True]]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"values": torch.zeros(2, 5, dtype=torch.float64)}, "float32.*got.*float64"),
        ({"values": torch.zeros(10)}, r"must be \(batch, length\)"),
        ({"values": torch.zeros(2, 0)}, "length at least 1"),
        ({"droppable": torch.ones(2, 5)}, "droppable must be bool"),
        ({"droppable": torch.ones(2, 4, dtype=torch.bool)}, r"droppable must be .*\(2, 5\), got \(2, 4\)"),
        ({"budgets": torch.ones(3)}, "batch 2, got"),
        ({"budgets": torch.ones(2, dtype=torch.float16)}, "got.*float16"),
        ({"budgets": torch.ones(2, 1, 1)}, r"\(batch, budgets\)"),
    ],
)
def test_bad_input_is_named(changed, message):
    given = {"values": torch.zeros(2, 5), "droppable": torch.ones(2, 5, dtype=torch.bool), "budgets": torch.ones(2)}
    given |= changed
    with pytest.raises(ValueError, match=message):
        top_p_count(given["values"], given["droppable"], given["budgets"])
    if given["budgets"].dtype == torch.float32:
        given["budgets"] = given["budgets"].long()
    with pytest.raises(ValueError, match=message.replace("mass", "rank")):
        keep_highest(given["values"], given["droppable"], given["budgets"])
