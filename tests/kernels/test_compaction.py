"""Compaction: the kept positions, in order, in storage of their own."""

from __future__ import annotations

import pytest
import torch
from sparsity_kernels import gather_kept


@pytest.mark.parametrize("length", [1, 63, 111])
def test_kept_positions_come_out_in_ascending_order(length):
    generator = torch.Generator().manual_seed(length)
    kept = torch.rand(4, length, generator=generator) < torch.tensor([[0.1], [0.5], [0.9], [2.0]])
    kept[:, -1] = True
    key = torch.randn(4, 2, length, 8, generator=generator)
    value = torch.randn(4, 2, length, 8, generator=generator)
    keys, values, real = gather_kept(key, value, kept)
    assert real.shape == (4, length)
    for row in range(4):
        assert torch.equal(keys[row][:, real[row]], key[row][:, kept[row]])
        assert torch.equal(values[row][:, real[row]], value[row][:, kept[row]])
        assert real[row].tolist() == sorted(real[row].tolist(), reverse=True)


def test_storage_is_new_and_no_longer_than_the_longest_row():
    key, value = torch.randn(2, 1, 10, 4), torch.randn(2, 1, 10, 4)
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, [1, 7]] = kept[1, [0, 4, 9]] = True
    keys, values, real = gather_kept(key, value, kept)
    assert keys.shape == values.shape == (2, 1, 3, 4)
    assert real.tolist() == [[True, True, False], [True, True, True]]
    assert keys.untyped_storage().nbytes() == keys.nbytes == 2 * 3 * 4 * 4
    assert keys.untyped_storage().data_ptr() != key.untyped_storage().data_ptr()


def test_gradients_flow_to_kept_positions_only():
    key, value = torch.randn(1, 1, 5, 2, requires_grad=True), torch.randn(1, 1, 5, 2, requires_grad=True)
    kept = torch.tensor([[True, False, True, False, True]])
    keys, values, _ = gather_kept(key, value, kept)
    (keys.sum() + 2 * values.sum()).backward()
    assert key.grad[0, 0, :, 0].tolist() == [1, 0, 1, 0, 1]
    assert value.grad[0, 0, :, 0].tolist() == [2, 0, 2, 0, 2]


def test_a_row_that_keeps_nothing_is_named():
    kept = torch.tensor([[True], [False]])
    with pytest.raises(ValueError, match="row 1 keeps no token"):
        gather_kept(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), kept)
