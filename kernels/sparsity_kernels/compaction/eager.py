"""Eager reference of compaction (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_kept(key: Tensor, value: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gathers the kept positions of a layer's keys and values, in ascending order.

    Args:
        key, value: (batch, kv_heads, length, dim). kept: (batch, length) bool.

    Returns:
        keys and values (batch, kv_heads, longest, dim), new storage, and the (batch, longest) bool mask of real
        entries: rows that keep fewer than the longest end in entries that are not real.

    Raises:
        ValueError: a row keeps nothing.
    """
    lengths = kept.sum(-1)
    if not bool((lengths > 0).all()):
        raise ValueError(f"row {int((lengths == 0).nonzero()[0])} keeps no token; protect at least the last one")
    longest = int(lengths.max())
    slots = kept.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    index = slots[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    real = torch.arange(longest, device=kept.device)[None] < lengths[:, None]
    return key.gather(2, index), value.gather(2, index), real
