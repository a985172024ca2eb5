"""Attention among visible keys against an explicit softmax, forward and backward."""

from __future__ import annotations

import pytest
import torch
from sparsity_kernels import kept_attention


def problem(rows: int, length: int, heads: int, kv_heads: int, dim: int = 16):
    """Random tensors and visibility. Where there are rows to spare, one of the first batch row sees nothing."""
    generator = torch.Generator().manual_seed(rows * 1000 + length + heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(2, heads, rows, dim), draw(2, kv_heads, length, dim), draw(2, kv_heads, length, dim)
    visible = torch.rand(2, rows, length, generator=generator) < 0.4
    visible[:, :, 0] = True
    if rows > 2:
        visible[0, 1] = False
    return query, key, value, visible


def explicit(query, key, value, visible, scale):
    """One softmax per row over its visible keys only; 0 where there are none."""
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for batch in range(query.shape[0]):
        for row in range(query.shape[2]):
            seen = visible[batch, row]
            if not seen.any():
                continue
            for head in range(query.shape[1]):
                keys, values = key[batch, head // group, seen], value[batch, head // group, seen]
                output[batch, head, row] = (keys @ query[batch, head, row] * scale).softmax(0) @ values
    return output


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (7, 1), (8, 1), (14, 2)])
@pytest.mark.parametrize("rows, length", [(1, 1), (1, 63), (5, 111), (17, 17)])
def test_every_row_attends_to_its_visible_keys_only(rows, length, heads, kv_heads):
    query, key, value, visible = problem(rows, length, heads, kv_heads)
    output = kept_attention(query, key, value, visible, 0.3)
    torch.testing.assert_close(output, explicit(query, key, value, visible, 0.3), rtol=1e-12, atol=1e-12)
    single = kept_attention(query.float(), key.float(), value.float(), visible, 0.3)
    torch.testing.assert_close(single.double(), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (14, 2)])
@pytest.mark.parametrize("length", [1, 63])
def test_without_visibility_attention_is_causal(length, heads, kv_heads):
    query, key, value, _ = problem(length, length, heads, kv_heads)
    causal = torch.ones(length, length).tril().bool().expand(2, -1, -1)
    expected = explicit(query, key, value, causal, 0.3)
    torch.testing.assert_close(kept_attention(query, key, value, None, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient():
    query, key, value, visible = problem(5, 9, 2, 1)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = kept_attention(*inputs, visible, 0.3)
    assert (output[0, :, 1] == 0).all()
    gradients = torch.autograd.grad(output[0, :, 1].sum(), inputs)
    assert all((gradient == 0).all() for gradient in gradients)


def test_gradients_are_those_of_the_formula():
    query, key, value, visible = problem(4, 6, 4, 2, dim=3)
    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    assert torch.autograd.gradcheck(lambda *qkv: kept_attention(*qkv, visible, 0.3), inputs)


def test_hidden_keys_do_not_reach_the_output_even_when_they_are_not_numbers():
    query, key, value, visible = problem(3, 8, 2, 1)
    visible[:, :, 5] = False
    clean = kept_attention(query, key, value, visible, 0.3)
    key[:, :, 5], value[:, :, 5] = 1e30, 1e6
    torch.testing.assert_close(kept_attention(query, key, value, visible, 0.3), clean)
