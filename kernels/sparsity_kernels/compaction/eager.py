"""Eager reference of compaction (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor


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


def write_entries(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    start: Tensor,
    length: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    new_slots: Tensor | None,
) -> None:
    """Writes (batch, kv_heads, new, dim) behind the ``length`` entries of every row of a buffer; see `RaggedCache`."""
    new = new_key.shape[2]
    entries = ((start + length)[:, None] + torch.arange(new, device=start.device)).view(-1)
    key[entries] = new_key.transpose(1, 2).flatten(0, 1)
    value[entries] = new_value.transpose(1, 2).flatten(0, 1)
    if new_slots is not None:
        slots[entries] = new_slots.reshape(-1).to(slots.dtype)
