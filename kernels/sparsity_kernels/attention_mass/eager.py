"""Eager reference of the attention mass (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mass(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Column sums of the attention map over the scoring rows, mean over query heads.

    Args:
        query: (batch, heads, rows, dim), the scoring rows only.
        key: (batch, kv_heads, length, dim); ``heads`` is a multiple of ``kv_heads``.
        visible: (batch, rows, length) bool; what each scoring row may attend to. A row that sees nothing (padding)
            adds nothing.
        scale: factor of the logits.

    Returns:
        (batch, length) mass a_j = sum over rows of the mean over heads of softmax(q k^T * scale), float32 (float64 for
        float64 input, the oracle of faster versions). Differentiable in ``query`` and ``key``.

    Raises:
        ValueError: shapes do not fit together.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a multiple of key heads ({kv_heads})")
    if visible.shape != (batch, rows, length):
        raise ValueError(f"visible must be (batch, rows, length) = {(batch, rows, length)}, got {tuple(visible.shape)}")
    group = heads // kv_heads
    grouped = query.reshape(batch, kv_heads, group * rows, dim)
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (grouped @ key.transpose(-1, -2)).to(wide).mul(scale).view(batch, kv_heads, group, rows, length)
    seen = visible[:, None, None]
    logits = logits.masked_fill(~seen, torch.finfo(wide).min)
    attention = torch.softmax(logits, dim=-1) * seen
    return attention.sum(dim=3).mean(dim=(1, 2))
