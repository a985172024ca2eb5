"""Attention mass against the explicit float64 attention map."""

from __future__ import annotations

import pytest
import torch
from sparsity_kernels import attention_mass

SHAPES = [(length, heads, kv_heads) for length in (1, 63, 111) for heads, kv_heads in ((2, 2), (7, 1), (8, 1), (14, 2))]


def problem(length: int, heads: int, kv_heads: int, dtype=torch.float64, dim: int = 64, batch: int = 2):
    """Random queries and keys; the last row of the batch is padded on the left by a third of its length."""
    generator = torch.Generator().manual_seed(length * 100 + heads)
    query = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    key = torch.randn(batch, kv_heads, length, dim, generator=generator, dtype=torch.float64).to(dtype)
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[-1, : length // 3] = False
    visible = torch.ones(length, length).tril().bool() & valid[:, None, :] & valid[:, :, None]
    return query, key, visible, valid


def attention_map(query, key, visible, scale) -> torch.Tensor:
    """(batch, heads, rows, length) float64 softmax, key heads repeated one by one; rows that see nothing are 0."""
    query, key = query.double(), key.double()
    group = query.shape[1] // key.shape[1]
    maps = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for head in range(query.shape[1]):
        logits = query[:, head] @ key[:, head // group].transpose(-1, -2) * scale
        maps[:, head] = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return maps


@pytest.mark.parametrize("length, heads, kv_heads", SHAPES)
def test_mass_is_the_column_sum_of_the_explicit_map(length, heads, kv_heads):
    query, key, visible, _ = problem(length, heads, kv_heads)
    expected = attention_map(query, key, visible, 0.125).sum(2).mean(1)
    torch.testing.assert_close(attention_mass(query, key, visible, 0.125), expected, rtol=1e-12, atol=1e-12)
    rounded = attention_mass(query.float(), key.float(), visible, 0.125)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length, heads, kv_heads", SHAPES)
def test_masses_sum_to_the_number_of_rows(length, heads, kv_heads):
    query, key, visible, valid = problem(length, heads, kv_heads, torch.float32)
    mass = attention_mass(query, key, visible, 0.125)
    torch.testing.assert_close(mass.sum(-1), valid.sum(-1).float())
    assert (mass[~valid] == 0).all()


def test_some_rows_are_scored_by_passing_some_rows():
    query, key, visible, _ = problem(63, 14, 2)
    rows = torch.tensor([5, 40, 62])
    expected = attention_map(query, key, visible, 0.125)[:, :, rows].sum(2).mean(1)
    torch.testing.assert_close(attention_mass(query[:, :, rows], key, visible[:, rows], 0.125), expected)


def test_no_rows_give_no_mass():
    query, key, visible, _ = problem(5, 2, 1)
    assert attention_mass(query[:, :, :0], key, visible[:, :0], 0.125).tolist() == [[0.0] * 5] * 2


def test_low_precision_input_is_summed_in_float32():
    query, key, visible, _ = problem(111, 8, 1, torch.bfloat16)
    mass = attention_mass(query, key, visible, 0.125)
    expected = attention_map(query, key, visible, 0.125).sum(2).mean(1)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), expected, rtol=2e-2, atol=1e-3)  # logits are rounded to bfloat16 once


def test_equal_scores_share_equally_and_a_one_hot_score_takes_all():
    visible = torch.ones(1, 1, 8, dtype=torch.bool)
    key = torch.zeros(1, 1, 8, 64)
    assert attention_mass(torch.ones(1, 2, 1, 64), key, visible, 1.0).tolist() == [[0.125] * 8]
    key[0, 0, 3] = 10.0
    assert attention_mass(torch.ones(1, 2, 1, 64), key, visible, 1.0)[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_gradients_are_those_of_the_formula():
    query, key, visible, _ = problem(7, 4, 2, dim=3)
    weights = torch.linspace(1, 2, 7, dtype=torch.float64)

    def weighted(query, key):
        return attention_mass(query, key, visible, 0.6) @ weights

    assert torch.autograd.gradcheck(weighted, (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize(
    "heads, kv_heads, rows, message",
    [(3, 2, 4, "multiple of key heads"), (2, 1, 3, r"visible must be .*\(1, 4, 5\).* got \(1, 3, 5\)")],
)
def test_shapes_that_do_not_fit_are_refused(heads, kv_heads, rows, message):
    visible = torch.ones(1, rows, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        attention_mass(torch.zeros(1, heads, 4, 8), torch.zeros(1, kv_heads, 5, 8), visible, 1.0)
