"""The cache layer that drops positions and goes on counting them."""

from __future__ import annotations

import pytest
import torch
from sparsity_kernels import CapacityError

from sparsity_forcing.attention.cache import PrunedLayer, pruned_cache


@pytest.fixture
def layer() -> PrunedLayer:
    """Two rows of six tokens, of which the rows keep three and two; keys hold their position."""
    layer = PrunedLayer()
    keys = torch.arange(6.0).view(1, 1, 6, 1).repeat(2, 1, 1, 4)
    layer.update(keys, keys + 100)
    kept = torch.zeros(2, 6, dtype=torch.bool)
    kept[0, [0, 3, 5]] = kept[1, [2, 5]] = True
    layer.prune(kept)
    return layer


def stored(layer: PrunedLayer, row: int) -> list[float]:
    first, count = int(layer.ragged.start[row]), int(layer.ragged.length[row])
    return layer.ragged.key[first : first + count, 0, 0].tolist()


def test_kept_positions_are_stored_and_all_are_counted(layer):
    assert (stored(layer, 0), stored(layer, 1)) == ([0, 3, 5], [2, 5])
    assert layer.get_seq_length() == 6
    assert layer.get_mask_sizes(1) == (7, 0)
    assert layer.nbytes == 2 * 2 * 3 * 4 * 4


def test_new_tokens_follow_the_kept_ones(layer):
    layer.update(torch.full((2, 1, 2, 4), 7.0), torch.zeros(2, 1, 2, 4))
    assert (stored(layer, 0), stored(layer, 1)) == ([0, 3, 5, 7, 7], [2, 5, 7, 7])
    assert layer.get_seq_length() == 8
    assert layer.nbytes == 2 * 2 * 5 * 4 * 4  # the free room behind the rows is not counted


def test_rows_grow_as_often_as_it_takes(layer):
    for token in range(100):
        layer.update(torch.full((2, 1, 1, 4), 200.0 + token), torch.zeros(2, 1, 1, 4))
    assert stored(layer, 1) == [2, 5, *range(200, 300)]
    assert layer.dense_nbytes == 2 * 2 * 106 * 4 * 4


def test_a_full_cache_is_not_advanced(layer):
    with pytest.raises(CapacityError, match="no room for 1 new entries"):
        layer.advance()
    assert layer.get_seq_length() == 6


def test_a_layer_is_pruned_once(layer):
    with pytest.raises(RuntimeError, match="pruned already"):
        layer.prune(torch.ones(2, 6, dtype=torch.bool))


def test_it_cannot_be_cropped(layer):
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        layer.crop(-1)


def test_rows_are_reordered_selected_and_repeated_with_their_marks(layer):
    layer.reorder_cache(torch.tensor([1, 0]))
    assert (stored(layer, 0), stored(layer, 1)) == ([2, 5], [0, 3, 5])
    layer.batch_repeat_interleave(2)
    assert [stored(layer, row) for row in range(4)] == [[2, 5], [2, 5], [0, 3, 5], [0, 3, 5]]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert (stored(layer, 0), stored(layer, 1)) == ([0, 3, 5], [2, 5])


def test_a_reset_layer_is_empty(layer):
    layer.reset()
    assert (layer.get_seq_length(), layer.ragged, layer.nbytes) == (0, None, 0)


def test_a_cache_has_as_many_layers_as_asked_for():
    cache = pruned_cache(3)
    assert len(cache) == 3
    assert cache.get_seq_length() == 0
