"""Eager reference of attention among visible keys (README.md has the definition)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def kept_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of every query row over the keys it may see; grouped-query, without repeating keys.

    Args:
        query: (batch, heads, rows, dim). key, value: (batch, kv_heads, length, dim).
        visible: (batch, rows, length) bool, or None for plain causal attention of rows == length.
        scale: factor of the logits.

    Returns:
        (batch, heads, rows, dim); zero for rows that see nothing. Differentiable in query, key and value.
    """
    grouped = query.shape[1] != key.shape[1]
    if visible is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    sees = visible.any(-1)
    if bool(sees.all()):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=scale, enable_gqa=grouped
        )
    filled = visible | ~sees[..., None]  # a row without keys would be 0/0: let it see all, then blank it
    output = scaled_dot_product_attention(query, key, value, attn_mask=filled[:, None], scale=scale, enable_gqa=grouped)
    return torch.where(sees[:, None, :, None], output, torch.zeros((), dtype=output.dtype, device=output.device))
