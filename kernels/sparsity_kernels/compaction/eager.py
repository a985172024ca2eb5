"""Eager reference of compaction (README.md has the definition)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsity_kernels.compaction.ragged import RaggedCache


def gather_entries(key: Tensor, value: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of a padded cache, one behind the other.

    Args:
        key, value: (batch, kv_heads, length, dim).
        source: (entries,) int64, b * length + slot of every entry; -1: an entry of zeros.

    Returns:
        two new (entries, kv_heads, dim).
    """
    _, heads, length, dim = key.shape
    free = (source < 0).nonzero().flatten()
    stored = source.clamp_min(0)
    gathered = []
    for padded in (key, value):
        by_slot = padded.transpose(1, 2)
        if by_slot.is_contiguous():
            entries = by_slot.flatten(0, 1).index_select(0, stored)
        else:
            place = stored + stored.div(length, rounding_mode="floor") * ((heads - 1) * length)
            place = place[:, None] + torch.arange(heads, device=place.device) * length
            entries = padded.reshape(-1, dim).index_select(0, place.view(-1)).view(-1, heads, dim)
        gathered.append(entries.index_fill_(0, free, 0))
    return gathered[0], gathered[1]


def write_entries(cache: RaggedCache, key: Tensor, value: Tensor, slots: Tensor | None) -> None:
    """Writes (batch, kv_heads, new, dim) behind the stored entries of every row, which has room for them."""
    new = key.shape[2]
    entries = ((cache.start + cache.length)[:, None] + torch.arange(new, device=key.device)).view(-1)
    cache.key[entries] = key.transpose(1, 2).flatten(0, 1)
    cache.value[entries] = value.transpose(1, 2).flatten(0, 1)
    if slots is not None:
        cache.slots[entries] = slots.reshape(-1).to(cache.slots.dtype)
